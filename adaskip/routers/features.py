"""What a router sees: the prompt's states, averaged over each kind of token apart."""

from __future__ import annotations

import torch
from einops import einsum, rearrange
from torch import Tensor


def pool(states: Tensor, masks: Tensor) -> Tensor:
    """Masked means of the states, one per kind of token.

    ``pooled[b, k] = sum_t masks[b, k, t] * states[b, t] / sum_t masks[b, k, t]``; zeros where a row has no such token,
    so a row's features depend on its own tokens alone.

    Args:
        states: (b t d), any float type.
        masks: bool (b k t), one mask per kind of token (for instance text and vision).

    Returns:
        float32 (b k d).
    """
    weights = masks.float()
    # where, not a product: padded positions may hold NaN
    states = torch.where(rearrange(masks.any(1), "b t -> b t 1"), states.float(), 0.0)
    total = einsum(weights, states, "b k t, b t d -> b k d")
    return total / rearrange(weights.sum(-1).clamp(min=1.0), "b k -> b k 1")
