"""Risk control as pure functions: p-values, the walk along a path, the drift monitor, and what they refuse."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from adaskip.errors import ConfigError, DataError
from adaskip.theory.risk import (
    DriftMonitor,
    binomial_pvalue,
    e_process,
    fixed_sequence,
    hoeffding_bentkus_pvalue,
    learn_then_test,
    smallest_sample,
)


def test_the_binomial_p_value_is_scipys():
    for errors, n, level in [(0, 10, 0.3), (3, 50, 0.1), (50, 50, 0.5)]:
        expected = stats.binomtest(errors, n, level, alternative="less").pvalue
        assert float(binomial_pvalue(errors, n, level)) == pytest.approx(expected)


def test_hoeffding_bentkus_is_the_smaller_of_its_two_bounds():
    mean, n, level = 0.01, 400, 0.03
    kl = mean * np.log(mean / level) + (1 - mean) * np.log((1 - mean) / (1 - level))
    expected = min(np.exp(-n * kl), np.e * stats.binom.cdf(4, n, level))
    assert float(hoeffding_bentkus_pvalue(mean, n, level)) == pytest.approx(expected)
    assert float(hoeffding_bentkus_pvalue(0.5, n, level)) == 1.0
    assert float(binomial_pvalue(4, n, level)) < float(hoeffding_bentkus_pvalue(mean, n, level))  # exact is sharper


def test_a_mean_that_rounding_lifted_above_its_count_costs_nothing():
    assert 100 * np.float64(0.07) > 7
    assert float(hoeffding_bentkus_pvalue(0.07, 100, 0.2)) == pytest.approx(
        min(np.exp(-100 * (0.07 * np.log(0.35) + 0.93 * np.log(0.93 / 0.8))), np.e * stats.binom.cdf(7, 100, 0.2))
    )


def test_the_walk_stops_at_the_first_threshold_it_cannot_reject():
    seen = []

    def losses_at(threshold):
        seen.append(threshold)
        return np.arange(300) < {1.0: 0, 2.0: 1, 3.0: 30, 4.0: 0}[threshold]

    found = learn_then_test([1.0, 2.0, 3.0, 4.0], losses_at, 0.02, 0.1, binary=True)
    assert seen == [1.0, 2.0, 3.0]
    assert (found.threshold, found.n, [step.loss * 300 for step in found.steps]) == (2.0, 300, [0.0, 1.0, 30.0])
    assert fixed_sequence([step.p_value for step in found.steps], 0.1) == 2
    assert found.to_dict()["steps"][1]["p_value"] == pytest.approx(float(binomial_pvalue(1, 300, 0.02)))
    graded = learn_then_test([1.0, 30.0], lambda t: np.full(300, t / 1000), 0.02, 0.1, binary=False)
    assert graded.threshold == 1.0


def test_no_rejection_means_dense():
    found = learn_then_test([0.0, 1.0], lambda _: np.ones(300), 0.02, 0.1, binary=True)
    assert found.threshold is None
    assert len(found.steps) == 1


@pytest.mark.parametrize(
    ("losses", "text"),
    [
        (np.zeros(113), "a risk of 0.02 at delta 0.1 needs at least 114 inputs, got 113; give the calibration split"),
        (np.zeros(0), "needs at least 114 inputs, got 0"),
        (np.full(200, np.nan), "expected losses 0 or 1, got nan at threshold 0.5"),
        (np.full(200, 0.5), "expected losses 0 or 1, got 0.5"),
    ],
)
def test_too_little_or_undefined_is_refused(losses, text):
    with pytest.raises(DataError, match=text):
        learn_then_test([0.5], lambda _: losses, 0.02, 0.1, binary=True)


def test_senseless_questions_are_refused():
    with pytest.raises(ConfigError, match=r"risk: expected a number in \(0, 1\), got 2"):
        learn_then_test([0.5], lambda _: np.zeros(200), 2, 0.1, binary=True)
    with pytest.raises(ConfigError, match="delta: expected a number"):
        smallest_sample(0.1, 0.0)
    with pytest.raises(ConfigError, match="got an empty path"):
        learn_then_test([], lambda _: np.zeros(200), 0.02, 0.1, binary=True)
    with pytest.raises(DataError, match="expected 0 to n=5 errors, got 6 to 6"):
        binomial_pvalue(6, 5, 0.1)
    with pytest.raises(DataError, match=r"expected means in \[0, 1\]"):
        hoeffding_bentkus_pvalue(np.nan, 5, 0.1)
    with pytest.raises(DataError, match=r"expected a loss in \[0, 1\], got nan"):
        DriftMonitor(0.02, 0.1).update(float("nan"))


def test_the_smallest_sample_is_the_smallest():
    for level, delta in [(0.02, 0.1), (0.1, 0.05), (0.5, 0.25), (0.001, 0.01)]:
        n = smallest_sample(level, delta)
        assert float(binomial_pvalue(0, n, level)) <= delta < float(binomial_pvalue(0, n - 1, level))


def test_the_monitor_follows_the_process_and_remembers_its_alarm():
    draw = np.random.default_rng(0)
    losses = np.concatenate([draw.random(100) < 0.02, draw.random(60) < 0.5, np.zeros(500)]).astype(float)
    monitor = DriftMonitor(0.02, 0.1)
    assert monitor.evidence == pytest.approx(1.0)
    path = e_process(losses, 0.02)
    for t, loss in enumerate(losses):
        assert monitor.update(loss) == bool((path[: t + 1] >= 10).any())
        assert monitor.evidence == pytest.approx(path[t])
    assert monitor.alarm
    assert monitor.n == 660


def test_the_process_is_the_formula():
    losses, level = np.array([0.0, 1.0, 0.3]), 0.1
    stakes = np.geomspace(0.1, 0.95 / level, 16)
    expected = 1 / 4
    for k in (1, 2, 3):
        expected += np.mean([np.prod(1 + s * (losses[k - 1 :] - level)) for s in stakes]) / (k * (k + 1))
    assert e_process(losses, level)[-1] == pytest.approx(expected)
