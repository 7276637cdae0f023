import math

import pytest
import torch
from scipy import stats

from adaskip.errors import ConfigError, DataError
from adaskip.theory import intervals
from adaskip.theory.intervals import (
    Interval,
    bonferroni,
    bootstrap_mean,
    clopper_pearson,
    paired_difference,
    share_lost,
)

# Means


def test_bootstrap_of_normal_data_agrees_with_student():
    x = torch.randn(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    low, high = stats.t.interval(0.95, 199, loc=x.mean(), scale=x.std() / math.sqrt(200))
    found = bootstrap_mean(x, n_resamples=20_000)
    assert found.estimate == pytest.approx(x.mean().item())
    assert found.n == 200
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.02)


def test_bootstrap_covers_the_mean_of_a_skewed_cost():
    """Exponential costs, n = 25: the interval holds its level, where mean +- 1.96 se misses too often above."""
    generator = torch.Generator().manual_seed(1)
    samples = -torch.rand(400, 25, generator=generator, dtype=torch.float64).log()
    found = [bootstrap_mean(x, n_resamples=800, seed=i) for i, x in enumerate(samples)]
    covered = sum(f.low <= 1.0 <= f.high for f in found)
    too_low = sum(f.high < 1.0 for f in found)
    plain_too_low = int((samples.mean(1) + 1.96 * samples.std(1) / 5 < 1.0).sum())
    assert clopper_pearson(covered, 400, 0.999).high > 0.95
    assert too_low < 0.75 * plain_too_low


def test_bootstrap_is_deterministic_in_its_seed_and_widens_with_the_level():
    x = torch.arange(30.0) ** 2
    assert bootstrap_mean(x, seed=3) == bootstrap_mean(x, seed=3)
    assert bootstrap_mean(x, seed=3) != bootstrap_mean(x, seed=4)
    narrow, wide = bootstrap_mean(x, 0.8), bootstrap_mean(x, 0.99)
    assert wide.low < narrow.low < narrow.estimate < narrow.high < wide.high


def test_bootstrap_does_not_depend_on_how_resamples_are_batched(monkeypatch):
    x = torch.arange(50.0)
    whole = bootstrap_mean(x, n_resamples=999)
    monkeypatch.setattr(intervals, "_CHUNK", 1700)
    batched = bootstrap_mean(x, n_resamples=999)
    assert (batched.low, batched.high) == pytest.approx((whole.low, whole.high))


def test_bootstrap_admits_what_it_cannot_know():
    assert bootstrap_mean(torch.tensor([2.0])) == Interval(2.0, -math.inf, math.inf, 1)
    assert bootstrap_mean(torch.full((9,), 2.0)) == Interval(2.0, 2.0, 2.0, 9)
    still = bootstrap_mean(torch.tensor([-1.0, 0.0, 1.0]))  # some resamples hold nothing but the mean
    assert (still.low, still.high) == (-math.inf, math.inf)
    rare = bootstrap_mean(torch.tensor([0.0] * 40 + [5.0]))  # a third of the resamples never see the 5
    assert rare.high == math.inf
    assert rare.low <= rare.estimate


@pytest.mark.parametrize("skew", [False, True])
def test_bootstrap_reaches_levels_beyond_its_resamples(skew):
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(60, generator=generator, dtype=torch.float64)
    x = x.exp() if skew else x
    level = bonferroni(0.95, 100)
    stretched, direct = bootstrap_mean(x, level), bootstrap_mean(x, level, n_resamples=200_000)
    assert stretched.high - x.mean() == pytest.approx(direct.high - direct.estimate, rel=0.25)
    assert x.mean() - stretched.low == pytest.approx(direct.estimate - direct.low, rel=0.25)
    assert bootstrap_mean(x, 1 - 1e-9).high > stretched.high > bootstrap_mean(x, 0.99).high
    with pytest.raises(ConfigError, match="n_resamples >= 100, got 99"):
        bootstrap_mean(x, n_resamples=99)


