"""A gauge: what a routed pass alone tells of its cost, how it is calibrated, kept, and voided."""

from __future__ import annotations

import json
import math
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
from adaskip.theory.gauge import (
    NUMBERS,
    Gauge,
    Outcome,
    calibrate_gauge,
    describe_outcome,
    fewest_to_gauge,
    judge_gauge,
)
from tests import toys
from tests.tuning import batches


def exchangeable(count: int, seed: int) -> tuple[Outcome, Tensor]:
    """Outcomes of two tokens an input, and costs that follow two of their numbers up to noise with a long tail."""
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.zeros(2 * count, NUMBERS).double()
    tokens[:, :6] = torch.randn(2 * count, 6, generator=draw).double()
    noise = torch.randn(2 * count, generator=draw)
    costs = (tokens[:, 0] - tokens[:, 4] + 0.5 * noise * noise.abs() - 3).double().exp()
    return Outcome(tokens, torch.full((count,), 2)), costs


PLAIN = Gauge((0.0,) * NUMBERS, (0.1, 0.2, 0.03, 0.5, *[0.02, -0.03] * 256), -3.0, 2.0, 0.1, 20)
"""One that reads all numbers."""


def static() -> RoutedModel:
    return adaskip.attach(toys.make("llama").model, SkipPlan.static([1]))


def outcomes(model: RoutedModel, inputs: list[Batch]) -> tuple[Outcome, Tensor, Tensor]:
    """What a gauge reads of routed passes, and what these cost each token and each input; by hand."""
    told, paid, kl = [], [], []
    for batch in inputs:
        dense, routed = record(model, batch, states=False), record(model, batch, routed=True, states=False).logits
        kl.append(dense.compare(routed)["kl"])
        rows = batch.supervised.nonzero()[:, 0]
        log_p, log_q = (x.double().log_softmax(-1) for x in (dense.logits, routed))
        paid.append((log_p.exp() * (log_p - log_q)).sum(-1))
        top = log_q.topk(2).values
        sure = [-(log_q.exp() * log_q).sum(-1) + 1e-6, 1 - top[:, 0].exp() + 1e-6]
        sums = torch.zeros(len(routed), 512).double()
        for label in range(routed.shape[1]):
            hashed = label * 0x9E3779B1 % 2**32
            sums[:, hashed >> 23] += (routed[:, label] - routed.mean(1)) * (1 if hashed >> 22 & 1 else -1)
        numbers = [*(x.log() for x in sure), top[:, 0] - top[:, 1], model.routing.keep_rate.double()[rows]]
        told.append(Outcome(torch.cat([torch.stack(numbers, 1), sums / sums.norm(dim=1, keepdim=True)], 1),
                            batch.supervised.sum(1)))  # fmt: skip
    return Outcome.join(told), torch.cat(paid), torch.cat(kl)


def test_its_factor_covers_as_split_conformal_promises() -> None:
    """A factor calibrated on the inputs of the fit covers too few; one that forgets alpha too few or all."""
    covered, tested, ranks = 0, 0, []
    for seed in range(25):
        gauge = calibrate_gauge(*exchangeable(30, seed), 0.1)
        assert gauge is not None
        assert gauge.scored == 10
        outcome, paid = exchangeable(40, 1000 + seed)
        reading = judge_gauge(gauge, gauge.predict(outcome), outcome.mean(paid))
        covered, tested = covered + round(reading.coverage * 40), tested + 40
        ranks.append(reading.spearman)
    assert covered / tested == pytest.approx(10 / 11, abs=0.04)  # the rank that 10 scores give 1 - alpha
    assert sum(ranks) / 25 > 0.6


def test_the_fit_never_sees_what_calibrates_its_factor() -> None:
    """Every third input calibrates: dearer ones move the factor and nothing else."""
    outcome, kl = exchangeable(60, seed=0)
    dear = kl.view(60, 2).clone()
    dear[::3] *= 100
    found, other = calibrate_gauge(outcome, kl, 0.1), calibrate_gauge(outcome, dear.flatten(), 0.1)
    assert found is not None
    assert other is not None
    assert other.factor == pytest.approx(100 * found.factor)
    assert replace(other, factor=found.factor) == found


def test_a_reading_is_of_the_bound() -> None:
    """Slack is told where something was paid; by hand."""
    gauge = replace(PLAIN, factor=2.0)
    reading = judge_gauge(gauge, torch.ones(4), torch.tensor([0.0, 1.0, 2.0, 4.0]))  # 2 nats of everything
    assert (reading.coverage, reading.slack_median, reading.n) == (0.75, 1.0, 4)
    assert reading.slack_90 == pytest.approx(1.8)
    assert reading.to_dict()["spearman"] is None
    assert judge_gauge(gauge, torch.ones(4), torch.zeros(4)).to_dict()["slack_90"] is None


def test_a_pass_that_left_nothing_out_costs_nothing() -> None:
    """It is the dense pass; catches a cost told of it, which also spoils the ranks."""
    outcome, costs = exchangeable(120, 0)
    every_third = torch.arange(240) // 2 % 3 == 0
    outcome.tokens[every_third, 3] = 1.0
    gauge = calibrate_gauge(outcome, torch.where(every_third, 0.0, costs), 0.1)
    assert gauge is not None
    told = gauge.predict(outcome)
    assert (told[::3] == 1e-6).all()
    assert (told[1::3] > 1e-3).all()
    one_token = replace(outcome, tokens=outcome.tokens.clone())
    one_token.tokens[0, 3] = 0.9
    assert gauge.predict(one_token)[0] > 1e-3, "all of an input's tokens say so, or none"


