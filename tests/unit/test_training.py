"""Routers, gates, sampling, the objective, and the Lightning objects on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import lightning
import pytest
import torch
from torch.utils.data import DataLoader

import adaskip
from adaskip.batch import exact_match
from adaskip.errors import ConfigError, DataError
from adaskip.policies.features import mean_weights, pool
from adaskip.runtime.gates import hard, straight_through
from adaskip.survey.search import Search, best
from adaskip.survey.skips import measure_skips
from adaskip.theory.conditions import judge, judge_joint
from adaskip.theory.costs import compare
from adaskip.theory.prices import Prices, calibrate_prices
from adaskip.training.data import RoundSampler
from adaskip.training.keep_rates import KeepByKind
from tests import toys
from tests.tuning import batches, planted


def test_pooling_sees_only_its_tokens() -> None:
    states = torch.randn(2, 4, 3)
    masks = torch.tensor([[[1, 1, 0, 0], [0, 0, 1, 0]], [[1, 0, 0, 0], [0, 0, 0, 0]]]).bool()
    pooled = pool(states, mean_weights(masks))
    assert torch.allclose(pooled[0, 0], states[0, :2].mean(0))
    assert torch.equal(pooled[0, 1], states[0, 2])
    assert not pooled[1, 1].any()
    states[0, 3] = torch.nan
    assert torch.equal(pool(states, mean_weights(masks)), pooled)


def test_gates_are_hard_forward_and_soft_backward() -> None:
    logits = torch.tensor([2.0, 0.5, -3.0], requires_grad=True)
    gates = straight_through(logits, threshold=1.0)
    assert gates.tolist() == [1.0, 0.0, 0.0] == hard(logits, 1.0).float().tolist()
    gates.sum().backward()
    soft = torch.sigmoid(logits.detach() - 1.0)
    assert torch.allclose(logits.grad, soft * (1 - soft))
    drawn = torch.stack(
        [straight_through(torch.zeros(400), generator=torch.Generator().manual_seed(s)) for s in range(5)]
    )
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    assert 0.4 < drawn.mean() < 0.6


def test_rounds_continue_where_the_last_one_ended() -> None:
    """Reading round after round is one stream in which every record comes once before any comes twice."""
    sampler = RoundSampler(10, 4, seed=3)
    stream: list[int] = []
    for epoch in range(10):
        sampler.set_epoch(epoch)
        stream += list(sampler)
    assert all(sorted(stream[i : i + 10]) == list(range(10)) for i in range(0, 40, 10))
    sampler.set_epoch(7)
    assert list(sampler) == stream[28:32]
    assert list(RoundSampler(10, 4, seed=4)) != stream[:4]


def test_keep_by_kind_merges_like_one_metric() -> None:
    whole, left, right = (KeepByKind(3, ["a", "b"]) for _ in range(3))
    keep = torch.rand(3, 8) > 0.5
    kinds = ["a", "b", "c", "a", "b", "a", "a", "c"]
    whole.update(keep, kinds)
    left.update(keep[:, :3], kinds[:3])
    right.update(keep[:, 3:], kinds[3:])
    merged = {k: (getattr(left, k) + getattr(right, k)) for k in ("kept", "seen")}
    assert all(torch.equal(value, getattr(whole, name)) for name, value in merged.items())
    chosen = torch.tensor([k == "a" for k in kinds])
    assert torch.allclose(whole.compute()["a"], keep[:, chosen].double().mean(1))
    unknown = torch.tensor([k == "c" for k in kinds])
    assert torch.allclose(whole.compute()["other"], keep[:, unknown].double().mean(1))


def test_objective_lists_its_faults() -> None:
    with pytest.raises(ConfigError) as caught:
        adaskip.Objective(keep=1.5, alpha=0, bound="three-point")  # type: ignore[arg-type]
    assert str(caught.value).count("expected") == 3


def test_the_lightning_objects_by_themselves(tmp_path: Path) -> None:
    """No recipe: attach, tune, check, save, load; the budget is met and the loss stays finite."""
    model = adaskip.attach(toys.make("llama").model)
    tuner = adaskip.RouterTuner(
        model,
        adaskip.Objective(keep=0.5, warmup=0.0),
        calibration=batches(15)[13:],
        learning_rate=0.05,
        kinds=("even", "odd"),
    )
    check = adaskip.ConditionCheck(every=20, examples=16, folder=tmp_path)
    trainer = lightning.Trainer(
        max_steps=40,
        accelerator="cpu",
        callbacks=[check],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    frozen = {name: weight.clone() for name, weight in model.backbone.state_dict().items()}
    whole = {"batch_size": None}  # the items are batches already
    trainer.fit(tuner, DataLoader(batches(10), **whole), DataLoader(batches(13)[10:], **whole))
    assert all(torch.equal(frozen[name], weight) for name, weight in model.backbone.state_dict().items())
    assert float(trainer.callback_metrics["router/keep_soft"]) < 0.6
    assert check.look is not None
    assert [json.loads(line)["step"] for line in (tmp_path / "conditions.jsonl").read_text().splitlines()] == [20, 40]
    assert not any("backbone" in name for name in tuner.state_dict())
    batch = batches(1)[0]
    expected = model.eval()(**batch.arguments()).logits
    model.save_pretrained(tmp_path / "router")
    again = adaskip.RoutedModel.from_pretrained(tmp_path / "router", model.detach())
    assert torch.equal(again(**batch.arguments()).logits, expected)


def test_measure_equals_brute_force() -> None:
    """Suffix reruns give exactly the cost of skipping one layer."""
    model = adaskip.attach(toys.make("llama").model)
    data = batches(2)
    found = measure_skips(model, data)
    assert found.kl.shape == (16, 4)
    for layer in range(4):
        keep = torch.ones(4, 8, dtype=torch.bool)
        keep[layer] = False
        arguments = data[1].arguments()
        with model.dense():
            dense = model(**arguments).logits
        skipped = model(**arguments, routing=keep).logits
        brute = compare(dense, skipped, data[1].supervised)
        assert torch.allclose(found.kl[8:, layer].double(), brute["kl"], atol=1e-5)
        assert torch.allclose(found.s[8:, layer].double(), brute["s"], atol=1e-4)
    assert (found.kl > 0).all()


@pytest.mark.parametrize("scale", [0.0, 1e-4])
def test_a_planted_redundant_layer_is_the_only_admissible_one(scale: float) -> None:
    model = planted(scale)
    prices = calibrate_prices(measure_skips(model, batches(4)), torch.zeros(4), alpha=0.1)
    found = judge(measure_skips(model, batches(12)[4:]), prices, "all", tolerance=0.01)
    assert found.layers == {0: "inadmissible", 1: "inadmissible", 2: "admissible", 3: "inadmissible"}
    assert found.rank_correlation["s"] > 0.7


def test_too_little_to_judge_is_said() -> None:
    model = planted(1.0)
    measured = measure_skips(model, batches(1, rows=1))
    prices = Prices(*[torch.ones(4, dtype=torch.float64)] * 3, alpha=0.1)
    with pytest.raises(DataError, match=r"expected at least 2 inputs, got 1; raise conditions.examples"):
        judge(measured, prices, "all", 0.05)
    with pytest.raises(DataError, match=r"expected at least 9 inputs for alpha=0.1, got 1; give the calibration split"):
        calibrate_prices(measured, torch.zeros(4), alpha=0.1)
    with pytest.raises(DataError, match="expected at least 4 inputs, got 1"):
        judge_joint(measured.kl[:, 0], measured.s[:, 0], torch.ones(4, 1).bool(), {}, 0.1)


def test_joint_coverage_is_calibrated_on_one_half_only() -> None:
    torch.manual_seed(0)
    bound = torch.rand(400) + 0.1
    kl = bound * torch.rand(400)
    keep = torch.rand(4, 400) > 0.5
    keep[0] = True
    found = judge_joint(kl, bound, keep, {0: "admissible", 1: "admissible", 2: "undecided"}, 0.1)
    assert 0.8 < found.coverage <= 1
    assert found.coverage_p > 0.01
    assert found.admissible_skips == pytest.approx(float((~keep[1]).sum() / (~keep).sum()))
    kl[200:] *= 10
    assert judge_joint(kl, bound, keep, {}, 0.1).coverage_p < 1e-6


def test_greedy_search_removes_what_hurts_least() -> None:
    model = planted(0.0)
    path = Search(model, batches(3)).greedy(2)
    assert [len(scored.plan.skip) for scored in path] == [0, 1, 2]
    assert path[1].plan.skip == (2,)
    assert path[1].kl == pytest.approx(0, abs=1e-9)
    assert [round(scored.keep, 6) for scored in path] == [1.0, 0.75, 0.5]
    assert best(path).accuracy == max(scored.accuracy for scored in path)


def test_exact_match_needs_every_token() -> None:
    labels = torch.tensor([[-100, 3, 4], [-100, -100, 2]])
    logits = torch.nn.functional.one_hot(torch.tensor([[3, 4, 0], [0, 2, 0]]), 5).float()
    assert exact_match(logits, labels).tolist() == [True, True]
    logits[0, 1] = 0
    assert exact_match(logits, labels).tolist() == [False, True]