@pytest.mark.parametrize(
    ("values", "text"), [([], "got 0, 0 not"), ([1.0, math.nan], "got 2, 1 not"), ([1.0, math.inf], "got 2, 1 not")]
)
def test_bootstrap_refuses_undefined_samples(values, text):
    with pytest.raises(DataError, match=text):
        bootstrap_mean(torch.tensor(values))


def test_paired_difference_sees_through_what_inputs_share():
    generator = torch.Generator().manual_seed(2)
    shared, noise = 100 * torch.randn(60, generator=generator), torch.randn(60, generator=generator)
    found = paired_difference(shared + 1.0 + 0.1 * noise, shared)
    assert 0 < found.low < found.estimate < found.high
    assert found.high - found.low < 0.2
    assert found == bootstrap_mean((shared + 1.0 + 0.1 * noise).double() - shared.double())
    with pytest.raises(DataError, match=r"one shape, got \(2,\) and \(3,\)"):
        paired_difference(torch.ones(2), torch.ones(3))


# Proportions


@pytest.mark.parametrize(("successes", "n"), [(0, 7), (7, 7), (1, 30), (15, 30), (29, 30), (480, 500)])
@pytest.mark.parametrize("level", [0.9, 0.999])
def test_clopper_pearson_agrees_with_scipy(successes, n, level):
    expected = stats.binomtest(successes, n).proportion_ci(level, "exact")
    found = clopper_pearson(successes, n, level)
    assert (found.estimate, found.n) == (successes / n, n)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-9)


@pytest.mark.parametrize("share", [0.003, 0.05, 0.4, 0.98])
@pytest.mark.parametrize("n", [5, 40])
def test_clopper_pearson_covers_every_share(share, n):
    held = [f.low <= share <= f.high for f in (clopper_pearson(k, n, 0.9) for k in range(n + 1))]
    assert sum(stats.binom.pmf(k, n, share) for k in range(n + 1) if held[k]) >= 0.9


@pytest.mark.parametrize(("lost", "won"), [(0.0, 0.0), (0.02, 0.0), (0.3, 0.1), (0.05, 0.6)])
def test_share_lost_covers_and_stays_within_what_a_share_can_be(lost, won):
    draw = torch.Generator().manual_seed(0)
    held = 0
    for _ in range(400):
        luck = torch.rand(60, generator=draw)
        before, after = luck < lost, (luck >= lost) & (luck < lost + won)
        found = share_lost(before, after, 0.9)
        assert -1 <= found.low <= found.estimate <= found.high <= 1
        held += found.low <= lost - won <= found.high
    assert clopper_pearson(held, 400, 0.999).high >= 0.9
    with pytest.raises(DataError, match=r"expected one shape, got \(2,\) and \(3,\)"):
        share_lost(torch.zeros(2), torch.zeros(3))


def test_proportions_refuse_impossible_counts():
    for successes, n in ((3, 2), (-1, 2), (0, 0)):
        with pytest.raises(ConfigError, match=f"got {successes} of {n}"):
            clopper_pearson(successes, n)
    with pytest.raises(ConfigError, match=r"in \(0, 1\), got 1.0"):
        clopper_pearson(1, 2, 1.0)


# Multiplicity


def test_bonferroni_makes_many_intervals_hold_at_once():
    assert bonferroni(0.95, 1) == pytest.approx(0.95)
    assert 1 - bonferroni(0.9, 40) == pytest.approx(0.1 / 40)
    generator = torch.Generator().manual_seed(3)
    counts = (torch.rand(500, 10, 50, generator=generator) < 0.3).sum(-1).tolist()
    joint = {}
    for level in (0.8, bonferroni(0.8, 10)):
        held = [(f := clopper_pearson(k, 50, level)).low <= 0.3 <= f.high for k in range(51)]
        joint[level] = sum(all(held[k] for k in row) for row in counts) / 500
    assert joint[0.8] < 0.8 <= joint[bonferroni(0.8, 10)]
    with pytest.raises(ConfigError, match="n_comparisons >= 1, got 0"):
        bonferroni(0.9, 0)
