"""FastV: drop vision tokens behind layer 2, as many as the budget asks for."""

from __future__ import annotations

from adaskip.errors import ConfigError
from adaskip.methods.evidence import Evidence
from adaskip.methods.method import Method
from adaskip.policies.fastv import FastV

LAYER = 2


def choose(evidence: Evidence, keep: float, seed: int) -> FastV:
    """Return the policy whose share of vision tokens stays within the budget; a row's count is rounded up."""
    most = float(evidence.saves[LAYER:].sum())  # what dropping all of them saves
    if (least := 1 - most) > keep:
        raise ConfigError(
            f"keep={keep:g}: expected at least {least:.3f}, without any vision token behind layer {LAYER}"
        )
    return FastV(LAYER, max(1e-6, 1 - (1 - keep) / most))


METHOD = Method(
    "fastv",
    "FastV",
    "arXiv 2403.06764",
    choose,
    groups=("vision",),
    looks="states",
    ours="the share of tokens follows from the budget",
)
