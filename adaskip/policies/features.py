"""What a policy sees of a prompt: its states or their directions, averaged over each kind of token apart."""

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


def without_first(masks: Tensor, prompt: Tensor) -> Tensor:
    """Take the first prompt token out of masks bool (b k t), and add one of the last -> bool (b k+1 t).

    The first token's state is a hundred times larger than the others' in many language models, and the same for every
    prompt. A prompt of one token keeps it.

    Args:
        masks: one a kind of token.
        prompt: bool (b t).
    """
    place = prompt.cumsum(1)
    last = prompt & (place == place[:, -1:])
    rest = prompt & ((place > 1) | (place[:, -1:] == 1))
    return torch.cat([masks & rest[:, None], last[:, None]], 1)


def directions(states: Tensor) -> Tensor:
    """Bring every token's state (b t d) to norm 1; what is padding may stay NaN."""
    unit: Tensor = states.float() / states.float().norm(dim=-1, keepdim=True).clamp(min=1e-12)
    return unit


def describe_prompt(states: Tensor, prompt: Tensor) -> Tensor:
    """Return what a predictor reads of each prompt, float32 (b 2d): the mean of its tokens' directions, and the last's.

    Args:
        states: (b t d), any float type; what does not belong to a prompt may be anything, NaN included.
        prompt: bool (b t).
    """
    weights = mean_weights(without_first(prompt[:, None], prompt))
    return pool(directions(states), weights).flatten(1)
