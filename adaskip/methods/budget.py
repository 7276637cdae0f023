"""Hold a budget: as few layers as it takes go, in a method's order."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from adaskip.errors import ConfigError
from adaskip.methods.evidence import Evidence
from adaskip.survey.greedy import Path


def first_that_holds(evidence: Evidence, paths: Iterable[Path], keep: float) -> Path:
    """Return the first path that keeps no more than the budget.

    Raises:
        ConfigError: none does.
    """
    least = 1.0
    for path in paths:
        if evidence.holds(path, keep):
            return tuple(sorted(path))
        least = min(least, evidence.keeps(path))
    raise ConfigError(f"keep={keep:g}: expected at least {least:.3f}, which is the least that this method can keep")


def prefix(evidence: Evidence, order: Sequence[int], keep: float) -> Path:
    """Return the fewest first layers of an order that hold the budget."""
    return first_that_holds(evidence, (tuple(order[:count]) for count in range(len(order) + 1)), keep)
