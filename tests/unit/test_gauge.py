"""A gauge: what a routed pass alone tells of its cost, how it is calibrated, kept, and voided."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import adaskip
from adaskip.batch import Batch
from adaskip.errors import CheckpointError
from adaskip.plan import SkipPlan
from adaskip.runtime.attach import RoutedModel
from adaskip.survey.calibration import price_layers
from adaskip.survey.dense_costs import price_inputs
from adaskip.survey.gauging import gauge_routing
from adaskip.survey.record import record
from adaskip.theory.conditions import judge_joint
from adaskip.theory.gauge import Gauge, calibrate_gauge, fewest_to_gauge, judge_gauge
from adaskip.theory.sureness import describe_sureness
from tests import toys
from tests.tuning import batches


def exchangeable(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Outcomes, and costs that follow two of its numbers up to noise with a long tail."""
    draw = torch.Generator().manual_seed(seed)
    features = torch.randn(count, 9, generator=draw).double()
    noise = torch.randn(count, generator=draw)
    return features, (features[:, 0] - features[:, 4] + 0.5 * noise * noise.abs() - 3).double().exp()


PLAIN = Gauge((0.0,) * 9, (0.1, 0.2, 0.3, 0.1, 0.2, 0.3, 0.5, 0.4, 0.3), -3.0, 2.0, 0.1, 20)
"""One that reads all nine numbers."""


def static() -> RoutedModel:
    return adaskip.attach(toys.make("llama").model, SkipPlan.static([1]))


def outcomes(model: RoutedModel, inputs: list[Batch]) -> tuple[Tensor, Tensor]:
    """What a gauge reads of routed passes, and what these cost."""
    told, kl = [], []
    for batch in inputs:
        dense, routed = record(model, batch, states=False), record(model, batch, routed=True, states=False).logits
        kl.append(dense.compare(routed)["kl"])
        numbers = describe_sureness(routed, batch.supervised)
        counts = [batch.supervised.sum(1).double().log(), batch.prompt_mask.sum(1).double().log()]
        told.append(torch.cat([numbers, model.routing.keep_rate.double()[:, None], torch.stack(counts, 1)], 1))
    return torch.cat(told), torch.cat(kl)


def test_its_factor_covers_as_split_conformal_promises() -> None:
    """A factor calibrated on the inputs of the fit covers too few; one that forgets alpha too few or all."""
    covered, tested, ranks = 0, 0, []
    for seed in range(25):
        gauge = calibrate_gauge(*exchangeable(30, seed), 0.1)
        assert gauge is not None
        assert gauge.scored == 10
        reading = judge_gauge(gauge, *exchangeable(40, 1000 + seed))
        covered, tested = covered + round(reading.coverage * 40), tested + 40
        ranks.append(reading.spearman)
    assert covered / tested == pytest.approx(10 / 11, abs=0.04)  # the rank that 10 scores give 1 - alpha
    assert sum(ranks) / 25 > 0.6


def test_the_fit_never_sees_what_calibrates_its_factor() -> None:
    """Every third input calibrates: dearer ones move the factor and nothing else."""
    features, kl = exchangeable(60, seed=0)
    dear = kl.clone()
    dear[::3] *= 100
    found, other = calibrate_gauge(features, kl, 0.1), calibrate_gauge(features, dear, 0.1)
    assert found is not None
    assert other is not None
    assert other.factor == pytest.approx(100 * found.factor)
    assert replace(other, factor=found.factor) == found


def test_a_reading_is_of_the_bound() -> None:
    """Slack is told where something was paid; by hand."""
    gauge = Gauge((0.0,) * 9, (0.0,) * 9, 0.0, 2.0, 0.1, 9)  # says 2 nats of everything
    reading = judge_gauge(gauge, torch.zeros(4, 9), torch.tensor([0.0, 1.0, 2.0, 4.0]))
    assert (reading.coverage, reading.slack_median, reading.n) == (0.75, 1.0, 4)
    assert reading.slack_90 == pytest.approx(1.8)
    assert reading.to_dict()["spearman"] is None
    assert judge_gauge(gauge, torch.zeros(4, 9), torch.zeros(4)).to_dict()["slack_90"] is None


