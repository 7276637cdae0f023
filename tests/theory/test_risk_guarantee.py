"""Simulated calibrations and audits with known risk: the guarantees hold as often as they say, and are not vacuous."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from adaskip.theory.risk import binomial_pvalue, e_process, fixed_sequence, hoeffding_bentkus_pvalue

RISK, DELTA, RUNS = 0.02, 0.1, 2000
SKIP = np.linspace(0.0, 1.0, 41)  # share of the work skipped at each threshold of the path, conservative to aggressive
CURVES = {  # the true risk at each threshold
    "late": 0.5 * SKIP**8,
    "early": 0.3 * SKIP**4,
    "step": np.where(SKIP < 0.6, 0.002, 0.3),
    "bumpy": 0.004 + 0.3 * SKIP**8 + 0.004 * np.sin(12 * SKIP),
    "too high everywhere": np.full_like(SKIP, RISK * 1.0001),
}


def allowed(runs: int, chance: float) -> int:
    """So many failures happen with probability > 0.1 % if each has this chance."""
    return int(stats.binom.isf(1e-3, runs, chance))


def errors(curve: np.ndarray, n: int, shared: bool, rng: np.random.Generator) -> np.ndarray:
    """Calibration error counts (runs, thresholds): each input keeps its difficulty over the path, or draws it anew."""
    if not shared:
        return rng.binomial(n, curve, (RUNS, len(curve)))
    hard = np.sort(rng.random((RUNS, n)), axis=1)
    return np.stack([np.searchsorted(row, curve) for row in hard])


@pytest.mark.parametrize("n", [150, 600, 2000])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("name", CURVES)
def test_learn_then_test_fails_in_at_most_delta_of_the_calibrations(name: str, shared: bool, n: int) -> None:
    curve = CURVES[name]
    p = binomial_pvalue(errors(curve, n, shared, np.random.default_rng(0)), n, RISK)
    rejected = fixed_sequence(p, DELTA)
    risk = np.where(rejected > 0, curve[rejected - 1], 0.0)  # none rejected: dense
    assert (risk > RISK).sum() <= allowed(RUNS, DELTA)


def skipped(name: str, n: int, shared: bool) -> float:
    """Mean share skipped at the certified threshold, over that of an oracle who knows the true risk."""
    curve = CURVES[name]
    oracle = SKIP[curve <= RISK].max()
    rejected = fixed_sequence(binomial_pvalue(errors(curve, n, shared, np.random.default_rng(1)), n, RISK), DELTA)
    return float(np.where(rejected > 0, SKIP[rejected - 1], 0.0).mean() / oracle)


@pytest.mark.parametrize("n", [600, 2000])
@pytest.mark.parametrize("name", [name for name in CURVES if name != "too high everywhere"])
def test_learn_then_test_skips_most_of_what_an_oracle_would(name: str, n: int) -> None:
    assert skipped(name, n, shared=True) >= 0.8


def test_few_inputs_certify_less() -> None:
    """600 inputs reach 80 % of the oracle on every curve; 344 do not where risk hovers below the allowed one."""
    assert skipped("late", 344, shared=True) > 0.9
    assert skipped("bumpy", 344, shared=True) < 0.75


def test_the_guarantee_is_nearly_used_up_where_a_threshold_sits_on_the_edge() -> None:
    """A path whose second threshold is just unsafe fails almost as often as it may: the test is sharp."""
    curve, n = np.array([0.0, RISK * 1.0001]), 2000
    rejected = fixed_sequence(binomial_pvalue(errors(curve, n, True, np.random.default_rng(2)), n, RISK), DELTA)
    assert 0.6 * DELTA < (rejected == 2).mean() <= allowed(RUNS, DELTA) / RUNS


@pytest.mark.parametrize("shape", [(0.02, 0.98), (0.2, 9.8), (2.0, 98.0)])
def test_hoeffding_bentkus_holds_for_losses_that_are_no_coins(shape: tuple[float, float]) -> None:
    """Beta losses of mean exactly the risk, from nearly 0/1 to nearly constant: p <= delta in at most delta of them."""
    rng = np.random.default_rng(3)
    means = np.stack([rng.beta(*shape, 600).mean() for _ in range(RUNS)])
    p = hoeffding_bentkus_pvalue(means, 600, RISK)
    assert (p <= DELTA).sum() <= allowed(RUNS, DELTA)
    safe = np.stack([rng.beta(shape[0] / 8, shape[1], 600).mean() for _ in range(RUNS)])
    assert (hoeffding_bentkus_pvalue(safe, 600, RISK) <= DELTA).mean() > 0.9


@pytest.mark.parametrize("kind", ["coins", "graded", "clustered"])
def test_the_drift_monitor_rarely_alarms_without_drift(kind: str) -> None:
    """Losses whose mean given the past is exactly the risk: alarm within 1000 inputs in at most delta of runs."""
    rng = np.random.default_rng(4)
    shape = (1000, 1000)
    losses = (rng.random(shape) < RISK).astype(float)
    if kind == "graded":
        losses = rng.beta(0.2, 9.8, shape)
    elif kind == "clustered":  # calm weather for 50 inputs after every error, in which losses are constant
        for t in range(1, shape[1]):
            calm = (losses[:, max(0, t - 50) : t] == 1).any(-1)
            losses[calm, t] = RISK
    assert ((e_process(losses, RISK) >= 1 / DELTA).any(-1)).sum() <= allowed(shape[0], DELTA)


@pytest.mark.parametrize(("start", "rate", "within"), [(0, 0.1, 200), (500, 0.1, 300), (1000, 0.3, 60)])
def test_the_drift_monitor_sees_drift_early_or_late(start: int, rate: float, within: int) -> None:
    rng = np.random.default_rng(5)
    rates = np.where(np.arange(start + within) < start, RISK, rate)
    e = e_process(rng.random((400, start + within)) < rates, RISK)
    assert (e[:, start:] >= 1 / DELTA).any(-1).mean() > 0.9
