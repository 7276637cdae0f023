"""Leave out nothing: the dense model, which stands in every comparison."""

from __future__ import annotations

from adaskip.methods.evidence import Evidence
from adaskip.methods.method import Method
from adaskip.survey.greedy import Path


def choose(evidence: Evidence, keep: float, seed: int) -> Path:
    """Return no layer, whatever the budget."""
    return ()


METHOD = Method("none", "dense model", "the backbone as it came", choose)
