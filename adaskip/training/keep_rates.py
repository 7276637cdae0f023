"""Keep rates by layer and kind of input, reduced across ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

OTHER = "other"
"""What inputs of a kind that was not announced count as."""


class KeepByKind(Metric):
    """Count how often each layer ran, for each kind of input.

    Args:
        n_layers: l.
        kinds: the labels inputs may carry, text or numbers; inputs of another label, or of none, count as ``other``.
            Ranks add up their counts by place, so that the labels must be known beforehand.
    """

    full_state_update = False
    kept: Tensor
    seen: Tensor

    def __init__(self, n_layers: int, kinds: Sequence[Any]) -> None:
        super().__init__()
        self.kinds = tuple(dict.fromkeys([*map(str, kinds), OTHER]))
        self.add_state("kept", torch.zeros(len(self.kinds), n_layers, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("seen", torch.zeros(len(self.kinds), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, keep: Tensor, kinds: Sequence[Any]) -> None:
        """Count a batch: keeps, or shares of tokens that keep, (l b), and the b labels."""
        for row, kind in zip(keep.T.to(self.kept), kinds, strict=True):
            place = self.kinds.index(str(kind) if str(kind) in self.kinds else OTHER)
            self.kept[place] += row
            self.seen[place] += 1

    def compute(self) -> dict[str, Tensor]:
        """Return float64 (l) for each kind that occurred: the share of its inputs that ran each layer."""
        return {kind: self.kept[i] / self.seen[i] for i, kind in enumerate(self.kinds) if self.seen[i]}
