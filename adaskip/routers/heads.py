"""The learned part: one small head per decoder layer."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn


class RouterHead(nn.Module):
    """Pooled features of one layer's input -> the logit of running that layer.

    LayerNorm of each pooled state -> Linear -> GELU -> Linear. The last layer starts at zero with bias ``keep_bias``,
    so that an untrained router keeps every layer for every input.

    Args:
        width: d, the backbone's hidden size.
        kinds: k, how many kinds of token are pooled apart.
        hidden: width of the hidden layer.
        keep_bias: the logit before training.
    """

    def __init__(self, width: int, kinds: int, hidden: int, keep_bias: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inner = nn.Linear(kinds * width, hidden)
        self.outer = nn.Linear(hidden, 1)
        nn.init.zeros_(self.outer.weight)
        nn.init.constant_(self.outer.bias, keep_bias)

    def forward(self, pooled: Tensor) -> Tensor:
        """float32 (b k d) -> float32 (b)."""
        return self.outer(self.features(pooled)).squeeze(-1).to(pooled.device)

    def features(self, pooled: Tensor) -> Tensor:
        """float32 (b k d) -> float32 (b hidden): what the last layer reads."""
        normed = rearrange(self.norm(pooled.to(self.inner.weight.device)), "b k d -> b (k d)")
        return nn.functional.gelu(self.inner(normed))


def build_heads(n_layers: int, width: int, kinds: int, hidden: int, keep_bias: float, seed: int) -> nn.ModuleList:
    """One head per layer, the same for the same seed whatever else drew random numbers before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.ModuleList(RouterHead(width, kinds, hidden, keep_bias) for _ in range(n_layers))
