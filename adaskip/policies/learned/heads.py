"""The learned part: one small head per decoder layer."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn


class Standard(nn.Module):
    """Centre and scale features (b k d) by what `adaskip.survey.standardise` measured; as they are until then."""

    centre: Tensor  # float32 (k d)
    scale: Tensor  # float32 (k d)

    def __init__(self, kinds: int, width: int) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(kinds, width))
        self.register_buffer("scale", torch.ones(kinds, width))

    def forward(self, pooled: Tensor) -> Tensor:
        """Return the features with mean 0 and variance 1 over the inputs that they were measured on."""
        return (pooled - self.centre) / self.scale


class RouterHead(nn.Module):
    """Turn pooled features of one layer's input into the logit of running that layer.

    LayerNorm of each pooled state, or `Standard` -> Linear -> GELU -> Linear; without a hidden layer the last Linear
    alone. It starts at zero with bias ``keep_bias``, so that an untrained router keeps every layer for every input.

    Args:
        width: d, the backbone's hidden size.
        kinds: k, how many kinds of token are pooled apart.
        hidden: width of the hidden layer; 0: none.
        keep_bias: the logit before training.
        standard: standardise the features, in place of a LayerNorm.
    """

    def __init__(self, width: int, kinds: int, hidden: int, keep_bias: float, standard: bool = False) -> None:
        super().__init__()
        self.norm = Standard(kinds, width) if standard else nn.LayerNorm(width)
        self.inner = nn.Linear(kinds * width, hidden) if hidden else None
        self.outer = nn.Linear(hidden or kinds * width, 1)
        nn.init.zeros_(self.outer.weight)
        nn.init.constant_(self.outer.bias, keep_bias)

    def _apply(self, fn: Any, recurse: bool = True) -> RouterHead:
        """Follow to another device but not to another precision: a decision is a comparison with a threshold."""

        def moved(weight: Tensor) -> Tensor:
            after = fn(weight)
            return after if after.dtype == weight.dtype else weight.to(after.device)

        super()._apply(moved, recurse)
        return self

    def forward(self, pooled: Tensor) -> Tensor:
        """Return one logit a row: float32 (b k d) -> float32 (b)."""
        with torch.autocast(pooled.device.type, enabled=False):
            logits: Tensor = self.outer(self.features(pooled)).squeeze(-1).to(pooled.device)
            return logits

    def features(self, pooled: Tensor) -> Tensor:
        """Return what the last layer reads: float32 (b k d) -> float32 (b hidden), without a hidden layer (b k*d)."""
        pooled = pooled.to(self.outer.weight.device)
        with torch.autocast(pooled.device.type, enabled=False):
            normal = rearrange(self.norm(pooled), "b k d -> b (k d)")
            return normal if self.inner is None else nn.functional.gelu(self.inner(normal))


def build_heads(
    n_layers: int, width: int, kinds: int, hidden: int, keep_bias: float, seed: int, standard: bool = False
) -> nn.ModuleList:
    """Build one head per layer, the same for the same seed, whatever else drew random numbers before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.ModuleList(RouterHead(width, kinds, hidden, keep_bias, standard) for _ in range(n_layers))
