"""Similarity of two layers' states as clouds of tokens: linear CKA and SVCCA, from sums that can be streamed.

They answer "is the geometric notion an artefact of cosine?". Links 1, 2 and 6b of the chain hold for cosine only: no
bound is drawn from what is here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from adaskip.errors import DataError
from adaskip.theory.intervals import Interval, jackknife

_PER_DIRECTION = 10  # tokens that each direction compared must rest on


@dataclass(frozen=True)
class Moments:
    """Hold sums over n tokens of states before (x) and after (y) a layer; add two to merge their tokens. float64."""

    n: Tensor  # ()
    x: Tensor  # (d) sum of x
    y: Tensor  # (d)
    xx: Tensor  # (d d) sum of x x^T
    yy: Tensor  # (d d)
    xy: Tensor  # (d d)

    @classmethod
    def of(cls, before: Tensor, after: Tensor, mask: Tensor | None = None) -> Moments:
        """Sum over the masked tokens: (... d) twice, bool (...) or None for all; values outside never matter.

        Raises DataError on shapes that do not fit.
        """
        if before.shape != after.shape or (mask is not None and mask.shape != before.shape[:-1]):
            shapes = ", ".join(str(tuple(t.shape)) for t in (before, after, mask) if t is not None)
            raise DataError(f"Moments: expected states of one shape (..., d) and a mask (...), got {shapes}")
        x, y = (h.flatten(0, -2) if mask is None else h[mask.bool()] for h in (before, after))
        x, y = x.double(), y.double()
        return cls(torch.tensor(float(len(x)), dtype=torch.float64), x.sum(0), y.sum(0), x.T @ x, y.T @ y, x.T @ y)

    def __add__(self, other: Moments) -> Moments:
        """Return the moments of both samples together."""
        return Moments(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __sub__(self, other: Moments) -> Moments:
        """Return the moments without those of a part."""
        return Moments(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(self)))

    def centred(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return covariances (d d) of x, of y, and between them.

        Raises DataError when there are fewer than two tokens or something is not finite.
        """
        n = self.n.item()
        if n < 2:
            raise DataError(f"similarity: expected at least 2 tokens, got {n:.0f}; the token group is empty or tiny")
        x, y = self.x / n, self.y / n
        parts = self.xx / n - x.outer(x), self.yy / n - y.outer(y), self.xy / n - x.outer(y)
        if not all(part.isfinite().all() for part in parts):
            raise DataError("similarity: the states are not finite; expected finite activations at this layer")
        return parts


def linear_cka(moments: Moments) -> float:
    """Return ||C_xy||_F^2 / (||C_xx||_F ||C_yy||_F) in [0, 1]: linear CKA (Kornblith et al. 2019); biased up.

    1 means equal up to rotation and one scale, so it is blind to both. NaN when either side does not vary.
    Raises DataError as `Moments.centred`.

    >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    >>> round(linear_cka(Moments.of(x, 3.0 * x.flip(1))), 6)
    1.0
    """
    xx, yy, xy = moments.centred()
    size = (xx.norm() * yy.norm()).item()
    return min(1.0, (xy.norm() ** 2).item() / size) if size > 0 else math.nan


def svcca(moments: Moments, kept: float = 0.99) -> float:
    """Return the mean canonical correlation of both sides' leading directions, in [0, 1]: SVCCA (Raghu et al. 2017).

    Each side keeps the principal directions that hold `kept` of its variance; correlations are averaged over the
    smaller number of directions. Blind to any invertible linear map between them; estimator, biased up. NaN when either
    side does not vary. Raises DataError when fewer than 10 tokens stand behind each direction (n independent
    directions of n tokens correlate perfectly whatever they are), or as `Moments.centred`.

    >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]]).repeat(10, 1)
    >>> round(svcca(Moments.of(x, x @ torch.tensor([[2.0, 1.0], [0.0, 1.0]]))), 6)
    1.0
    """
    xx, yy, xy = moments.centred()
    whiten = []
    for side in (xx, yy):
        values, vectors = torch.linalg.eigh(side)
        values, vectors = values.flip(0).clamp_min(0.0), vectors.flip(1)
        if values[0] <= 0:
            return math.nan
        rank = int((values.cumsum(0) < kept * values.sum()).sum()) + 1
        whiten.append(vectors[:, :rank] / values[:rank].sqrt())
    widest, narrowest = (pick(w.shape[1] for w in whiten) for pick in (max, min))
    if moments.n < _PER_DIRECTION * widest:
        raise DataError(
            f"svcca: expected at least {_PER_DIRECTION} tokens for each of {widest} directions, got "
            f"{int(moments.n)} tokens; give more inputs"
        )
    correlation = torch.linalg.svdvals(whiten[0].T @ xy @ whiten[1])
    mean: float = correlation.clamp(max=1.0)[:narrowest].mean().item()
    return mean


def dissimilarity(parts: list[Moments], name: str, level: float = 0.95) -> Interval:
    """Return 1 - linear CKA or 1 - SVCCA with a delete-a-group jackknife interval over groups of inputs.

    Args:
        parts: moments of disjoint groups of inputs, of about equal size.
        name: ``cka`` or ``svcca``.
        level: of the interval.

    Raises:
        DataError: fewer than three groups, or as `linear_cka` and `svcca`.
    """
    score = {"cka": linear_cka, "svcca": svcca}[name]
    if len(parts) < 3:
        raise DataError(f"dissimilarity: expected at least 3 groups of inputs, got {len(parts)}; give more inputs")
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    left_out = torch.tensor([1.0 - score(total - part) for part in parts], dtype=torch.float64)
    return jackknife(1.0 - score(total), left_out, level)
