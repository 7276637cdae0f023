"""Intervals of a mean or a share over inputs, and the level that each needs when many are read at once."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from scipy import stats
from torch import Tensor

from adaskip.errors import ConfigError, DataError

_CHUNK = 2_000_000  # draws held in memory at once
_REACH = 20  # resamples that a bootstrap quantile must rest on


@dataclass(frozen=True)
class Interval:
    """Hold a two-sided confidence interval over n inputs; infinite ends mean that the sample cannot tell."""

    estimate: float
    low: float
    high: float
    n: int


def bonferroni(level: float, n_comparisons: int) -> float:
    """Return the level that makes m intervals hold at once with probability >= level: 1 - (1 - level) / m (bound).

    Raises ConfigError unless 0 < level < 1 and m >= 1.

    >>> round(bonferroni(0.95, 10), 6)
    0.995
    """
    if n_comparisons < 1:
        raise ConfigError(f"bonferroni: expected n_comparisons >= 1, got {n_comparisons}")
    return 1.0 - 2.0 * _tail(level) / n_comparisons


def bootstrap_mean(values: Tensor, level: float = 0.95, n_resamples: int = 2000, seed: int = 0) -> Interval:
    """Return the studentised bootstrap interval of the mean over inputs (estimator: the level holds as n grows).

    values (n,), one per input, i.i.d. With t = (m* - m) / se* over resamples: [m - q_hi se, m - q_lo se]. For the long
    right tails of information costs its upper end covers far better than the percentile interval's. A resample without
    spread counts as t = +-inf, so few but large values give an infinite end; n = 1 gives two. Equal values give no
    width. A tail that would hold fewer than 20 resamples, as multiplicity asks for, is read at the 20th and stretched
    like Student's t. Deterministic in `seed`. Raises DataError unless there are values and all finite, ConfigError on a
    level outside (0, 1) or fewer than 100 resamples.

    >>> bootstrap_mean(torch.tensor([1.0, 2.0, 3.0, 4.0])).estimate
    2.5
    """
    x = values.detach().double().flatten().cpu()
    n, tail = len(x), _tail(level)
    if not n or not x.isfinite().all():
        raise DataError(f"bootstrap_mean: expected finite values, got {n}, {int((~x.isfinite()).sum())} not finite")
    if n_resamples < 100:
        raise ConfigError(f"bootstrap_mean: expected n_resamples >= 100, got {n_resamples}")
    mean, spread = x.mean(), x.std(correction=0)
    if n == 1:
        return Interval(mean.item(), -math.inf, math.inf, n)
    if spread == 0:
        return Interval(mean.item(), mean.item(), mean.item(), n)
    generator = torch.Generator().manual_seed(seed)
    steps = []
    for start in range(0, n_resamples, size := max(1, _CHUNK // n)):
        draw = x[torch.randint(n, (min(size, n_resamples - start), n), generator=generator)]
        change = draw.mean(1) - mean
        steps.append(torch.where(change == 0, 0.0, change / draw.std(1, correction=0)))
    t = torch.cat(steps).sort().values
    rank = max(_REACH, math.floor(tail * (n_resamples + 1)))
    unit = spread * max(1.0, stats.t.isf(tail, n - 1) / stats.t.isf(rank / (n_resamples + 1), n - 1))
    return Interval(mean.item(), (mean - t[-rank] * unit).item(), (mean - t[rank - 1] * unit).item(), n)


def paired_difference(a: Tensor, b: Tensor, level: float = 0.95, n_resamples: int = 2000, seed: int = 0) -> Interval:
    """Return `bootstrap_mean` of a - b, (n,) measurements of the same inputs each. Raises DataError if lengths differ.

    >>> paired_difference(torch.tensor([2.0, 3.0]), torch.tensor([1.0, 2.0]))
    Interval(estimate=1.0, low=1.0, high=1.0, n=2)
    """
    if a.shape != b.shape:
        raise DataError(f"paired_difference: expected one shape, got {tuple(a.shape)} and {tuple(b.shape)}")
    return bootstrap_mean(a.double() - b.double(), level, n_resamples, seed)


def jackknife(estimate: float, left_out: Tensor, level: float = 0.95) -> Interval:
    """Return the jackknife interval estimate -+ t sqrt((g - 1) mean((x_i - mean x)^2)) (estimator; Tukey 1958).

    left_out (g,): the statistic without one of g equally large groups of inputs each, i.i.d. groups; t is Student's
    with g - 1 degrees. For smooth statistics that are no mean of per-input values. Raises DataError with fewer than two
    groups or a value that is not finite.

    >>> interval = jackknife(2.5, torch.tensor([3.0, 2.67, 2.33, 2.0]))
    >>> round(interval.low, 2), round(interval.high, 2)
    (0.44, 4.56)
    """
    x, tail = left_out.double().flatten(), _tail(level)
    if len(x) < 2 or not x.isfinite().all() or not math.isfinite(estimate):
        raise DataError(f"jackknife: expected at least two finite values, got {x.tolist()} around {estimate}")
    half = float(stats.t.isf(tail, len(x) - 1)) * math.sqrt((len(x) - 1) * x.var(correction=0).item())
    return Interval(estimate, estimate - half, estimate + half, len(x))


def clopper_pearson(successes: int, n: int, level: float = 0.95) -> Interval:
    """Return the exact interval of a proportion: a bound, it covers with probability >= level for i.i.d. inputs (1934).

    Raises ConfigError unless 0 <= successes <= n, n >= 1 and 0 < level < 1.

    >>> round(clopper_pearson(0, 10).high, 4)
    0.3085
    """
    tail = _check_count(successes, n, level)
    low = stats.beta.ppf(tail, successes, n - successes + 1) if successes else 0.0
    high = stats.beta.isf(tail, successes + 1, n - successes) if successes < n else 1.0
    return Interval(successes / n, float(low), float(high), n)


def share_lost(before: Tensor, after: Tensor, level: float = 0.95) -> Interval:
    """Return the exact interval of P(right before) - P(right after), the share of right answers lost, paired (bound).

    before, after (n,): 1 or True where the answer to the same input is right. The difference is that of two shares,
    right before only and right after only, each by `clopper_pearson` with half of what the level leaves open.
    Raises DataError if lengths differ, ConfigError as `clopper_pearson`.

    >>> interval = share_lost(torch.tensor([1, 1, 1, 0]), torch.tensor([1, 0, 0, 1]))
    >>> interval.estimate, round(interval.low, 3), round(interval.high, 3)
    (0.25, -0.801, 0.95)
    """
    if before.shape != after.shape:
        raise DataError(f"share_lost: expected one shape, got {tuple(before.shape)} and {tuple(after.shape)}")
    was, stays, n = before.bool().flatten(), after.bool().flatten(), before.numel()
    each = bonferroni(level, 2)
    lost, won = (clopper_pearson(int(count.sum()), n, each) for count in (was & ~stays, stays & ~was))
    return Interval(lost.estimate - won.estimate, lost.low - won.high, lost.high - won.low, n)


def _tail(level: float) -> float:
    if not 0 < level < 1:
        raise ConfigError(f"level: expected a number in (0, 1), got {level}")
    return (1.0 - level) / 2.0


def _check_count(successes: int, n: int, level: float) -> float:
    if not (n >= 1 and 0 <= successes <= n):
        raise ConfigError(f"proportion: expected 0 <= successes <= n and n >= 1, got {successes} of {n}")
    return _tail(level)
