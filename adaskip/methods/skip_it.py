"""Skip-It: leave out layers straight from the theory's verdicts, those first that hold every condition most clearly."""

from __future__ import annotations

from adaskip.methods.budget import prefix
from adaskip.methods.evidence import Evidence
from adaskip.methods.method import Method
from adaskip.survey.greedy import Path
from adaskip.theory.conditions import Findings

TOLERANCE = 0.05
"""Nats per predicted token that one skip may cost: what the conditions' thresholds follow from."""
_CLASSES = ("admissible", "undecided", "inadmissible")


def rank(findings: Findings) -> list[int]:
    """Return the layers by their verdict, and within one by the condition that comes nearest to failing, or fails most.

    A condition fails by its estimate over its threshold.
    """

    def place(layer: int) -> tuple[int, float]:
        excess = [row.estimate / max(row.threshold, 1e-12) for row in findings.rows if row.layer == layer]
        return _CLASSES.index(findings.layers[layer]), max(excess)

    return sorted(findings.layers, key=place)


def choose(evidence: Evidence, keep: float, seed: int) -> Path:
    """Return the layers that the conditions admit first."""
    return prefix(evidence, rank(evidence.findings(TOLERANCE)), keep)


METHOD = Method(
    "skip_it",
    "Skip-It conditions",
    "arXiv 2509.25584",
    choose,
    looks="costs",
    ours="the order of layers within a verdict, by the condition that fails most; where the budget asks for more "
    "layers than are admissible it takes undecided, then inadmissible ones",
)
