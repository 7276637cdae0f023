import math
from fractions import Fraction
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from adaskip.errors import ConfigError, DataError
from adaskip.theory import conformal
from adaskip.theory.conformal import (
    beta_binomial_pvalue,
    conformal_quantile,
    conformal_rank,
    resplit_coverage,
    safe_ratio,
)

N_CAL, N_TEST, ALPHA = 49, 200, 0.1


@pytest.fixture(scope="module")
def counts():
    """Covered test scores of 4000 independent calibrations, continuous exchangeable scores."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(4000, N_CAL + N_TEST, generator=generator, dtype=torch.float64).exp()
    limit = conformal_quantile(scores[:, :N_CAL].T, ALPHA)
    return (scores[:, N_CAL:] <= limit.unsqueeze(-1)).sum(-1)


@settings(deadline=None)
@given(st.integers(0, 2000), st.integers(1, 999))
def test_rank_is_exact_on_decimals(n, thousandths):
    exact = math.ceil(Fraction(n + 1) * Fraction(1000 - thousandths, 1000))
    assert conformal_rank(n, thousandths / 1000) == exact


def test_rank_is_not_pushed_up_by_rounding():
    assert math.ceil(10 * (1 - 0.7)) == 4
    assert conformal_rank(9, 0.7) == 3


@settings(deadline=None)
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50), st.floats(0.01, 0.99))
def test_quantile_is_the_smallest_score_that_enough_lie_under(values, alpha):
    limit = conformal_quantile(torch.tensor(values, dtype=torch.float64), alpha).item()
    rank = conformal_rank(len(values), alpha)
    if rank > len(values):
        assert limit == math.inf
    else:
        assert sum(v <= limit for v in values) >= rank > sum(v < limit for v in values)


def test_quantile_of_several_scores_is_taken_apart():
    scores = torch.stack([torch.arange(1.0, 10.0), torch.arange(9.0, 0.0, -1) * 10], -1)
    assert conformal_quantile(scores, 0.2).tolist() == [8.0, 80.0]
    assert conformal_quantile(scores[:3], 0.2).tolist() == [math.inf, math.inf]
    assert conformal_quantile(torch.tensor([1.0, math.inf, 2.0]), 0.5).item() == 2.0
    assert conformal_quantile(torch.empty(0), 0.5).item() == math.inf


def test_quantile_refuses_nan_and_senseless_levels():
    with pytest.raises(DataError, match="expected no NaN, got 1; leave those inputs out"):
        conformal_quantile(torch.tensor([1.0, math.nan]), 0.1)
    for alpha in (0.0, 1.0, -0.1):
        with pytest.raises(ConfigError, match="0 < alpha < 1, got n=2"):
            conformal_quantile(torch.ones(2), alpha)


def test_coverage_is_marginal_and_neither_too_low_nor_wasteful(counts):
    share = counts.double().mean().item() / N_TEST
    expected = conformal_rank(N_CAL, ALPHA) / (N_CAL + 1)
    assert share == pytest.approx(expected, abs=0.003)  # four standard errors of the mean
    assert expected >= 1 - ALPHA


def test_coverage_follows_the_beta_binomial_law_and_no_plain_binomial(counts):
    value, index = counts.unique(return_inverse=True)

    def rejected(p_value):
        return (torch.tensor([p_value(c) for c in value.tolist()])[index] <= 0.05).double().mean()

    assert 0.03 < rejected(lambda c: beta_binomial_pvalue(c, N_TEST, N_CAL, ALPHA)) <= 0.06
    assert 0.03 < rejected(lambda c: beta_binomial_pvalue(c, N_TEST, N_CAL, ALPHA, "two-sided")) <= 0.06
    assert rejected(lambda c: stats.binom.cdf(c, N_TEST, 1 - ALPHA)) > 0.15


def test_coverage_test_has_power_against_a_shifted_population():
    generator = torch.Generator().manual_seed(1)
    calibration, drifted = torch.rand(400, generator=generator), 1.3 * torch.rand(400, generator=generator)
    covered = int((drifted <= conformal_quantile(calibration, ALPHA)).sum())
    assert beta_binomial_pvalue(covered, 400, 400, ALPHA) < 1e-6
    wasteful = int((0.7 * drifted / 1.3 <= conformal_quantile(calibration, ALPHA)).sum())
    assert beta_binomial_pvalue(wasteful, 400, 400, ALPHA) > 0.99
    assert beta_binomial_pvalue(wasteful, 400, 400, ALPHA, "two-sided") < 1e-6


@pytest.mark.parametrize("alternative", ["less", "two-sided"])
def test_p_value_by_brute_force(alternative):
    """Every ordering of 4 calibration and 3 test scores is equally likely; rank 3 of 4 at alpha = .4."""
    chance = [0.0] * 4
    for places in combinations(range(7), 4):  # the ranks that calibration takes
        limit = places[conformal_rank(4, 0.4) - 1]
        chance[sum(p < limit for p in range(7) if p not in places)] += 1 / 35
    for covered in range(4):
        lower, upper = sum(chance[: covered + 1]), sum(chance[covered:])
        expected = lower if alternative == "less" else min(1.0, 2 * min(lower, upper))
        assert beta_binomial_pvalue(covered, 3, 4, 0.4, alternative) == pytest.approx(expected)


def test_p_value_when_the_quantile_is_infinite():
    assert beta_binomial_pvalue(10, 10, 3, 0.1) == 1.0
    assert beta_binomial_pvalue(9, 10, 3, 0.1) == 0.0


def test_p_value_refuses_impossible_counts():
    with pytest.raises(ConfigError, match="0 <= covered <= n_test, got 11 and 10"):
        beta_binomial_pvalue(11, 10, 50, 0.1)
    with pytest.raises(ConfigError, match="'less' or 'two-sided', got 'greater'"):
        beta_binomial_pvalue(1, 10, 50, 0.1, "greater")


def test_safe_ratio():
    num, den = torch.tensor([[0.0], [3.0]]), torch.tensor([0.0, 2.0])
    assert safe_ratio(num, den).tolist() == [[0.0, 0.0], [math.inf, 1.5]]
    assert safe_ratio(torch.tensor(math.nan), torch.tensor(0.0)).isnan()


def test_resplits_follow_the_beta_binomial_law():
    generator = torch.Generator().manual_seed(1)
    scores = torch.rand(400, generator=generator, dtype=torch.float64).exp()
    found = resplit_coverage(scores, ALPHA, 200, splits=300)
    assert found.expected == 181 / 201
    assert abs(found.mean - found.expected) < 4 * 0.03 / math.sqrt(300)
    assert found.law_p > 0.001
    assert 0.01 < found.low_splits < 0.1
    assert (found.splits, found.n_cal, found.n_test) == (300, 200, 200)
    again = resplit_coverage(scores, ALPHA, 200, splits=300).law_p
    assert again == found.law_p  # deterministic
    assert resplit_coverage(torch.zeros(400), ALPHA, 200).mean == 1.0  # ties only cover more
    assert resplit_coverage(torch.zeros(400), ALPHA, 200).law_p < 1e-6  # and are seen
    assert resplit_coverage(scores[:12], ALPHA, 5).worst == 1.0  # too few to calibrate on: infinite, covers all
    with pytest.raises(ConfigError, match="expected 1 <= n_cal < 12 scores, got 12"):
        resplit_coverage(scores[:12], ALPHA, 12)


def test_a_wrong_quantile_breaks_the_law(monkeypatch):
    """A quantile three ranks too low is found out."""
    scores = torch.rand(100, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    monkeypatch.setattr(conformal, "conformal_quantile", lambda s, alpha: s.sort().values[conformal_rank(40, 0.1) - 4])
    assert resplit_coverage(scores, ALPHA, 40, splits=300).law_p < 1e-3
