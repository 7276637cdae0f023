"""Leave out the first layers: the group enters late. For vision tokens it is what DeepInsert does."""

from __future__ import annotations

from adaskip.methods.budget import prefix
from adaskip.methods.evidence import Evidence
from adaskip.methods.method import Method
from adaskip.survey.greedy import Path


def choose(evidence: Evidence, keep: float, seed: int) -> Path:
    """Return the first layers."""
    return prefix(evidence, range(evidence.layers), keep)


METHOD = Method("late_entry", "late entry (DeepInsert)", "arXiv 2504.19327; 2509.25584", choose)
