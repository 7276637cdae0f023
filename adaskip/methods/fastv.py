"""FastV: drop vision tokens behind layer 2, as many as the budget asks for."""

from __future__ import annotations

from adaskip.methods.budget import largest_share
from adaskip.methods.evidence import Evidence
from adaskip.methods.method import Method
from adaskip.policies.fastv import FastV

LAYER = 2


def choose(evidence: Evidence, keep: float, seed: int) -> FastV:
    """Return the policy with the largest share of vision tokens that holds the budget.

    Raises:
        ConfigError: there is no vision token, or one an input is too many.
    """
    return FastV(LAYER, largest_share(evidence, (LAYER,), keep))


METHOD = Method(
    "fastv",
    "FastV",
    "arXiv 2403.06764",
    choose,
    groups=("vision",),
    phases=("both",),
    looks="states",
    ours="the share of tokens follows from the budget",
)
