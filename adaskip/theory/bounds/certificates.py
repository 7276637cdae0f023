"""When the likeliest token provably stays the same despite a skip (link 3d of docs/theory.md)."""

from __future__ import annotations

import torch
from torch import Tensor

from adaskip.theory.bounds.numerics import Real, centred_shift, f64


def argmax_certified_margin(logits: Tensor, logits_skipped: Tensor) -> Tensor:
    """Return True where max_y (dz_y - dz_top) < Z_top - Z_second, so the argmax stands (bound [D, link 3d]).

    (..., vocab) -> (...) bool. A hair of slack absorbs rounding: a tie is never certified. Errors as `logit_shift`.

    >>> argmax_certified_margin(torch.tensor([2.0, 0.0]), torch.tensor([1.5, 1.0])).item()
    True
    """
    x = centred_shift(logits, logits_skipped, torch.softmax(logits.double(), -1))
    (first, second), top = _top_two(logits)
    gap = first - second
    rise = (x - x.gather(-1, top)).amax(-1)
    size = gap + 2.0 * x.abs().amax(-1) + first.abs() + logits_skipped.double().gather(-1, top).squeeze(-1).abs()
    return rise < gap - 8.0 * torch.finfo(torch.float64).eps * size


def argmax_kl_limit(logits: Tensor) -> Tensor:
    """Return the KL, in nats, below which the argmax stands: p1 log(2 p1/(p1+p2)) + p2 log(2 p2/(p1+p2)).

    Bound [D, link 3d], attained by the p' that gives both the same share; 0 at a tie. (..., vocab) -> (...).

    >>> round(argmax_kl_limit(torch.tensor([2.0, 0.0])).item(), 4)
    0.3278
    """
    (first, second), _ = _top_two(logits)
    mass = (torch.stack([first, second], -1) - torch.logsumexp(logits.double(), -1, keepdim=True)).exp().sum(-1)
    gap = (first - second).clamp(max=80.0)
    # with p1/p2 = e^gap the formula is (p1+p2)/2 (gap tanh(gap/2) - 2 log cosh(gap/2)), which near-ties do not cancel
    return mass / 2.0 * (gap * torch.tanh(gap / 2.0) - 2.0 * torch.log1p(2.0 * torch.sinh(gap / 4.0) ** 2))


def argmax_certified_kl(logits: Tensor, kl: Real) -> Tensor:
    """Return True where KL < `argmax_kl_limit`, so the argmax stands (bound [D, link 3d]).

    `kl` (...) is the exact KL or a bound on it; a calibrated bound gives a decision that holds with its probability.
    (..., vocab) -> (...) bool.

    >>> argmax_certified_kl(torch.tensor([2.0, 0.0]), torch.tensor([0.1, 0.4])).tolist()
    [True, False]
    """
    return f64(kl) < argmax_kl_limit(logits) * (1.0 - 1e-12)


def _top_two(logits: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
    value, index = logits.double().topk(2, -1)
    return (value[..., 0], value[..., 1]), index[..., :1]
