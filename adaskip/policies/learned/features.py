"""What a router sees: the prompt's states, averaged over each kind of token apart."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor


def mean_weights(masks: Tensor) -> Tensor:
    """Masks bool (b k t), one per kind of token -> float32 (b k t) that sum to 1 over t, or to 0 without tokens."""
    weights = masks.float()
    return weights / rearrange(weights.sum(-1).clamp(min=1.0), "b k -> b k 1")


def pool(states: Tensor, weights: Tensor, padded: bool = True) -> Tensor:
    """Masked means of the states, one per kind of token: ``pooled[b, k] = sum_t weights[b, k, t] * states[b, t]``.

    Zeros where a row has no such token, so a row's features depend on its own tokens alone; states that no kind weighs
    (padding) may be anything, NaN included.

    Args:
        states: (b t d), any float type.
        weights: float32 (b k t), from `mean_weights`.
        padded: whether some position may be weighed by no kind; False spares a copy of the states.

    Returns:
        float32 (b k d).
    """
    weights = weights.to(states.device)
    states = states.float()
    if padded:
        states = states.masked_fill(rearrange((weights == 0).all(1), "b t -> b t 1"), 0.0)
    return torch.bmm(weights, states)
