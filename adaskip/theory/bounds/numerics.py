"""Numbers that neither overflow nor cancel: what the bounds are evaluated with, in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from adaskip.errors import DataError

Real = Tensor | float

HUGE = 1e75  # beyond it, and below its inverse, bounds are evaluated at the edge, on the safe side
_PHI_SERIES = [1.0 / math.factorial(k + 2) for k in range(15)]


def f64(value: Real) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64)


def centred_shift(before: Tensor, after: Tensor, p: Tensor) -> Tensor:
    """Return dz - E_p dz; entries outside the vocabulary sit at the mean, where they move neither extreme."""
    if before.shape != after.shape:
        raise DataError(f"expected two logits (..., vocab) of one shape, got {(*before.shape,)} and {(*after.shape,)}")
    absent = (before == -torch.inf) & (after == -torch.inf)
    dz = (after.double() - before.double()).masked_fill(absent, 0.0)
    # from the likeliest entry, whose distance to the mean would cancel in a near-deterministic softmax
    dz = dz - dz.gather(-1, p.argmax(-1, keepdim=True))
    return (dz - (p * dz).sum(-1, keepdim=True)).masked_fill(absent, 0.0)


def log_phi(x: Tensor) -> Tensor:
    """Return log[(e^x - 1 - x) / x^2], -log 2 at 0: a series near 0, no overflow far from it."""
    t, series = x.where(x.abs() < 0.5, 0.0), torch.zeros_like(x)
    for coefficient in reversed(_PHI_SERIES):
        series = series * t + coefficient
    up, down = x.where(x >= 0.5, 1.0), (-x).where(x <= -0.5, 1.0)
    above = up + torch.log1p(-(1.0 + up) * torch.exp(-up)) - 2.0 * up.log()
    below = (down + torch.expm1(-down)).log() - 2.0 * down.log()
    return torch.where(x >= 0.5, above, torch.where(x <= -0.5, below, series.log()))


def log1p_s2_phi(s: Tensor, x: Tensor) -> Tensor:
    exponent = 2.0 * s.clamp(1.0 / HUGE, HUGE).log() + log_phi(x.clamp(-HUGE, HUGE))
    value = torch.logaddexp(torch.zeros_like(exponent), exponent)
    return torch.where(s > 0, torch.where(x < HUGE, value, x), s**2 / 2.0)


def two_point(variance: Tensor, u: Tensor) -> Tensor:
    """Return `kl_two_point` from s^2: log(1 + s^2 (a phi(-a) + u phi(u)) / (a + u)), a = s^2/u; nothing cancels."""
    v, top = variance.clamp(HUGE**-2, HUGE**2), u.clamp(1.0 / HUGE, HUGE)
    log_mean = torch.logaddexp(v.log() + log_phi(-v / top), 2.0 * top.log() + log_phi(top)) - (v + top**2).log()
    value = torch.logaddexp(torch.zeros_like(log_mean), v.log() + log_mean)
    # where nothing is skipped the value is 0 and the slope in s^2 that of s^2/2
    return torch.where(variance > 0, torch.where(u < HUGE, torch.minimum(value, u), u), variance / 2.0)
