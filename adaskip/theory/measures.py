"""Per-input measures read off hidden states and attention: mask-aware, accumulated in float32 (float64 stays float64).

One number per input (row). A row whose mask is empty is undefined and gives NaN; callers leave such rows out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from scipy import stats
from torch import Tensor

from adaskip.errors import DataError
from adaskip.theory.sinks import SINK, norm_ratios


def token_cosine_distance(before: Tensor, after: Tensor) -> Tensor:
    """Return 1 - cos per token, in [0, 2]: half the squared distance of the unit vectors. (b t d) twice -> (b t).

    Identical vectors give exactly 0, small distances keep their digits. A zero vector is at distance 1 from any other
    and 0 from another zero. Raises DataError if the shapes differ.

    >>> token_cosine_distance(torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 2.0]]])).tolist()
    [[1.0]]
    """
    _check_pair(before, after)
    u, v = _unit(before), _unit(after)
    distance = ((u - v) ** 2).sum(-1) / 2.0
    zero_u, zero_v = (u == 0).all(-1), (v == 0).all(-1)
    return torch.where(zero_u | zero_v, (zero_u ^ zero_v).to(distance.dtype), distance)


def cosine_distance(before: Tensor, after: Tensor, mask: Tensor) -> Tensor:
    """Average 1 - cos over the masked tokens, in [0, 2]: the paper's geometric notion [P], per input.

    (b t d), (b t d), (b t) bool -> (b,). Values outside the mask never matter, not even NaN. Empty mask: NaN.
    Raises DataError on shapes that do not fit.

    >>> h = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])
    >>> cosine_distance(h, h.flip(-1), torch.tensor([[True, False]])).tolist()
    [1.0]
    """
    _check_pair(before, after)
    _check_mask("mask", mask, before.shape[:2])
    return _masked_mean(token_cosine_distance(before, after), mask)


def relative_change(before: Tensor, after: Tensor, mask: Tensor) -> Tensor:
    """Average rho = ||h_l - h_{l-1}|| / ||h_l|| over the masked tokens, sinks apart: the norm-aware measure [D].

    `before` holds h_{l-1}, `after` h_l. A token whose state is a sink in either (`sinks.SINK` times as long as the
    median masked token's) is left out: norms or means that see it see little else. (b t d), (b t d), (b t) bool ->
    (b,). A token's 0/0 is 0 (unchanged), x/0 is inf. Empty mask: NaN. Raises DataError on shapes that do not fit.

    >>> h = torch.tensor([[[1.0], [1.0], [2.0], [5000.0]]])
    >>> relative_change(h, torch.tensor([[[1.0], [2.0], [4.0], [5001.0]]]), torch.ones(1, 4).bool()).item()
    0.3333333432674408
    """
    _check_pair(before, after)
    _check_mask("mask", mask, before.shape[:2])
    start, end = _accumulable(before), _accumulable(after)
    change, size = (end - start).norm(dim=-1), end.norm(dim=-1)
    ratio = torch.where(change == 0, 0.0, change / size)
    sink = torch.maximum(norm_ratios(start, mask.bool()), norm_ratios(end, mask.bool())) >= SINK
    return _masked_mean(ratio, mask.bool() & ~sink)


def attention_mass(attention: Tensor, query_mask: Tensor, key_mask: Tensor) -> Tensor:
    """Return the share of attention that masked queries pay to masked keys, mean over heads and queries, in [0, 1].

    The paper's cross-modal notion [P] with text queries and vision keys. As a predictor of cost a heuristic: mass alone
    does not say how far the output moves [D, link 7]. (b h q k), (b q), (b k) bool -> (b,). No query: NaN; no key: 0.
    Raises DataError on shapes that do not fit.

    >>> uniform = torch.full((1, 2, 3, 4), 0.25)
    >>> attention_mass(uniform, torch.ones(1, 3).bool(), torch.tensor([[True, False, False, False]])).tolist()
    [0.25]
    """
    if attention.ndim != 4:
        raise DataError(f"attention: expected (b, h, q, k), got {tuple(attention.shape)}")
    b, _, q, k = attention.shape
    _check_mask("query_mask", query_mask, (b, q))
    _check_mask("key_mask", key_mask, (b, k))
    outside = rearrange(~key_mask.bool(), "b k -> b 1 1 k")
    return _masked_mean(_accumulable(attention).masked_fill(outside, 0.0).sum(-1).mean(1), query_mask)


def value_weighted_mass(attention: Tensor, values: Tensor, query_mask: Tensor, key_mask: Tensor) -> Tensor:
    """Return a ||v_removed - v_rest||: how far masked keys move the masked queries' attention output [D, link 7].

    v_removed and v_rest are the attention-weighted mean values of the masked and of the other keys, a the masked keys'
    mass. Per query the norm is over all heads together, and the queries are averaged. Identity: it is the change of
    the attention's output when those keys are removed, in the unit of the values; as a predictor of cost a heuristic.
    Where a row of `attention` sums to less than 1 (a sink), the missing mass counts as a key of value zero. Without
    any other key the output vanishes. (b h q k), (b h k e), (b q), (b k) bool -> (b,). No query: NaN; no key: 0.
    Raises DataError on shapes that do not fit.

    >>> uniform, values = torch.full((1, 1, 1, 2), 0.5), torch.tensor([[[[3.0], [1.0]]]])
    >>> value_weighted_mass(uniform, values, torch.ones(1, 1).bool(), torch.tensor([[True, False]])).tolist()
    [1.0]
    """
    b, h, q, k = attention.shape
    if values.shape[:3] != (b, h, k) or query_mask.shape != (b, q) or key_mask.shape != (b, k):
        raise DataError(
            f"value_weighted_mass: expected values ({b}, {h}, {k}, e), query_mask ({b}, {q}), key_mask ({b}, {k}), "
            f"got {tuple(values.shape)}, {tuple(query_mask.shape)}, {tuple(key_mask.shape)}"
        )
    removed = attention.float() * rearrange(key_mask.float(), "b k -> b 1 1 k")
    moved = output_change(removed, attention.float() @ values.float(), values.float())
    return moved.masked_fill(~query_mask, 0.0).sum(1) / query_mask.sum(1)


def output_change(removed: Tensor, output: Tensor, values: Tensor) -> Tensor:
    """Return (b q): the norm over heads of the output's change when the mass ``removed`` (b h q k) goes."""
    mass = removed.sum(-1, keepdim=True)
    remaining = 1.0 - mass
    emptied = remaining < 1e-6
    rest = (output - removed @ values) / remaining.masked_fill(emptied, 1.0)
    change = torch.where(emptied, output, torch.where(mass > 0, output - rest, 0.0))
    norms: Tensor = rearrange(change, "b h q e -> b q (h e)").norm(dim=-1)
    return norms


@dataclass(frozen=True)
class TailCurve:
    """Hold the whole empirical tail of a sample: delta -> share of values above delta. The proximal notion [P], entire.

    An estimator of P(x > delta). Make one with `of`.

    >>> curve = TailCurve.of(torch.tensor([0.3, 0.1, 0.2, 0.2]))
    >>> curve(torch.tensor([0.0, 0.2, 0.3])).tolist(), round(curve.mean, 4)
    ([1.0, 0.25, 0.0], 0.2)
    """

    sample: Tensor  # (n,) ascending

    @classmethod
    def of(cls, values: Tensor) -> TailCurve:
        """Sort `values` (any shape, flattened). Raises DataError when empty or NaN: leave undefined rows out first."""
        sample = _accumulable(values.detach()).flatten()
        if not len(sample) or sample.isnan().any():
            nan = int(sample.isnan().sum())
            raise DataError(f"TailCurve: expected values without NaN, got {len(sample)}, {nan} of them NaN")
        return cls(sample.sort().values)

    def __call__(self, delta: Tensor | float) -> Tensor:
        """Return the share of the sample strictly above `delta` (any shape, same shape out)."""
        delta = torch.as_tensor(delta, dtype=self.sample.dtype, device=self.sample.device)
        n = len(self.sample)
        return (n - torch.searchsorted(self.sample, delta, right=True)) / n

    @property
    def mean(self) -> float:
        """Return the mean of the sample; of cosine distances the geometric eps."""
        return self.sample.double().mean().item()


def spearman(x: Tensor, y: Tensor) -> float:
    """Return Spearman's rank correlation of two equally long samples, in [-1, 1]; estimator. NaN when undefined.

    Undefined: fewer than two pairs, or a constant sample. Raises DataError if the lengths differ.

    >>> spearman(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 4.0, 9.0]))
    1.0
    """
    a, b = (v.detach().double().flatten().cpu().numpy() for v in (x, y))
    if len(a) != len(b):
        raise DataError(f"spearman: expected two samples of one length, got {len(a)} and {len(b)}")
    if len(a) < 2 or (a == a[0]).all() or (b == b[0]).all():
        return float("nan")
    return float(stats.spearmanr(a, b).statistic)


def _accumulable(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _unit(x: Tensor) -> Tensor:
    x = _accumulable(x)
    peak = x.abs().amax(-1, keepdim=True)  # dividing by it first, squares neither overflow nor vanish
    x = x / peak.where(peak > 0, 1.0)
    unit: Tensor = x / x.norm(dim=-1, keepdim=True).where(peak > 0, 1.0)
    return unit


def _masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    return values.masked_fill(~mask.bool(), 0.0).sum(-1) / mask.bool().sum(-1)


def _check_pair(before: Tensor, after: Tensor) -> None:
    if before.ndim != 3 or before.shape != after.shape:
        raise DataError(
            f"hidden states: expected before and after of one shape (b, t, d), got {tuple(before.shape)} and "
            f"{tuple(after.shape)}"
        )


def _check_mask(name: str, mask: Tensor, shape: tuple[int, ...]) -> None:
    if mask.shape != shape:
        raise DataError(f"{name}: expected shape {tuple(shape)}, got {tuple(mask.shape)}")
