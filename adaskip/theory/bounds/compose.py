"""The cost of skipping several layers together (links 6a and 6c of docs/theory.md), and B, which training adds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from adaskip.errors import ConfigError
from adaskip.theory.bounds.logits import LogitShift
from adaskip.theory.bounds.numerics import centred_shift, f64, two_point


def compose(shifts: Sequence[LogitShift]) -> LogitShift:
    """Bound the total shift along a path: r, s, u and b add over its increments [D, link 6a].

    Layers go one after the other; increment i is `logit_shift(Z_{i-1}, Z_i, reference=Z_0)`. Single-layer shifts from
    the dense model are no path: their sum bounds nothing. Raises ConfigError without increments.

    >>> from adaskip.theory.bounds import logit_shift
    >>> step = logit_shift(torch.zeros(2), torch.tensor([1.0, -1.0]))
    >>> compose([step, step]).u.item()
    2.0
    """
    if not shifts:
        raise ConfigError("compose: expected at least one LogitShift, got none")
    return LogitShift(*(torch.stack([getattr(x, name) for x in shifts]).sum(0) for name in "rsub"))


def gate_matrix(logits: Tensor, skipped: Tensor) -> Tensor:
    """Return G_lm = Cov_p(dz_l, dz_m), in nats^2, from the logits with layer l alone skipped; positive semidefinite.

    Estimator [D, link 6c] of how skips add up or cancel; its diagonal is s_l^2. logits (..., vocab), skipped
    (..., l, vocab) -> (..., l, l). Average it over an input's predicted tokens. Errors as `logit_shift`.
    """
    p = torch.softmax(logits.double(), -1).unsqueeze(-2)
    x = centred_shift(logits.unsqueeze(-2).expand_as(skipped), skipped, p.expand(skipped.shape))
    x = p.sqrt() * x  # so that x x^T sums over the vocabulary with weight p
    return x @ x.transpose(-1, -2)


def joint_quadratic(keep_gates: Tensor, G: Tensor) -> Tensor:
    """Return (1-g)^T G (1-g) / 2 in nats: the joint KL to second order, where layers' shifts of the logits add up.

    Estimator [D, link 6c]. With hard gates and additive shifts twice this is the joint s^2 (identity), and never above
    (sum of the skipped s_l)^2. Its level is off where they do not add: rescale it by a conformal quantile of exact over
    estimated KL. (..., l), (..., l, l) -> (...).

    >>> joint_quadratic(torch.zeros(2), torch.tensor([[1.0, -1.0], [-1.0, 1.0]])).item()
    0.0
    """
    skip = 1.0 - f64(keep_gates)
    return torch.einsum("...l,...lm,...m->...", skip, f64(G), skip).clamp_min(0.0) / 2.0


def joint_shift(keep_gates: Tensor, costs: Tensor) -> Tensor:
    """Return S(x), a heuristic [D] for the joint s. (b, L) twice -> (b,).

        S^2 = (sum_l (1-g_l) s_l)^2 + sum_l g_l (1-g_l) s_l^2

    S^2 is the mean of (sum of the skipped s_l)^2 when layers are kept independently with probability g_l in [0, 1].
    Differentiable in the gates, costs detached; the gradient at S = 0, where the root has none, is 0.

    >>> joint_shift(torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[5.0, 1.0, 2.0]])).tolist()
    [3.0]
    """
    variance = _joint_variance(keep_gates, costs)
    return variance.where(variance > 0, 1.0).sqrt().where(variance > 0, 0.0)


def redundancy_bound(
    gates: Tensor, s_costs: Tensor, u_costs: Tensor | None = None, correlation: Tensor | None = None
) -> Tensor:
    """Return B(x): `kl_two_point` at (S, U), S of `joint_shift`, U = sum_l (1-g_l) u_l; S^2/2 without `u_costs`.

    With `correlation` (L, L), positive semidefinite and 1 on its diagonal, S^2 is the mean of s^T R s over what
    is skipped: skips add up as far as they correlate, where without it they add up in full.

    Heuristic [D] shaped like the bound: gates are soft and costs single-layer; calibrating the frozen router restores
    coverage. (b, L) each -> (b,), in the gates' dtype, at least float32. Differentiable in the gates, costs detached.
    Exactly 0 where every gate is 1; the slope there is -s_l^2/2, so that a closed router feels what a skip would cost.

    >>> gates, costs = torch.tensor([[1.0, 1.0], [1.0, 0.0]]), torch.ones(2, 2)
    >>> [round(x, 4) for x in redundancy_bound(gates, costs, costs).tolist()]
    [0.0, 0.4338]
    """
    variance = _joint_variance(gates, s_costs, correlation)
    if u_costs is None:
        bound = variance / 2.0
    else:
        bound = two_point(variance, ((1.0 - gates.double()) * u_costs.detach().double()).sum(-1))
    return bound.to(torch.promote_types(gates.dtype, torch.float32))


def _joint_variance(gates: Tensor, costs: Tensor, correlation: Tensor | None = None) -> Tensor:
    keep, s = gates.double(), costs.detach().double()
    skipped = (1.0 - keep) * s
    if correlation is None:
        together = skipped.sum(-1) ** 2
    else:
        together = (skipped @ correlation.to(skipped) * skipped).sum(-1).clamp_min(0.0)
    return together + (keep * (1.0 - keep) * s**2).sum(-1)
