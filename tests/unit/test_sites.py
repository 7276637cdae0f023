"""Halves of layers, decided apart: how they are numbered and named, and that two of them make a layer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import adaskip
from adaskip import report
from adaskip.errors import ConfigError
from adaskip.plan import SkipPlan, Target
from adaskip.recipe import load
from adaskip.runtime.cost import CostModel
from adaskip.sites import Sites, read_sites
from adaskip.survey import static
from adaskip.survey.greedy import greedy_paths
from adaskip.survey.halves import last_strays, site_seconds, site_turns
from adaskip.survey.skips import measure_skips
from adaskip.survey.static import as_plan, find_static, layer_savings
from adaskip.theory.costs import compare
from tests import families, toys, tuning
from tests.routing import LENGTHS, decide, real

HALVES: dict[str, Any] = {"unit": "sublayers"}


def test_the_numbers_by_hand() -> None:
    """Three layers; catches halves in the other order, and sites counted part by part instead of layer by layer."""
    sites = Sites("sublayers", 3)
    assert [sites.label(site) for site in range(len(sites))] == [
        "0.attention", "0.mlp", "1.attention", "1.mlp", "2.attention", "2.mlp",
    ]  # fmt: skip
    assert [sites.layer(site) for site in range(6)] == [0, 0, 1, 1, 2, 2]
    assert [sites.part(site) for site in range(4)] == ["attention", "mlp", "attention", "mlp"]
    assert list(sites.of(1)) == [2, 3]
    assert sites.split([["1.mlp"], ["3.attention", "0.mlp"]]) == (["0.mlp", "1.mlp"], ["3.attention"])
    for unit in ("block", "attention", "mlp"):
        assert Sites(unit, 3).labels(range(3)) == (0, 1, 2)
        assert list(Sites(unit, 3).of(2)) == [2]
    assert read_sites("sublayers", [1, "0.mlp", "1.mlp"]) == (1, 2, 3)


def test_a_plan_is_the_same_in_python_in_yaml_and_in_a_file(tmp_path: Path) -> None:
    """Catches numbers of sites that get out, where they would be read as numbers of layers."""
    plan = SkipPlan(unit="sublayers", skip=["2.mlp", "1.attention"])
    assert plan.skip == ("1.attention", "2.mlp")
    assert plan.keep(3).tolist() == [True, True, False, True, True, False]
    written = yaml.safe_load("{unit: sublayers, skip: [1.attention, 2.mlp]}")
    assert SkipPlan.from_dict(written) == plan == SkipPlan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert SkipPlan(enter=1, **HALVES).keep(2).tolist() == [False, False, True, True]
    model = adaskip.attach(families.make("llama").model, plan)
    model.hold(["1.attention", 3])
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "adaskip_config.json").read_text())["policy"]
    assert stored["settings"]["skip"] == ["1.attention", "2.mlp"]
    assert stored["held"] == ["1.attention", "3.attention", "3.mlp"]
    again = adaskip.RoutedModel.from_pretrained(tmp_path, families.make("llama").model)
    assert again.policy.plan == plan
    assert again.policy.held == (2, 6, 7)
    recipe = load("digits-vlm", ["router.unit=sublayers", "router.held=[4.attention]"])
    assert recipe.router.held == ("4.attention",)


@pytest.mark.parametrize(
    ("unit", "skip", "text"),
    [
        ("sublayers", ["4.block"], r"skip: expected labels such as \['1\.attention', '3\.mlp'\], or layers such as 1"),
        ("sublayers", "4.mlp", r"expected labels such as .*, got '4\.mlp'"),
        ("block", ["4.mlp"], r"skip: expected layer numbers such as \[1, 3\]; one of them: .* got '4\.mlp'"),
    ],
)
def test_what_no_half_is_called_is_refused(unit: Any, skip: Any, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        SkipPlan(unit=unit, skip=skip)


def test_a_half_that_the_model_does_not_have_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"SkipPlan: layer 4\.mlp is outside the model: it has 4 layers, 0 to 3"):
        adaskip.attach(families.make("llama").model, SkipPlan(skip=["4.mlp"], **HALVES))
    with pytest.raises(ConfigError, match=r"SkipIt: target: expected one decision a layer, got unit 'sublayers'"):
        adaskip.policies.SkipIt(1.0, 1, target=Target(**HALVES))


@torch.no_grad()
def test_both_halves_of_a_layer_are_the_layer() -> None:
    """States and costs of a plan over blocks; catches a half that follows its neighbour, and one paid for twice."""
    toy = toys.make("llama")
    batch = toy.batch(LENGTHS)
    found = []
    for unit in ("block", "sublayers"):
        model = adaskip.attach(toy.model, SkipPlan(skip=[1, 2], unit=unit))
        found.append((model(**batch).logits, model.routing.keep_rate, *model.flops()))
        whole = model.spec
        model.detach()
    (states, keep, run, skip), (halved, halved_keep, halved_run, halved_skip) = found
    assert (real(halved, batch) - real(states, batch)).abs().max() <= 1e-6
    assert torch.equal(halved_keep, keep)
    assert torch.equal(halved_run.unflatten(0, (4, 2)).sum(1), run)
    assert torch.equal(halved_skip.unflatten(0, (4, 2)).sum(1), skip)
    cost = CostModel.of(whole, "sublayers")
    assert not torch.stack([cost.token[2, ::2], cost.token[0, 1::2], cost.pair[1, 1::2]]).any()


def test_two_heads_of_a_layer_read_the_same_and_decide_apart() -> None:
    """Catches one head for both, a half without a gradient, and an MLP's head that reads another layer's states."""
    toy = families.make("llama")
    model = decide(adaskip.attach(toy.model, adaskip.RouterConfig(**HALVES)))
    batch, seen = toy.batch(LENGTHS), []
    hooks = [head.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for head in model.routers]
    with torch.no_grad():
        model(**batch)
    for hook in hooks:
        hook.remove()
    assert len(model.routers) == len(seen) == 8
    assert all(torch.equal(seen[site], seen[site + 1]) for site in (0, 2, 4, 6))
    assert not torch.equal(seen[1], seen[2])
    keep = model.routing.keep
    assert (keep[::2] != keep[1::2]).any()
    model.train()(**batch).logits.float().logsumexp(-1).sum().backward()
    assert all(bool(head.outer.bias.grad.abs() > 0) for head in model.routers)


def test_greed_goes_by_what_a_half_saves_by_hand() -> None:
    """The second costs most and saves three times as much; catches greed that counts halves."""
    single = torch.tensor([0.2, 0.3, 0.25]).double()

    def price(paths: Any, rows: Any) -> torch.Tensor:
        return torch.stack([single[list(path)].sum() for path in paths])[None]

    paths = [path for path, _ in greedy_paths(price, [0], single, 3, 3, saves=torch.tensor([1.0, 3.0, 1.0]))]
    assert paths == [(1,), (0, 1), (0, 1, 2)]
    assert [path for path, _ in greedy_paths(price, [0], single, 3, 3)] == [(0,), (0, 2), (0, 1, 2)]


@torch.no_grad()
def whole_passes(model: adaskip.RoutedModel, batch: adaskip.Batch) -> torch.Tensor:
    """What leaving out each half costs each input, float64 (b s), without a suffix that is run again."""
    with model.dense():
        dense = model(**batch.arguments()).logits
    columns = []
    for keep in ~torch.eye(8, dtype=torch.bool):
        logits = model(**batch.arguments(), routing=keep[:, None].expand(-1, len(batch))).logits
        columns.append(compare(dense, logits, batch.supervised)["kl"])
    return torch.stack(columns, 1)


def test_the_search_takes_halves_and_weighs_what_they_save() -> None:
    """Catches a rerun that begins at the number of a site instead of its layer, and a plan that keeps too much."""
    model, rows = adaskip.attach(toys.make("llama").model, SkipPlan(**HALVES)), tuning.batches(2)
    measured, saved = measure_skips(model, rows), layer_savings(model, rows)
    exact = torch.cat([whole_passes(model, batch) for batch in rows])
    assert torch.allclose(measured.kl.double(), exact, atol=1e-6)
    ratio = measured.kl.double().mean(0) / saved.mean(0)
    first = find_static(model, rows, measured.kl, saved, 0.99, width=8)
    assert first == (int(ratio.argmin()),)
    found = find_static(model, rows, measured.kl, saved, 0.6, width=8)
    assert found is not None
    assert as_plan(found, model.target).skip == model.sites.labels(found)
    kept = adaskip.attach(model.detach(), as_plan(found, model.target))
    kept(**rows[0].arguments())
    assert float(kept.routing.keep_rate.mean()) <= 0.6 + 1e-9


def test_the_search_exchanges_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    """The half that is cheapest alone is dear beside every other; catches a search that ends with greed."""
    model = adaskip.attach(toys.make("llama").model, SkipPlan(**HALVES))
    single = torch.tensor([[0.1, 0.2, 0.2, 0.9, 0.9, 0.9, 0.9, 0.9]]).double()

    def price(paths: Any, rows: Any) -> torch.Tensor:
        return torch.stack([single[0, list(path)].sum() + (0 in path) * (len(path) - 1) for path in paths])[None]

    monkeypatch.setattr(static, "exact_prices", lambda *_: price)
    assert find_static(model, [], single, torch.full((1, 8), 0.125).double(), 0.75, width=8) == (1, 2)


@torch.no_grad()
def test_states_between_the_halves_by_hand() -> None:
    """Against what the modules themselves add; catches turns of the whole layer told of a half."""
    model, rows = adaskip.attach(toys.make("llama").model, SkipPlan(**HALVES)), tuning.batches(1, rows=3)
    entered, added = [], {}
    for index, layer in enumerate(model.spec.layers):
        layer.self_attn.register_forward_hook(lambda _, __, out, i=index: added.__setitem__(i, out[0]))
    with model.dense(), model.observe(lambda index, before, after: entered.append((before, after))):
        model(**rows[0].arguments())
    tokens = rows[0].prompt_mask & rows[0].inputs["attention_mask"].bool()
    for index, (before, after) in enumerate(entered):
        middle = before + added[index]
        for site, pair in ((2 * index, (before, middle)), (2 * index + 1, (middle, after))):
            each = 1 - torch.nn.functional.cosine_similarity(*pair, dim=-1)
            by_hand = (each * tokens).sum(1) / tokens.sum(1)
            assert float(site_turns(model, rows)[site]) == pytest.approx(float(by_hand.mean()), rel=1e-3)
    assert (site_seconds(model, rows, rounds=1) > 0).all()
    strays = last_strays(model, rows)
    assert strays.shape == (8,)
    assert (strays > 0).all()


def test_looks_reports_and_pictures_name_halves(tmp_path: Path) -> None:
    """Catches verdicts of layers 0 to 7 in a model of four, and a picture whose axis counts halves as layers."""
    model = adaskip.attach(toys.make("llama").model, adaskip.RouterConfig(keep_bias=0.5, **HALVES))
    objective = adaskip.Objective(keep=0.6, warmup=0.0)
    tuner = adaskip.RouterTuner(model, objective, calibration=tuning.DATA[8:12], learning_rate=0.05)
    check = adaskip.ConditionCheck(0, tolerance=0.01, batches=tuning.DATA[4:6], on_violation="hold", folder=tmp_path)
    tuning.trainer(tmp_path, 2, callbacks=[check]).fit(tuner, tuning.loader(tuning.DATA[:2]))
    look = json.loads((tmp_path / "conditions.jsonl").read_text().splitlines()[-1])
    names = [f"{layer}.{part}" for layer in range(4) for part in ("attention", "mlp")]
    assert list(look["layers"]) == names
    assert {row["layer"] for row in look["findings"]} == {*names}
    assert {*look["held"]} <= {*names}
    axes = report.conditions_plot(look).axes[-1]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "1", "2", "3"]
    assert axes.get_xticks().tolist() == [-0.25, 0.75, 1.75, 2.75]
    figure = report.keep_heat_map({"sum": [0.5] * 8}, labels=names)
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["0", "1", "2", "3"]
