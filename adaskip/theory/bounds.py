"""The chain from geometry to information: bounds, identities and estimators as pure functions.

Z are dense logits, p = softmax(Z); Z' and p' the same after skipping; dz = Z' - Z; KL = KL(p, p'), always in nats.
The notions named geometric, proximal, functional and informational are the paper's [P]; every formula is ours [D].
"Real" arguments are tensors or floats that broadcast. Results are float64 unless a docstring says otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adaskip.errors import ConfigError, DataError

Real = Tensor | float

_HUGE = 1e75  # beyond it, and below its inverse, bounds are evaluated at the edge, on the safe side
_PHI_SERIES = [1.0 / math.factorial(k + 2) for k in range(15)]


@dataclass(frozen=True)
class LogitShift:
    """How far dz spreads, per prediction: in nats, non-negative, blind to a constant added to dz."""

    r: Tensor  # (...) max dz - min dz
    s: Tensor  # (...) standard deviation of dz under p
    u: Tensor  # (...) max dz - E_p dz
    b: Tensor  # (...) E_p dz - min dz


# Links 1, 2, 6b: geometry


def proximal_from_geometric(eps: Real, delta: Real) -> Tensor:
    """Bound [D, link 1] on P(d > delta), d >= 0 a cosine distance of mean eps: min(1, eps / delta). Cosine only.

    Raises ConfigError unless delta > 0.

    >>> round(proximal_from_geometric(0.01, 0.1).item(), 4)
    0.1
    """
    eps, delta = _f64(eps), _f64(delta)
    if (delta <= 0).any():
        raise ConfigError(f"proximal_from_geometric: expected delta > 0, got {delta.min().item()}")
    return (eps / delta).clamp(max=1.0)


def geometric_from_proximal(delta: Real, tau: Real) -> Tensor:
    """Bound [D, link 1] on the mean of a cosine distance d <= 2 with P(d > delta) <= tau: delta + (2 - delta) tau.

    >>> round(geometric_from_proximal(0.1, 0.05).item(), 4)
    0.195
    """
    return _f64(delta) + (2.0 - _f64(delta)) * _f64(tau)


def distance_sq(norm_u: Real, norm_v: Real, cos: Real) -> Tensor:
    """Identity [D, link 2]: ||u - v||^2 = (||u|| - ||v||)^2 + 2 ||u|| ||v|| (1 - cos). Cosine alone ignores norms.

    >>> distance_sq(3.0, 4.0, 0.0).item()
    25.0
    """
    norm_u, norm_v = _f64(norm_u), _f64(norm_v)
    return (norm_u - norm_v) ** 2 + 2.0 * norm_u * norm_v * (1.0 - _f64(cos))


def cosine_band(distances: Tensor) -> Tensor:
    """Bound [D, link 6b] on the cosine distance from entry to exit of a band: min(2, (sum_l sqrt(d_l))^2). Cosine only.

    The metric is sqrt(1 - cos), so L neighbours at d may end up L^2 d apart. (..., L) -> (...).

    >>> round(cosine_band(torch.tensor([0.01, 0.01, 0.01])).item(), 4)
    0.09
    """
    return (_f64(distances).sqrt().sum(-1) ** 2).clamp(max=2.0)


# Link 3: logits to information


def logit_shift(logits: Tensor, logits_skipped: Tensor, reference: Tensor | None = None) -> LogitShift:
    """The spread of dz = logits_skipped - logits [D, link 3]. (..., vocab) -> four (...).

    p is the softmax of `reference`, by default of `logits`; along a path it stays the dense logits. An entry -inf in
    both is outside the vocabulary; -inf in one alone gives NaN. Raises DataError if the two shapes differ.

    >>> shift = logit_shift(torch.zeros(2), torch.tensor([1.0, -1.0]))
    >>> [x.item() for x in (shift.r, shift.s, shift.u, shift.b)]
    [2.0, 1.0, 1.0, 1.0]
    """
    p = torch.softmax((logits if reference is None else reference).double(), -1)
    x = _centred_shift(logits, logits_skipped, p)
    u, b = x.amax(-1), -x.amin(-1)
    r, s = u + b, (p * x**2).sum(-1).sqrt()
    # probabilities underflow to 0 beside a logit 745 higher; a shift that only they feel must not look like none
    return LogitShift(r=r, s=s.clamp_min(1.0 / _HUGE).where(r > 0, s), u=u, b=b)


def kl_exact(logits: Tensor, logits_skipped: Tensor) -> Tensor:
    """KL = log E_p exp(dz - E_p dz), an identity [D, link 3a]; >= 0, differentiable. (..., vocab) -> (...).

    Summed as E_p[e^w - 1 - w], w = log(p'/p): no term is negative, so a KL far below 1e-16 keeps its digits.
    -inf and errors as in `logit_shift`.

    >>> round(kl_exact(torch.zeros(2), torch.tensor([1.0, -1.0])).item(), 4)
    0.4338
    """
    log_p = torch.log_softmax(logits.double(), -1)
    p = log_p.exp()
    x = _centred_shift(logits, logits_skipped, p)
    w = x - torch.logsumexp(log_p + x, -1, keepdim=True) + torch.logsumexp(log_p, -1, keepdim=True)
    tiny = w**2 * (1 / 2 + w * (1 / 6 + w * (1 / 24 + w / 120)))
    near = p * torch.where(w.abs() < 1e-3, tiny, torch.expm1(w.clamp(max=1.0)) - w)
    far = (log_p + w).exp() - p * (1.0 + w)
    return torch.where(w < 1.0, near, far).sum(-1).clamp_min(0.0)


def kl_two_point(s: Real, u: Real) -> Tensor:
    """Bound [D, link 3b] on KL: log[(u^2 e^(-s^2/u) + s^2 e^u) / (u^2 + s^2)], at most u. For s, u >= 0.

    The two-point Bennett bound: attained when dz takes two values, hence the best from s and u; increasing in both.
    Exactly 0 at s = 0 or u = 0, with finite gradients everywhere.

    >>> round(kl_two_point(1.0, 1.0).item(), 4), kl_two_point(0.0, 3.0).item()
    (0.4338, 0.0)
    """
    s = _f64(s)
    return _two_point(s.clamp_min(1.0 / _HUGE).where(s > 0, s) ** 2, _f64(u))


def kl_bennett(s: Real, u: Real) -> Tensor:
    """Bound [D, link 3b] on KL: log(1 + s^2 phi(u)), phi(u) = (e^u - 1 - u) / u^2; `kl_two_point` is never above it.

    >>> round(kl_bennett(1.0, 1.0).item(), 4)
    0.5413
    """
    return _log1p_s2_phi(_f64(s), _f64(u))


def kl_range(r: Real) -> Tensor:
    """Bound [D, link 3b] on KL from the range of dz alone: r^2 / 8 (Hoeffding's lemma).

    >>> kl_range(2.0).item()
    0.5
    """
    return _f64(r) ** 2 / 8.0


def kl_lower(s: Real, b: Real) -> Tensor:
    """Bound from below [D, link 3b]: KL >= log(1 + s^2 phi(-b)), phi as in `kl_bennett`.

    >>> round(kl_lower(1.0, 1.0).item(), 4)
    0.3133
    """
    return _log1p_s2_phi(_f64(s), -_f64(b))


def kl_quadratic(s: Real) -> Tensor:
    """Estimator [D, link 3b] of KL to second order: s^2 / 2. No bound: often below the exact value.

    >>> kl_quadratic(2.0).item()
    2.0
    """
    return _f64(s) ** 2 / 2.0


def tv_from_range(r: Real) -> Tensor:
    """Bound [D, link 3b] on the total variation between p and p', in [0, 1]: tanh(r / 4); two classes attain it.

    >>> round(tv_from_range(4.0).item(), 4)
    0.7616
    """
    return torch.tanh(_f64(r) / 4.0)


def risk_shift(tv: Real, B: Real) -> Tensor:
    """Bound [D, link 3c] on |R - R'|, in the loss's unit: B tv.

    For losses in [0, B] of predictions *sampled* from p and p'; it says nothing about argmax decisions.

    >>> risk_shift(0.25, 2.0).item()
    0.5
    """
    return _f64(B) * _f64(tv)


# Link 3d: argmax certificates


def argmax_certified_margin(logits: Tensor, logits_skipped: Tensor) -> Tensor:
    """True where max_y (dz_y - dz_top) < Z_top - Z_second, so the argmax stands (bound [D, link 3d]).

    (..., vocab) -> (...) bool. A hair of slack absorbs rounding: a tie is never certified. Errors as `logit_shift`.

    >>> argmax_certified_margin(torch.tensor([2.0, 0.0]), torch.tensor([1.5, 1.0])).item()
    True
    """
    x = _centred_shift(logits, logits_skipped, torch.softmax(logits.double(), -1))
    (first, second), top = _top_two(logits)
    gap = first - second
    rise = (x - x.gather(-1, top)).amax(-1)
    size = gap + 2.0 * x.abs().amax(-1) + first.abs() + logits_skipped.double().gather(-1, top).squeeze(-1).abs()
    return rise < gap - 8.0 * torch.finfo(torch.float64).eps * size


def argmax_certified_kl(logits: Tensor, kl: Real) -> Tensor:
    """True where KL < p1 log(2 p1/(p1+p2)) + p2 log(2 p2/(p1+p2)), p1 >= p2 the dense top two: the argmax stands.

    Bound [D, link 3d]; `kl` (...) is the exact KL or a bound on it, and a calibrated bound gives a decision that
    holds with its probability. (..., vocab) -> (...) bool.

    >>> argmax_certified_kl(torch.tensor([2.0, 0.0]), torch.tensor([0.1, 0.4])).tolist()
    [True, False]
    """
    (first, second), _ = _top_two(logits)
    mass = (torch.stack([first, second], -1) - torch.logsumexp(logits.double(), -1, keepdim=True)).exp().sum(-1)
    gap = (first - second).clamp(max=80.0)
    # with p1/p2 = e^gap the formula is (p1+p2)/2 (gap tanh(gap/2) - 2 log cosh(gap/2)), which near-ties do not cancel
    limit = mass / 2.0 * (gap * torch.tanh(gap / 2.0) - 2.0 * torch.log1p(2.0 * torch.sinh(gap / 4.0) ** 2))
    return _f64(kl) < limit * (1.0 - 1e-12)


# Links 4, 5: information


def information_lost(probabilities: Tensor, cells: Tensor) -> Tensor:
    """I(Y*; H | H') over n equally likely inputs: the mean of KL(p_i, mean of p in i's cell). (n, K), (n,) -> ().

    Y* ~ p_i is a fresh label; inputs of one cell (an integer) share the state H' left after skipping. Identity
    [D, link 4]: E KL(p, q) = I + E KL(cell mean, q) for any q that sees the cell alone, so I <= the functional cost.

    >>> round(information_lost(torch.eye(2), torch.tensor([0, 0])).item(), 4)
    0.6931
    """
    p, cell = _f64(probabilities), cells.unique(return_inverse=True)[1]
    count = cell.bincount()
    mean = (p.new_zeros(len(count), p.shape[-1]).index_add(0, cell, p) / count.unsqueeze(-1))[cell]
    return (torch.xlogy(p, p) - torch.xlogy(p, mean)).sum(-1).mean().clamp_min(0.0)


def fano(p_error: Real, K: int) -> Tensor:
    """Bound [D, link 5] on H(Q_l | Q_{l-1}) over K codes, P_e = P(Q_l != Q_{l-1}): h_b(P_e) + P_e log(K - 1).

    Raises ConfigError if K < 2.

    >>> round(fano(0.5, 2).item(), 4)
    0.6931
    """
    if K < 2:
        raise ConfigError(f"fano: expected K >= 2 codes, got {K}")
    p = _f64(p_error)
    return torch.special.entr(p) + torch.special.entr(1.0 - p) + p * math.log(K - 1)


# Link 6a and the redundancy bound


def compose(shifts: Sequence[LogitShift]) -> LogitShift:
    """Bound [D, link 6a] on the total shift along a path: r, s, u and b add over its increments.

    Layers go one after the other; increment i is `logit_shift(Z_{i-1}, Z_i, reference=Z_0)`. Single-layer shifts from
    the dense model are no path: their sum bounds nothing. Raises ConfigError without increments.

    >>> step = logit_shift(torch.zeros(2), torch.tensor([1.0, -1.0]))
    >>> compose([step, step]).u.item()
    2.0
    """
    if not shifts:
        raise ConfigError("compose: expected at least one LogitShift, got none")
    return LogitShift(*(torch.stack([getattr(x, name) for x in shifts]).sum(0) for name in "rsub"))


def joint_shift(keep_gates: Tensor, costs: Tensor) -> Tensor:
    """S(x), heuristic [D] for the joint s: S^2 = (sum_l (1-g_l) s_l)^2 + sum_l g_l (1-g_l) s_l^2. (b, L) twice -> (b,).

    S^2 is the mean of (sum of the skipped s_l)^2 when layers are kept independently with probability g_l in [0, 1].
    Differentiable in the gates, costs detached; the gradient at S = 0, where the root has none, is 0.

    >>> joint_shift(torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[5.0, 1.0, 2.0]])).tolist()
    [3.0]
    """
    variance = _joint_variance(keep_gates, costs)
    return variance.where(variance > 0, 1.0).sqrt().where(variance > 0, 0.0)


def redundancy_bound(gates: Tensor, s_costs: Tensor, u_costs: Tensor | None = None) -> Tensor:
    """B(x): `kl_two_point` at (S, U), S of `joint_shift`, U = sum_l (1-g_l) u_l; S^2/2 without `u_costs`.

    Heuristic [D] shaped like the bound: gates are soft and costs single-layer; calibrating the frozen router restores
    coverage. (b, L) each -> (b,), in the gates' dtype, at least float32. Differentiable in the gates, costs detached.
    Exactly 0 where every gate is 1; the slope there is -s_l^2/2, so that a closed router feels what a skip would cost.

    >>> gates, costs = torch.tensor([[1.0, 1.0], [1.0, 0.0]]), torch.ones(2, 2)
    >>> [round(x, 4) for x in redundancy_bound(gates, costs, costs).tolist()]
    [0.0, 0.4338]
    """
    variance = _joint_variance(gates, s_costs)
    if u_costs is None:
        bound = variance / 2.0
    else:
        bound = _two_point(variance, ((1.0 - gates.double()) * u_costs.detach().double()).sum(-1))
    return bound.to(torch.promote_types(gates.dtype, torch.float32))


# Numerics


def _f64(value: Real) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64)


def _centred_shift(before: Tensor, after: Tensor, p: Tensor) -> Tensor:
    """dz - E_p dz; entries outside the vocabulary sit at the mean, where they move neither extreme."""
    if before.shape != after.shape:
        raise DataError(f"expected two logits (..., vocab) of one shape, got {(*before.shape,)} and {(*after.shape,)}")
    absent = (before == -torch.inf) & (after == -torch.inf)
    dz = (after.double() - before.double()).masked_fill(absent, 0.0)
    # from the likeliest entry, whose distance to the mean would cancel in a near-deterministic softmax
    dz = dz - dz.gather(-1, p.argmax(-1, keepdim=True))
    return (dz - (p * dz).sum(-1, keepdim=True)).masked_fill(absent, 0.0)


def _top_two(logits: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
    value, index = logits.double().topk(2, -1)
    return (value[..., 0], value[..., 1]), index[..., :1]


def _joint_variance(gates: Tensor, costs: Tensor) -> Tensor:
    keep, s = gates.double(), costs.detach().double()
    return ((1.0 - keep) * s).sum(-1) ** 2 + (keep * (1.0 - keep) * s**2).sum(-1)


def _log_phi(x: Tensor) -> Tensor:
    """log[(e^x - 1 - x) / x^2], -log 2 at 0: a series near 0, no overflow far from it."""
    t, series = x.where(x.abs() < 0.5, 0.0), torch.zeros_like(x)
    for coefficient in reversed(_PHI_SERIES):
        series = series * t + coefficient
    up, down = x.where(x >= 0.5, 1.0), (-x).where(x <= -0.5, 1.0)
    above = up + torch.log1p(-(1.0 + up) * torch.exp(-up)) - 2.0 * up.log()
    below = (down + torch.expm1(-down)).log() - 2.0 * down.log()
    return torch.where(x >= 0.5, above, torch.where(x <= -0.5, below, series.log()))


def _log1p_s2_phi(s: Tensor, x: Tensor) -> Tensor:
    exponent = 2.0 * s.clamp(1.0 / _HUGE, _HUGE).log() + _log_phi(x.clamp(-_HUGE, _HUGE))
    value = torch.logaddexp(torch.zeros_like(exponent), exponent)
    return torch.where(s > 0, torch.where(x < _HUGE, value, x), s**2 / 2.0)


def _two_point(variance: Tensor, u: Tensor) -> Tensor:
    """`kl_two_point` from s^2. With a = s^2/u it is log(1 + s^2 (a phi(-a) + u phi(u)) / (a + u)): nothing cancels."""
    v, top = variance.clamp(_HUGE**-2, _HUGE**2), u.clamp(1.0 / _HUGE, _HUGE)
    log_mean = torch.logaddexp(v.log() + _log_phi(-v / top), 2.0 * top.log() + _log_phi(top)) - (v + top**2).log()
    value = torch.logaddexp(torch.zeros_like(log_mean), v.log() + log_mean)
    # where nothing is skipped the value is 0 and the slope in s^2 that of s^2/2
    return torch.where(variance > 0, torch.where(u < _HUGE, torch.minimum(value, u), u), variance / 2.0)
