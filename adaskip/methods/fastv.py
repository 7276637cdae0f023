"""FastV: drop vision tokens behind layer 2, as many as the budget asks for."""

from __future__ import annotations

from adaskip.errors import ConfigError
from adaskip.methods.evidence import Evidence
from adaskip.methods.method import Method
from adaskip.policies.fastv import FastV

LAYER = 2


def choose(evidence: Evidence, keep: float, seed: int) -> FastV:
    """Return the policy with the largest share of vision tokens that holds the budget.

    Raises:
        ConfigError: one vision token an input is too many.
    """
    most, patches = float(evidence.saves[LAYER:].sum()), evidence.patches  # what dropping all of them saves
    steps = int(patches.max())
    for count in range(steps, 0, -1):
        share = count / steps
        kept = 1 - most * float(1 - ((share * patches - 1e-9).ceil() / patches).mean())
        if kept <= keep:
            return FastV(LAYER, share)
    raise ConfigError(f"keep={keep:g}: expected at least {kept:.3f}, with one vision token behind layer {LAYER}")


METHOD = Method(
    "fastv",
    "FastV",
    "arXiv 2403.06764",
    choose,
    groups=("vision",),
    looks="states",
    ours="the share of tokens follows from the budget",
)