def test_there_is_none_where_nothing_can_be_read() -> None:
    features, kl = exchangeable(fewest_to_gauge(0.1), seed=0)
    assert calibrate_gauge(features, kl, 0.1) is not None
    assert calibrate_gauge(features[:-1], kl[:-1], 0.1) is None
    assert calibrate_gauge(features, torch.zeros_like(kl), 0.1) is None
    broken = kl.clone()
    broken[3] = torch.nan
    assert calibrate_gauge(features, broken, 0.1) is None
    assert calibrate_gauge(features.where(features < 1, torch.inf), kl, 0.1) is None


def test_it_reads_the_routed_pass_alone() -> None:
    """Catches features of the dense pass, which nobody has when serving; and a cost of other places than it reads."""
    model, inputs = static(), batches(8)
    gauge = gauge_routing(model, inputs, 0.1)
    assert gauge is not None
    features, kl = outcomes(model, inputs)
    expected = calibrate_gauge(features, kl, 0.1)
    assert expected is not None
    torch.testing.assert_close(gauge.bound(features), expected.bound(features))
    with torch.no_grad():
        logits = model(**inputs[0].arguments()).logits
        told = PLAIN.read(logits, inputs[0].supervised, inputs[0].prompt_mask, model.routing.keep_rate)
    torch.testing.assert_close(told, PLAIN.bound(features[: len(inputs[0])]), rtol=1e-4, atol=1e-6)


def test_a_look_holds_it_against_inputs_that_it_has_not_seen() -> None:
    model = static()
    prices = price_layers(model, batches(5), None, 0.1, "functional")
    check = adaskip.ConditionCheck(0, batches=batches(8)[5:])
    assert check.inspect(model, prices, 0).to_dict()["gauge"] is None
    model.gauge = PLAIN
    look = check.inspect(model, prices, 0)
    told, kl = outcomes(model, batches(8)[5:])
    expected = judge_gauge(PLAIN, told, kl)
    assert look.gauge is not None
    assert look.gauge.n == look.joint.n == 24
    assert (look.gauge.slack_median, look.gauge.coverage) == pytest.approx((expected.slack_median, expected.coverage))
    assert look.to_dict()["gauge"] == look.gauge.to_dict()
    bound = price_inputs(model, batches(8)[5:], prices).bound(model.policy.known(4).float().expand(24, 4))
    both = judge_joint(kl, (bound * PLAIN.predict(told)).sqrt(), torch.ones(4, 24).bool(), {}, prices.alpha)
    assert look.together is not None
    assert look.together.slack_median == pytest.approx(both.slack_median)
    assert look.together.n == 24


def test_it_travels_with_the_routers_and_other_decisions_void_it(tmp_path: Path) -> None:
    """Its promise is of the decisions it was calibrated for; catches a gauge that outlives them."""
    backbone = toys.make("llama").model
    model = adaskip.attach(backbone, adaskip.RouterConfig())
    gauge = Gauge((1.0,) * 9, (0.5,) * 9, -3.0, 2.5, 0.1, 20)
    model.gauge = gauge
    model.save_pretrained(tmp_path)
    model.detach()
    loaded = RoutedModel.from_pretrained(tmp_path, backbone)
    assert loaded.gauge == gauge
    loaded.set_threshold(0.1)
    assert loaded.gauge is None
    loaded.gauge = gauge
    loaded.hold([0])
    assert loaded.gauge is None


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"weight": None}, "gauge: expected numbers"),
        ({"weight": [1.0]}, "gauge: expected 9 finite numbers in centre and weight"),
        ({"factor": float("inf")}, "gauge: expected 9 finite numbers"),
        ({"factor": -1.0}, "gauge: alpha=0.1, factor=-1, scored=20 do not fit"),
        ({"scored": 3}, "gauge: alpha=0.1, factor=2.5, scored=3 do not fit"),
        ({"bias": "x"}, "gauge: expected numbers"),
        (None, "gauge: no bias"),
    ],
)
def test_a_damaged_one_is_refused(change: dict[str, object] | None, text: str, tmp_path: Path) -> None:
    """Catches a traceback, and a number that is believed."""
    backbone = toys.make("llama").model
    model = adaskip.attach(backbone, adaskip.RouterConfig())
    model.gauge = Gauge((1.0,) * 9, (0.5,) * 9, -3.0, 2.5, 0.1, 20)
    model.save_pretrained(tmp_path)
    model.detach()
    file = tmp_path / "adaskip_config.json"
    meta = json.loads(file.read_text())
    if change is None:
        meta["gauge"].pop("bias")
    else:
        meta["gauge"] |= change
    file.write_text(json.dumps(meta))
    with pytest.raises(CheckpointError, match=text):
        RoutedModel.from_pretrained(tmp_path, backbone)
