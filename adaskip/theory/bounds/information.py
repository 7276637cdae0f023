"""From KL to the information that a skip loses, and from coding errors to entropy (links 4, 5 of docs/theory.md)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from adaskip.errors import ConfigError
from adaskip.theory.bounds.numerics import Real, f64


def information_lost(probabilities: Tensor, cells: Tensor) -> Tensor:
    """Return I(Y*; H | H') over n equally likely inputs: the mean of KL(p_i, mean p of i's cell). (n, K), (n,) -> ().

    Y* ~ p_i is a fresh label; inputs of one cell (an integer) share the state H' left after skipping. Identity
    [D, link 4]: E KL(p, q) = I + E KL(cell mean, q) for any q that sees the cell alone, so I <= the functional cost.

    >>> round(information_lost(torch.eye(2), torch.tensor([0, 0])).item(), 4)
    0.6931
    """
    p, cell = f64(probabilities), cells.unique(return_inverse=True)[1]
    count = cell.bincount()
    mean = (p.new_zeros(len(count), p.shape[-1]).index_add(0, cell, p) / count.unsqueeze(-1))[cell]
    return (torch.xlogy(p, p) - torch.xlogy(p, mean)).sum(-1).mean().clamp_min(0.0)


def fano(p_error: Real, K: int) -> Tensor:
    """Bound H(Q_l | Q_{l-1}) over K codes [D, link 5] by h_b(P_e) + P_e log(K - 1), P_e = P(Q_l != Q_{l-1}).

    Raises ConfigError if K < 2.

    >>> round(fano(0.5, 2).item(), 4)
    0.6931
    """
    if K < 2:
        raise ConfigError(f"fano: expected K >= 2 codes, got {K}")
    p = f64(p_error)
    bound: Tensor = torch.special.entr(p) + torch.special.entr(1.0 - p) + p * math.log(K - 1)
    return bound
