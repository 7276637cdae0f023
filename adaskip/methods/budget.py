"""Hold a budget: as few layers as it takes go, in a method's order."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

from adaskip.errors import ConfigError
from adaskip.methods.evidence import Evidence
from adaskip.survey.greedy import Path
from adaskip.survey.static import ROUNDING


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


def largest_share(evidence: Evidence, stages: Sequence[int], keep: float, steps: int | None = None) -> float:
    """Return the largest share that holds the budget where it is what stays of the vision tokens at each stage.

    Args:
        evidence: of group ``vision``.
        stages: the layers, ascending, that a further share of the tokens no longer enters.
        keep: the budget.
        steps: shares of so many steps are tried; None: a token more or less of the input that has most.

    Raises:
        ConfigError: there is no vision token, or one behind the first stage is too many.
    """
    if not len(evidence.patches):
        raise ConfigError(f"keep={keep:g}: no input that it chooses by has a picture, so that no vision token can go")
    saves = [float(evidence.saves[a:b].sum()) for a, b in pairwise((*stages, evidence.layers))]  # dropping all tokens

    def kept(share: float) -> float:
        gone, there = 0.0, evidence.patches
        for saved in saves:
            there = (share * there - 1e-9).ceil()
            gone += saved * float((1 - there / evidence.patches).mean())
        return 1 - gone

    steps = steps or int(evidence.patches.max())
    for count in range(steps, 0, -1):
        if kept(count / steps) <= keep + ROUNDING:
            return count / steps
    raise ConfigError(
        f"keep={keep:g}: expected at least {kept(1 / steps):.3f}, with one vision token behind layer {stages[0]}"
    )
