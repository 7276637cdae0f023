"""Hold what a policy skips against what the theory admits: does it choose the layers that are called redundant?"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from scipy import stats
from torch import Tensor

from adaskip.errors import DataError
from adaskip.theory.intervals import Interval, paired_difference
from adaskip.theory.measures import spearman

_DRAWS = 9999
"""Permutations that a p-value rests on; the least it can be is one in so many and one."""


@dataclass(frozen=True)
class Agreement:
    """Hold how a policy's skips agree with the theory; None where it skips nothing on one side."""

    jaccard: float  # of what it skips and what is admitted, weighted by how often it skips; in [0, 1]
    spearman: float | None  # over layers, of how often it skips one and how little that alone costs
    inside: float | None  # mean exact cost alone of its skips that are admitted, nats per predicted token
    outside: float | None  # of those that are not
    difference: Interval | None  # outside minus inside, paired over inputs
    p: float | None  # one-sided, of no difference of the means (paired permutations over inputs)

    def to_dict(self) -> dict[str, Any]:
        """Return it JSON-ready."""
        return asdict(self)


def agree(skipped: Tensor, admitted: Iterable[int], cost: Tensor, level: float = 0.95) -> Agreement:
    """Compare a policy with the verdicts.

    Args:
        skipped: (l) the share of inputs that leave out each layer.
        admitted: the admissible layers.
        cost: (n l) exact cost of leaving out each layer alone, of inputs that neither policy nor verdicts were fitted
            on, nats per predicted token.
        level: of the interval.

    Raises:
        DataError: shapes that do not belong together.
    """
    if cost.dim() != 2 or skipped.shape != cost.shape[1:]:
        raise DataError(f"agree: expected costs (n l) and a share (l), got {tuple(cost.shape)}, {tuple(skipped.shape)}")
    skipped, cost = skipped.double(), cost.double()
    admits = torch.zeros_like(skipped)
    admits[list(admitted)] = 1.0
    union = float(torch.maximum(skipped, admits).sum())
    jaccard = float(torch.minimum(skipped, admits).sum()) / union if union else 1.0
    rank = spearman(skipped, -cost.mean(0)) if skipped.unique().numel() > 1 else None
    sides = [skipped * admits, skipped * (1 - admits)]
    means = [cost @ weight / weight.sum() if float(weight.sum()) > 0 else None for weight in sides]
    inside, outside = means
    difference = p = None
    if inside is not None and outside is not None:
        difference = paired_difference(outside, inside, level)
        # of the means, which verdicts speak of: one layer may cost most inputs nothing, and a few of them much
        test = stats.permutation_test(
            (outside.numpy(), inside.numpy()),
            lambda a, b, axis: (a - b).mean(axis),
            permutation_type="samples",
            alternative="greater",
            n_resamples=_DRAWS,
            random_state=0,
        )
        p = float(test.pvalue)
    first, second = (None if mean is None else float(mean.mean()) for mean in means)
    return Agreement(jaccard, rank, first, second, difference, p)
