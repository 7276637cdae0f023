"""Leave out the last layers: the group leaves early. For vision tokens it is what VTW does."""

from __future__ import annotations

from adaskip.methods.budget import prefix
from adaskip.methods.evidence import Evidence
from adaskip.methods.method import Method
from adaskip.survey.greedy import Path


def choose(evidence: Evidence, keep: float, seed: int) -> Path:
    """Return the last layers."""
    return prefix(evidence, range(evidence.layers - 1, -1, -1), keep)


METHOD = Method("early_exit", "early exit (visual tokens withdrawal)", "arXiv 2405.05803; 2509.25584", choose)
