"""Keep rates by layer and kind of input, reduced across ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric


class KeepByKind(Metric):
    """How often each layer ran, for each kind of input.

    Args:
        n_layers: l.
        kinds: the labels inputs may carry; inputs of another label are not counted.
    """

    full_state_update = False
    kept: Tensor
    seen: Tensor

    def __init__(self, n_layers: int, kinds: Sequence[str]) -> None:
        super().__init__()
        self.kinds = tuple(kinds)
        self.add_state("kept", torch.zeros(len(self.kinds), n_layers, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("seen", torch.zeros(len(self.kinds), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, keep: Tensor, kinds: Sequence[str]) -> None:
        """Count a batch: keeps, or shares of tokens that keep, (l b), and the b labels."""
        for row, kind in zip(keep.T.to(self.kept), kinds, strict=True):
            if kind in self.kinds:
                self.kept[self.kinds.index(kind)] += row
                self.seen[self.kinds.index(kind)] += 1

    def compute(self) -> dict[str, Tensor]:
        """float64 (l) per kind that occurred: the share of its inputs that ran each layer."""
        return {kind: self.kept[i] / self.seen[i] for i, kind in enumerate(self.kinds) if self.seen[i]}
