"""Split conformal calibration: a quantile that holds for a new exchangeable input, and the test of its coverage."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import torch
from scipy import stats
from torch import Tensor

from adaskip.errors import ConfigError, DataError


def conformal_rank(n: int, alpha: float) -> int:
    """Return k = ceil((n+1)(1-alpha)), exact on alpha's decimals: the order statistic to take; n+1: none will do.

    Raises ConfigError unless n >= 0 and 0 < alpha < 1.

    >>> conformal_rank(99, 0.1), conformal_rank(5, 0.1)
    (90, 6)
    """
    if n < 0 or not 0 < alpha < 1:
        raise ConfigError(f"conformal: expected n >= 0 and 0 < alpha < 1, got n={n}, alpha={alpha}")
    return math.ceil((n + 1) * (1 - Fraction(str(float(alpha)))))


def smallest_sample(alpha: float) -> int:
    """Return how many scores a finite quantile needs: the least n with `conformal_rank` n or less, ceil(1/alpha) - 1.

    >>> smallest_sample(0.1), smallest_sample(0.05), smallest_sample(0.3)
    (9, 19, 3)
    """
    conformal_rank(0, alpha)  # checks alpha
    return math.ceil(1 / Fraction(str(float(alpha)))) - 1


def spread_over(count: int, n: int) -> Tensor:
    """Mark ``count`` of ``n`` inputs, bool (n), spread evenly over their order, which may mean something.

    >>> spread_over(2, 5).tolist()
    [True, False, True, False, False]
    """
    marked = torch.zeros(n, dtype=torch.bool)
    marked[torch.arange(count) * n // count] = True
    return marked


def conformal_quantile(scores: Tensor, alpha: float) -> Tensor:
    """Return the ceil((n+1)(1-alpha))-th smallest score, inf beyond n: calibrated, P(new score <= it) >= 1 - alpha.

    (n, ...) -> (...), each trailing entry by itself, in float64. The probability is marginal, over calibration and test
    draws; it needs exchangeable scores, one per image or conversation, and a score function fixed beforehand. Entries
    hold one by one, not jointly: for all L at once use alpha / L, or the quantile of their maximum. Standard split
    conformal (Vovk et al. 2005; Lei et al. 2018); its use for layer costs is ours [D, link 9]. Raises DataError on NaN,
    ConfigError on alpha.

    >>> conformal_quantile(torch.arange(1.0, 10.0), 0.2).item(), conformal_quantile(torch.arange(3.0), 0.1).item()
    (8.0, inf)
    """
    scores = scores.detach().double()
    if scores.isnan().any():
        raise DataError(f"conformal_quantile: expected no NaN, got {int(scores.isnan().sum())}; leave those inputs out")
    rank = conformal_rank(len(scores), alpha)
    if rank > len(scores):
        return scores.new_full(scores.shape[1:], torch.inf)
    return scores.sort(0).values[rank - 1]


def safe_ratio(num: Tensor, den: Tensor) -> Tensor:
    """Divide non-negative numbers with 0/0 = 0 and x/0 = inf: the calibration score s / (rho + c a) [D, link 9].

    Broadcasts, in float64; NaN stays NaN.

    >>> safe_ratio(torch.tensor([0.0, 1.0, 1.0]), torch.tensor([0.0, 0.0, 2.0])).tolist()
    [0.0, inf, 0.5]
    """
    num, den = torch.broadcast_tensors(num.double(), den.double())
    return torch.where((num == 0) & (den == 0), 0.0, num / den)


def beta_binomial_pvalue(
    covered: int, n_test: int, n_cal: int, alpha: float, alternative: Literal["less", "two-sided"] = "less"
) -> float:
    """Return the p-value of "`covered` of `n_test` inputs" if the quantile is split conformal on `n_cal` scores.

    Given calibration, coverage is Beta(k, n_cal + 1 - k), k = `conformal_rank`, so the count is beta-binomial (exact
    for continuous scores; Vovk 2012). "less" = P(count <= covered) tests for too little coverage and stays valid with
    ties; "two-sided" doubles the smaller tail and assumes none. A plain binomial test forgets the calibration draw and
    rejects valid coverage. Raises ConfigError on impossible counts or an unknown alternative.

    >>> round(beta_binomial_pvalue(85, 100, 99, 0.1), 3), round(beta_binomial_pvalue(60, 100, 99, 0.1), 6)
    (0.144, 0.0)
    """
    if alternative not in ("less", "two-sided"):
        raise ConfigError(f"beta_binomial_pvalue: expected alternative 'less' or 'two-sided', got {alternative!r}")
    if not 0 <= covered <= n_test:
        raise ConfigError(f"beta_binomial_pvalue: expected 0 <= covered <= n_test, got {covered} and {n_test}")
    rank = conformal_rank(n_cal, alpha)
    if rank > n_cal:
        return float(covered == n_test)  # an infinite quantile covers everything
    law = stats.betabinom(n_test, rank, n_cal + 1 - rank)
    lower, upper = law.cdf(covered), law.sf(covered - 1)
    return float(lower) if alternative == "less" else float(min(1.0, 2.0 * min(lower, upper)))


@dataclass(frozen=True)
class Coverage:
    """Hold the shares of one part of a pool that a conformal quantile of the other part covered, over random splits."""

    mean: float  # share covered, over all splits
    expected: float  # what the beta-binomial law says: k / (n_cal + 1)
    worst: float  # smallest share in any split
    low_splits: float  # share of splits with a p-value below 5 %; about 0.05 under the law, less with ties
    law_p: float  # p-value of all counts together against the law (Kolmogorov-Smirnov, randomised transform)
    splits: int
    n_cal: int
    n_test: int


def resplit_coverage(scores: Tensor, alpha: float, n_cal: int, splits: int = 200, seed: int = 0) -> Coverage:
    """Split a pool of scores at random many times, to see whether coverage follows the beta-binomial law.

    Given the pool, splits are exchangeable by construction, so without ties the law is exact: what this can show is a
    wrong quantile, ties, or scores that are not numbers; not that deployed inputs resemble the pool. (n,) -> Coverage.
    Raises ConfigError unless 1 <= n_cal < n.
    """
    n = len(scores)
    if not 1 <= n_cal < n:
        raise ConfigError(f"resplit_coverage: expected 1 <= n_cal < {n} scores, got {n_cal}")
    rank, n_test = conformal_rank(n_cal, alpha), n - n_cal
    draw = torch.Generator().manual_seed(seed)
    counts = []
    for _ in range(splits):
        order = torch.randperm(n, generator=draw)
        threshold = conformal_quantile(scores[order[:n_cal]], alpha)
        counts.append(int((scores[order[n_cal:]].double() <= threshold).sum()))
    covered = torch.tensor(counts, dtype=torch.float64)
    low = [beta_binomial_pvalue(count, n_test, n_cal, alpha) < 0.05 for count in counts]
    law_p = 1.0
    if rank <= n_cal:
        law = stats.betabinom(n_test, rank, n_cal + 1 - rank)
        spread = torch.rand(splits, generator=draw, dtype=torch.float64).numpy()
        place = law.cdf(covered.numpy() - 1) + spread * law.pmf(covered.numpy())
        law_p = float(stats.kstest(place, "uniform").pvalue)
    return Coverage(
        mean=float(covered.mean()) / n_test,
        expected=min(1.0, rank / (n_cal + 1)),
        worst=float(covered.min()) / n_test,
        low_splits=sum(low) / splits,
        law_p=law_p,
        splits=splits,
        n_cal=n_cal,
        n_test=n_test,
    )
