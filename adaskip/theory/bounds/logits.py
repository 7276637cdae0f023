"""From a shift of the logits to KL, total variation and risk (links 3 and 10 of docs/theory.md)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adaskip.theory.bounds.numerics import HUGE, Real, centred_shift, f64, log1p_s2_phi, two_point


@dataclass(frozen=True)
class LogitShift:
    """Hold the spread of dz, per prediction: in nats, non-negative, blind to a constant added to dz."""

    r: Tensor  # (...) max dz - min dz
    s: Tensor  # (...) standard deviation of dz under p
    u: Tensor  # (...) max dz - E_p dz
    b: Tensor  # (...) E_p dz - min dz


def logit_shift(logits: Tensor, logits_skipped: Tensor, reference: Tensor | None = None) -> LogitShift:
    """Measure the spread of dz = logits_skipped - logits [D, link 3]. (..., vocab) -> four (...).

    p is the softmax of `reference`, by default of `logits`; along a path it stays the dense logits. An entry -inf in
    both is outside the vocabulary; -inf in one alone gives NaN. Raises DataError if the two shapes differ.

    >>> shift = logit_shift(torch.zeros(2), torch.tensor([1.0, -1.0]))
    >>> [x.item() for x in (shift.r, shift.s, shift.u, shift.b)]
    [2.0, 1.0, 1.0, 1.0]
    """
    p = torch.softmax((logits if reference is None else reference).double(), -1)
    x = centred_shift(logits, logits_skipped, p)
    u, b = x.amax(-1), -x.amin(-1)
    r, s = u + b, (p * x**2).sum(-1).sqrt()
    # probabilities underflow to 0 beside a logit 745 higher; a shift that only they feel must not look like none
    return LogitShift(r=r, s=s.clamp_min(1.0 / HUGE).where(r > 0, s), u=u, b=b)


def kl_exact(logits: Tensor, logits_skipped: Tensor) -> Tensor:
    """Return KL = log E_p exp(dz - E_p dz), an identity [D, link 3a]; >= 0, differentiable. (..., vocab) -> (...).

    Summed as E_p[e^w - 1 - w], w = log(p'/p): no term is negative, so a KL far below 1e-16 keeps its digits.
    -inf and errors as in `logit_shift`.

    >>> round(kl_exact(torch.zeros(2), torch.tensor([1.0, -1.0])).item(), 4)
    0.4338
    """
    log_p = torch.log_softmax(logits.double(), -1)
    p = log_p.exp()
    x = centred_shift(logits, logits_skipped, p)
    w = x - torch.logsumexp(log_p + x, -1, keepdim=True) + torch.logsumexp(log_p, -1, keepdim=True)
    tiny = w**2 * (1 / 2 + w * (1 / 6 + w * (1 / 24 + w / 120)))
    near = p * torch.where(w.abs() < 1e-3, tiny, torch.expm1(w.clamp(max=1.0)) - w)
    far = (log_p + w).exp() - p * (1.0 + w)
    return torch.where(w < 1.0, near, far).sum(-1).clamp_min(0.0)


def kl_two_point(s: Real, u: Real) -> Tensor:
    """Bound KL [D, link 3b] by log[(u^2 e^(-s^2/u) + s^2 e^u) / (u^2 + s^2)], at most u. For s, u >= 0.

    The two-point Bennett bound: attained when dz takes two values, hence the best from s and u; increasing in both.
    Exactly 0 at s = 0 or u = 0, with finite gradients everywhere.

    >>> round(kl_two_point(1.0, 1.0).item(), 4), kl_two_point(0.0, 3.0).item()
    (0.4338, 0.0)
    """
    s = f64(s)
    return two_point(s.clamp_min(1.0 / HUGE).where(s > 0, s) ** 2, f64(u))


def kl_bennett(s: Real, u: Real) -> Tensor:
    """Bound KL [D, link 3b] by log(1 + s^2 phi(u)), phi(u) = (e^u - 1 - u) / u^2; `kl_two_point` is never above it.

    >>> round(kl_bennett(1.0, 1.0).item(), 4)
    0.5413
    """
    return log1p_s2_phi(f64(s), f64(u))


def kl_range(r: Real) -> Tensor:
    """Bound KL [D, link 3b] from the range of dz alone, by r^2 / 8 (Hoeffding's lemma).

    >>> kl_range(2.0).item()
    0.5
    """
    return f64(r) ** 2 / 8.0


def kl_lower(s: Real, b: Real) -> Tensor:
    """Bound KL from below [D, link 3b]: KL >= log(1 + s^2 phi(-b)), phi as in `kl_bennett`.

    >>> round(kl_lower(1.0, 1.0).item(), 4)
    0.3133
    """
    return log1p_s2_phi(f64(s), -f64(b))


def kl_quadratic(s: Real) -> Tensor:
    """Estimate KL to second order [D, link 3b]: s^2 / 2. No bound: often below the exact value.

    >>> kl_quadratic(2.0).item()
    2.0
    """
    return f64(s) ** 2 / 2.0


def tv_from_range(r: Real) -> Tensor:
    """Bound the total variation between p and p', in [0, 1], by tanh(r / 4) [D, link 3b]; two classes attain it.

    >>> round(tv_from_range(4.0).item(), 4)
    0.7616
    """
    return torch.tanh(f64(r) / 4.0)


def tv_from_kl(kl: Real) -> Tensor:
    """Bound the total variation from KL [D, link 3c], by min(sqrt(KL / 2), sqrt(1 - e^-KL)).

    Pinsker's and Bretagnolle and Huber's inequalities; the first is smaller below 1.6 nats.

    >>> round(tv_from_kl(0.02).item(), 4)
    0.1
    """
    kl = f64(kl)
    return torch.minimum((kl / 2.0).sqrt(), (-torch.expm1(-kl)).sqrt())


def kl_for_accuracy(points: Real) -> Tensor:
    """Return the nats of KL that cost at most so many points of accuracy: max(2 d^2, -log(1 - d^2)), d = points / 100.

    Bound [D, link 3c], the inverse of `tv_from_kl`: where the mean KL per predicted token is no more, tokens *sampled*
    from p' are right less often, by at most `points` percentage points, than tokens sampled from p (by concavity also
    on average over inputs). Strict for small d: greedy accuracy usually moves far less.

    >>> round(kl_for_accuracy(1.0).item(), 6), round(kl_for_accuracy(10.0).item(), 4)
    (0.0002, 0.02)
    """
    d = f64(points) / 100.0
    return torch.maximum(2.0 * d**2, -torch.log1p(-(d**2)))


def risk_shift(tv: Real, B: Real) -> Tensor:
    """Bound |R - R'|, in the loss's unit, by B tv [D, link 3c].

    For losses in [0, B] of predictions *sampled* from p and p'; it says nothing about argmax decisions.

    >>> risk_shift(0.25, 2.0).item()
    0.5
    """
    return f64(B) * f64(tv)


def kl_sequence(kl: Tensor, predicted: Tensor) -> Tensor:
    """Sum KL along an answer, in nats: its mean over dense answers is the KL of whole answers.

    Identity [D, link 10] (chain rule): KL(P, P') = E_{Y ~ P} sum_t KL(P(.|Y_<t), P'(.|Y_<t)), up to and with the end
    token, the skipping model on its own cache. kl (b t), predicted bool (b t) -> (b,).

    >>> kl_sequence(torch.tensor([[0.5, 0.25, 9.0]]), torch.tensor([[True, True, False]])).tolist()
    [0.75]
    """
    return f64(kl).masked_fill(~predicted, 0.0).sum(-1)
