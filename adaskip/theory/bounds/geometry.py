"""What a cosine distance says about its tail, about distance, and about a band (links 1, 2, 6b of docs/theory.md)."""

from __future__ import annotations

from torch import Tensor

from adaskip.errors import ConfigError
from adaskip.theory.bounds.numerics import Real, f64


def proximal_from_geometric(eps: Real, delta: Real) -> Tensor:
    """Bound P(d > delta) [D, link 1], d >= 0 a cosine distance of mean eps: min(1, eps / delta). Cosine only.

    Raises ConfigError unless delta > 0.

    >>> round(proximal_from_geometric(0.01, 0.1).item(), 4)
    0.1
    """
    eps, delta = f64(eps), f64(delta)
    if (delta <= 0).any():
        raise ConfigError(f"proximal_from_geometric: expected delta > 0, got {delta.min().item()}")
    return (eps / delta).clamp(max=1.0)


def geometric_from_proximal(delta: Real, tau: Real) -> Tensor:
    """Bound the mean of a cosine distance d <= 2 with P(d > delta) <= tau [D, link 1]: delta + (2 - delta) tau.

    >>> round(geometric_from_proximal(0.1, 0.05).item(), 4)
    0.195
    """
    return f64(delta) + (2.0 - f64(delta)) * f64(tau)


def distance_sq(norm_u: Real, norm_v: Real, cos: Real) -> Tensor:
    """Return ||u - v||^2 = (||u|| - ||v||)^2 + 2 ||u|| ||v|| (1 - cos), an identity [D, link 2]: cosine ignores norms.

    >>> distance_sq(3.0, 4.0, 0.0).item()
    25.0
    """
    norm_u, norm_v = f64(norm_u), f64(norm_v)
    return (norm_u - norm_v) ** 2 + 2.0 * norm_u * norm_v * (1.0 - f64(cos))


def cosine_band(distances: Tensor) -> Tensor:
    """Bound the cosine distance from entry to exit of a band [D, link 6b]: min(2, (sum_l sqrt(d_l))^2). Cosine only.

    The metric is sqrt(1 - cos), so L neighbours at d may end up L^2 d apart. (..., L) -> (...).

    >>> import torch
    >>> round(cosine_band(torch.tensor([0.01, 0.01, 0.01])).item(), 4)
    0.09
    """
    return (f64(distances).sqrt().sum(-1) ** 2).clamp(max=2.0)
