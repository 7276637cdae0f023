"""Simulated measurements with known means: how often any verdict of a whole run of looks is wrong."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

from adaskip.theory.conditions import Verdict, judge, judge_skips
from adaskip.theory.prices import Prices
from adaskip.theory.tables import LayerMeasures

TOLERANCE, LAYERS, INPUTS, LEVEL = 0.05, 6, 96, 0.9


def measurements(cost: float, seed: int) -> LayerMeasures:
    """Costs with an exponential's right tail and this mean; the cheap notions are far within their thresholds."""
    draw = torch.Generator().manual_seed(seed)
    kl = cost * torch.empty(INPUTS, LAYERS).exponential_(generator=draw)
    still = torch.zeros(INPUTS, LAYERS)
    return LayerMeasures(tuple(range(LAYERS)), cosine=still, rho=still, kl=kl, s=kl, u=kl, mass=still)


PRICES = Prices(*[torch.zeros(LAYERS, dtype=torch.float64)] * 3, alpha=0.1)


def wrong_runs(cost: float, wrong: Verdict, runs: int, looks: int) -> int:
    """Runs in which any layer gets the wrong verdict at any of some looks, each at fresh inputs."""
    count = 0
    for run in range(runs):
        seeds = range(run * looks, (run + 1) * looks)
        found = [judge(measurements(cost, s), PRICES, "all", TOLERANCE, LEVEL, looks).layers.values() for s in seeds]
        count += any(wrong in verdicts for verdicts in found)
    return count


@pytest.mark.parametrize(
    ("runs", "looks"), [(10, 2), pytest.param(100, 3, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])]
)
@pytest.mark.parametrize(("cost", "wrong"), [(TOLERANCE * 1.001, "admissible"), (TOLERANCE * 0.999, "inadmissible")])
def test_layers_on_the_edge_are_rarely_judged_wrongly(cost: float, wrong: Verdict, runs: int, looks: int) -> None:
    """All layers sit a hair on the other side of the tolerance: at most 1 - level of the runs may err at all."""
    allowed = int(stats.binom.isf(1e-3, runs, 1 - LEVEL))
    assert wrong_runs(cost, wrong, runs, looks) <= allowed


def test_without_correction_they_would_often_be_wrong() -> None:
    """What the correction is for: the same data, each interval read at the level asked for the whole."""
    wrong = 0
    for seed in range(200):
        kl = measurements(TOLERANCE * 1.001, seed).kl.double()
        half = stats.norm.ppf(1 - (1 - LEVEL) / 2) * kl.std(0) / INPUTS**0.5
        wrong += bool((kl.mean(0) + half < TOLERANCE).any())
    assert wrong > stats.binom.isf(1e-6, 200, 1 - LEVEL)


def test_clear_layers_get_clear_verdicts() -> None:
    assert set(judge(measurements(TOLERANCE / 3, 0), PRICES, "all", TOLERANCE, looks=17).layers.values()) == {
        "admissible"
    }
    assert set(judge(measurements(TOLERANCE * 3, 0), PRICES, "all", TOLERANCE, looks=17).layers.values()) == {
        "inadmissible"
    }


def test_skips_are_judged_on_the_inputs_that_make_them() -> None:
    """A layer that is dear to some inputs may be left out for the others."""
    measured = measurements(TOLERANCE / 3, 1)
    measured.kl[: INPUTS // 2, 2] *= 30
    keep = torch.ones(LAYERS, INPUTS, dtype=torch.bool)
    keep[2, INPUTS // 2 :] = False
    keep[3, 0] = False  # one input tells nothing
    found = judge_skips(measured, keep, PRICES, "all", TOLERANCE)
    assert {layer: (finding.n, finding.verdict) for layer, finding in found.items()} == {2: (48, "admissible")}
    keep[2] = ~keep[2]
    assert judge_skips(measured, keep, PRICES, "all", TOLERANCE)[2].verdict == "inadmissible"
    assert judge(measured, PRICES, "all", TOLERANCE).verdict(2) == "inadmissible"


def test_the_exact_cost_overrules_cheap_notions_where_it_is_clear() -> None:
    measured = measurements(TOLERANCE / 3, 2)
    prices = Prices(*[torch.full((LAYERS,), 1e6, dtype=torch.float64)] * 3, alpha=0.1)  # no movement is small enough
    measured.cosine.fill_(0.5)
    keep = torch.zeros(LAYERS, INPUTS, dtype=torch.bool)
    assert judge(measured, prices, "all", TOLERANCE).verdict(0) == "inadmissible"
    assert judge_skips(measured, keep, prices, "all", TOLERANCE)[0].verdict == "admissible"
