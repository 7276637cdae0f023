"""What a router sees: the prompt's states, averaged over each kind of token apart."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor


def mean_weights(masks: Tensor) -> Tensor:
    """Turn masks bool (b k t), one a kind of token, into float32 (b k t) that sum to 1 over t; to 0 without tokens."""
    weights = masks.float()
    return weights / rearrange(weights.sum(-1).clamp(min=1.0), "b k -> b k 1")


def pool(states: Tensor, weights: Tensor, padded: bool = True) -> Tensor:
    """Average the states over each kind of token: ``pooled[b, k] = sum_t weights[b, k, t] * states[b, t]``.

    A kind that a row has no token of gives zeros, so a row's features depend on its own tokens alone. States of
    positions with weight 0 for every kind (padding) may be anything, NaN included.

    Args:
        states: (b t d), any float type.
        weights: float32 (b k t), from `mean_weights`.
        padded: whether some position may have weight 0 for every kind; False spares a copy of the states.

    Returns:
        float32 (b k d).
    """
    weights = weights.to(states.device)
    states = states.float()
    if padded:  # 0 times NaN would be NaN in the product
        states = states.masked_fill(rearrange((weights == 0).all(1), "b t -> b t 1"), 0.0)
    return torch.bmm(weights, states)