def test_there_is_none_where_nothing_can_be_read() -> None:
    outcome, kl = exchangeable(fewest_to_gauge(0.1), seed=0)
    assert calibrate_gauge(outcome, kl, 0.1) is not None
    fewer = torch.arange(len(outcome.counts)) > 0
    assert calibrate_gauge(outcome.select(fewer), kl[2:], 0.1) is None
    assert calibrate_gauge(outcome, torch.zeros_like(kl), 0.1) is None
    broken = kl.clone()
    broken[3] = torch.nan
    assert calibrate_gauge(outcome, broken, 0.1) is None
    wide = Outcome(outcome.tokens.where(outcome.tokens < 1, torch.inf), outcome.counts)
    assert calibrate_gauge(wide, kl, 0.1) is None


def test_an_input_is_the_mean_of_its_tokens() -> None:
    """By hand, one of them without any; catches sums, and tokens given to their neighbours."""
    outcome = Outcome(torch.zeros(5, NUMBERS).double(), torch.tensor([2, 0, 3]))
    assert outcome.mean(torch.tensor([1.0, 3.0, 1.0, 2.0, 6.0])).tolist() == [2.0, 0.0, 3.0]
    outcome.tokens[:, 0] = torch.arange(5.0)
    assert outcome.select(torch.tensor([False, True, True])).tokens[:, 0].tolist() == [2, 3, 4]
    predicted = replace(PLAIN, weight=(1.0, *[0.0] * (NUMBERS - 1)), bias=0.0).predict(outcome)
    assert predicted[0] == pytest.approx((1 + math.e) / 2)


def test_a_label_outside_the_vocabulary_counts_for_nothing() -> None:
    """Catches infinite numbers where a model says that a label cannot come."""
    logits = torch.randn(3, 40)
    wider = torch.cat([logits, torch.full((3, 5), -torch.inf)], 1)
    where, keep = torch.ones(1, 3).bool(), torch.ones(1)
    torch.testing.assert_close(
        describe_outcome(wider, where, keep).tokens, describe_outcome(logits, where, keep).tokens
    )


def test_it_reads_the_routed_pass_alone() -> None:
    """Catches features of the dense pass, which nobody has when serving; and a cost of other places than it reads."""
    model, inputs = static(), batches(8)
    gauge = gauge_routing(model, inputs, 0.1)
    assert gauge is not None
    outcome, paid, kl = outcomes(model, inputs)
    torch.testing.assert_close(outcome.mean(paid), kl.double())
    expected = calibrate_gauge(outcome, paid, 0.1)
    assert expected is not None
    torch.testing.assert_close(gauge.bound(outcome), expected.bound(outcome), rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        logits = model(**inputs[0].arguments()).logits
        told = PLAIN.read(logits, inputs[0].supervised, model.routing.keep_rate)
    torch.testing.assert_close(told, PLAIN.bound(outcome)[: len(inputs[0])], rtol=1e-4, atol=1e-6)


def test_a_look_holds_it_against_inputs_that_it_has_not_seen() -> None:
    model = static()
    prices = price_layers(model, batches(5), None, 0.1, "functional")
    check = adaskip.ConditionCheck(0, batches=batches(8)[5:])
    assert check.inspect(model, prices, 0).to_dict()["gauge"] is None
    model.gauge = PLAIN
    look = check.inspect(model, prices, 0)
    outcome, _, kl = outcomes(model, batches(8)[5:])
    told = PLAIN.predict(outcome)
    expected = judge_gauge(PLAIN, told, kl)
    assert look.gauge is not None
    assert look.gauge.n == look.joint.n == 24
    assert (look.gauge.slack_median, look.gauge.coverage) == pytest.approx((expected.slack_median, expected.coverage))
    assert look.to_dict()["gauge"] == look.gauge.to_dict()
    bound = price_inputs(model, batches(8)[5:], prices).bound(model.policy.known(4).float().expand(24, 4))
    both = judge_joint(kl, (bound * told).sqrt(), torch.ones(4, 24).bool(), {}, prices.alpha)
    assert look.together is not None
    assert look.together.slack_median == pytest.approx(both.slack_median)
    assert look.together.n == 24


def test_it_travels_with_the_routers_and_other_decisions_void_it(tmp_path: Path) -> None:
    """Its promise is of the decisions it was calibrated for; catches a gauge that outlives them."""
    backbone = toys.make("llama").model
    model = adaskip.attach(backbone, adaskip.RouterConfig())
    gauge = replace(PLAIN, factor=2.5)
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
    loaded.detach()
    meta = json.loads((tmp_path / "adaskip_config.json").read_text())
    meta["gauge"] |= {"centre": [0.0] * 9, "weight": [0.0] * 9}  # as early files have it
    (tmp_path / "adaskip_config.json").write_text(json.dumps(meta))
    assert RoutedModel.from_pretrained(tmp_path, backbone).gauge is None


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"weight": None}, "gauge: expected numbers"),
        ({"weight": [1.0]}, "gauge: expected 516 finite numbers in centre and weight"),
        ({"factor": float("inf")}, "gauge: expected 516 finite numbers"),
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
    model.gauge = replace(PLAIN, factor=2.5)
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
