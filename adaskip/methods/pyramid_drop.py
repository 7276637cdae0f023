"""PyramidDrop: drop vision tokens in three stages, at each as large a share as the budget asks for."""

from __future__ import annotations

from adaskip.methods.budget import largest_share
from adaskip.methods.evidence import Evidence
from adaskip.methods.method import Method
from adaskip.policies.pyramid_drop import PyramidDrop, quarters

_STEPS = 1000
"""Ratios that are tried: so many thousandths."""


def choose(evidence: Evidence, keep: float, seed: int) -> PyramidDrop:
    """Return the policy with the largest ratio that holds the budget.

    Raises:
        ConfigError: one vision token an input in every stage is too many.
    """
    return PyramidDrop(ratio=largest_share(evidence, quarters(evidence.layers), keep, _STEPS))


METHOD = Method(
    "pyramid_drop",
    "PyramidDrop",
    "arXiv 2410.17247",
    choose,
    groups=("vision",),
    phases=("both",),
    looks="states",
    ours="the ratio follows from the budget, alike at every stage; the attention of a stage's last layer ranks, where "
    "published keys and queries are projected anew; published with a fine-tuned model too, here the backbone is frozen",
)
