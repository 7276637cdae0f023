"""Routers from bounds: the survey against brute force, the fit on planted costs, and a whole run of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import adaskip
from adaskip import runfiles
from adaskip.batch import Batch
from adaskip.errors import CheckpointError, ConfigError
from adaskip.recipe import load
from adaskip.survey.flips import Flips, survey_flips
from adaskip.survey.record import record
from adaskip.theory import bounds
from adaskip.theory.costs import compare
from adaskip.training import fit_run
from adaskip.training.fit import FitState, fit_from_bounds, fit_round, read_logits
from adaskip.training.objective import Fit
from adaskip.verbs.train import train
from tests import toys
from tests.own_data import SHORT
from tests.tuning import batches

LAYERS, WIDTH = 4, 32


def routed(seed: int = 0) -> adaskip.RoutedModel:
    """Routers of a mean state, as the planted inputs have it."""
    return adaskip.attach(toys.make("llama", seed=seed).model, adaskip.RouterConfig(features="mean"))


def mixed(model: adaskip.RoutedModel) -> None:
    """Make the routers' decisions differ between layers and inputs."""
    torch.manual_seed(3)
    for head in model.routers:
        torch.nn.init.normal_(head.outer.weight, std=2.0)
        torch.nn.init.constant_(head.outer.bias, 0.3)


@pytest.mark.parametrize("family", ["llama", "llava"])
def test_a_survey_equals_rerunning_everything(family: str) -> None:
    group = "vision" if family == "llava" else "all"
    toy = toys.make(family)
    model = adaskip.attach(toy.model, adaskip.RouterConfig(group=group))
    mixed(model)
    inputs = toy.batch([4, 6, 5, 6, 3, 7])
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -2:] = inputs["input_ids"][:, -2:]
    prompt = inputs["attention_mask"].bool() & (labels == -100)
    found = survey_flips(model, [Batch(inputs, labels, prompt)], task_weight=0.5)
    arguments = {**inputs, "prompt_mask": prompt}
    with torch.no_grad():
        with model.dense():
            dense = model(**arguments).logits

        def cost(keep: torch.Tensor | None) -> torch.Tensor:
            logits = model(**arguments, routing=keep).logits
            answer = torch.nn.functional.cross_entropy(
                logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none"
            ).sum(1) / (labels[:, 1:] >= 0).sum(1)
            return compare(dense, logits, labels[:, 1:] != -100)["kl"] + 0.5 * answer.double()

        base = cost(None)
        routing = model.routing
        assert 0 < routing.keep.float().mean() < 1
        assert torch.equal(found.keep, routing.keep.T)
        assert torch.equal(read_logits(model.routers, found.pooled), model.runtime.routing.logits.T)
        assert torch.allclose(found.cost.double(), base, atol=1e-5)
        assert torch.allclose(found.keep_rate(found.keep.float()).double(), routing.keep_rate, atol=1e-6)
        for layer in range(LAYERS):
            keep = routing.keep.clone()
            keep[layer] = ~keep[layer]
            assert torch.allclose((found.cost + found.change[:, layer]).double(), cost(keep), atol=1e-5)
            assert torch.allclose(found.expected_cost(keep.T.float()).double(), cost(keep), atol=1e-5)


def test_the_first_survey_is_of_the_dense_model() -> None:
    found = survey_flips(routed(), batches(2))
    assert found.keep.all()
    assert not found.cost.any()
    assert torch.equal(found.pairs, found.pairs.transpose(1, 2))
    quadratic = adaskip.theory.bounds.joint_quadratic(torch.zeros(16, LAYERS), found.pairs)
    assert (quadratic > 0).all()


def test_pairs_are_covariances_of_what_the_flips_do() -> None:
    """Layers that write nothing flip nothing; the expectation over gates is that of drawn decisions."""
    toy = toys.make("llama", seed=5)
    layer = toy.model.model.layers[2]
    with torch.no_grad():
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    found = survey_flips(adaskip.attach(toy.model), batches(1))
    assert found.change[:, 2].abs().max() < 1e-6
    assert found.pairs[:, 2].abs().max() < 1e-5
    assert found.pairs[:, 0, 1].abs().min() > 1e-3
    gates = torch.rand(8, LAYERS, generator=torch.Generator().manual_seed(0))
    drawn = (torch.rand(4000, 8, LAYERS, generator=torch.Generator().manual_seed(1)) < gates).float()
    unclipped = replace(found, cost=found.cost + 100)
    mean = torch.stack([unclipped.expected_cost(keep) for keep in drawn]).mean(0)
    assert torch.allclose(mean, unclipped.expected_cost(gates), rtol=0.01)


def test_the_expected_cost_and_keep_rate_by_hand() -> None:
    """Layer 0 leaves the path with chance .5, layer 1 joins it with chance .25.

    Catches a pair that counts twice, a layer that counts as a pair with itself, and a cost below 0.
    """
    flips = Flips(
        pooled=torch.zeros(1, 2, 1, 1),
        keep=torch.tensor([[True, False]]),
        cost=torch.tensor([1.0]),
        change=torch.tensor([[0.3, 0.5]]),
        pairs=torch.tensor([[[0.7, 0.2], [0.2, 0.9]]]),
        share=torch.tensor([[0.25, 0.5]]),
        floor=torch.tensor([0.25]),
    )
    gates = torch.tensor([[0.5, 0.25]])
    assert flips.expected_cost(gates).tolist() == pytest.approx([1 + 0.5 * 0.3 + 0.25 * 0.5 + 0.5 * 0.25 * 0.2])
    assert flips.keep_rate(gates).tolist() == pytest.approx([0.25 + 0.5 * 0.25 + 0.25 * 0.5])
    assert replace(flips, change=torch.tensor([[-4.0, 0.5]])).expected_cost(gates).tolist() == [0.0]


def test_pairs_are_means_over_an_inputs_own_tokens() -> None:
    """Answers of three tokens and of one; catches a sum, a mean over all, other rows' tokens, a weight left out."""
    model, inputs = routed(), toys.make("llama").batch([7, 6])
    labels = inputs["input_ids"].clone()
    labels[0, :-3] = labels[1, :-1] = -100
    batch = Batch(inputs, labels, inputs["attention_mask"].bool() & (labels == -100))
    done: list[int] = []
    found = survey_flips(model, [batch, batch], task_weight=0.5, progress=done.append)
    assert done == [2, 4]
    dense = record(model, batch)
    flipped = torch.stack([dense.rerun(dense.skipping([layer])) for layer in range(LAYERS)], 1)
    each = 1.5 * bounds.gate_matrix(dense.logits, flipped)
    expected = torch.stack([each[:3].mean(0), each[3]]).float()
    torch.testing.assert_close(found.pairs, torch.cat([expected, expected]), rtol=1e-4, atol=1e-6)


def planted(count: int, seed: int) -> tuple[Flips, torch.Tensor]:
    """Inputs whose first feature says whether layer 1 or layer 2 is needed; layer 0 always is, layer 3 never."""
    draw = torch.Generator().manual_seed(seed)
    pooled = torch.randn(count, LAYERS, 1, WIDTH, generator=draw)
    first = torch.randn(count, generator=draw) > 0
    pooled[:, :, 0, 0] = torch.where(first, 3.0, -3.0)[:, None]
    needed = torch.stack([torch.ones_like(first), first, ~first, torch.zeros_like(first)], 1)
    flips = Flips(
        pooled=pooled,
        keep=torch.ones(count, LAYERS, dtype=torch.bool),
        cost=torch.zeros(count),
        change=torch.where(needed, 2.0, 0.01),
        pairs=torch.zeros(count, LAYERS, LAYERS),
        share=torch.full((count, LAYERS), 0.25),
        floor=torch.zeros(count),
    )
    return flips, needed


@pytest.mark.parametrize("fooled", [False, True])
def test_the_fit_finds_the_feature_that_says_which_layer_is_needed(fooled: bool) -> None:
    """On fresh inputs the decisions are the planted ones; with the feature taken away they cannot be."""
    model, (flips, _), (fresh, needed) = routed(), planted(600, 0), planted(300, 1)
    if fooled:
        flips.pooled[:, :, 0, 0], fresh.pooled[:, :, 0, 0] = 0.0, 0.0
    fit = Fit(steps=200, batch_size=128, learning_rate=0.01)
    figures, multiplier = fit_round(model, flips, 0.5, adaskip.Objective(keep=0.5), fit, seed=0)
    with torch.no_grad():
        decided = read_logits(model.routers, fresh.pooled) > 0
    right = float((decided == needed)[:, 1:3].float().mean())
    assert (right < 0.7) if fooled else (right > 0.98)
    assert fooled or abs(figures["keep"] - 0.5) < 0.03
    assert multiplier >= 0
    if not fooled:
        assert torch.equal(decided, needed)


def test_what_is_held_counts_as_kept_and_its_router_goes_on_learning() -> None:
    """Layer 3 is never needed but held: the budget is met by the others, and its router learns to skip all the same."""
    model, (flips, _) = routed(), planted(600, 0)
    model.hold([3])
    fit = Fit(steps=200, batch_size=128, learning_rate=0.01)
    figures, _ = fit_round(model, flips, 0.75, adaskip.Objective(keep=0.75), fit, seed=0)
    with torch.no_grad():
        decided = read_logits(model.routers, flips.pooled) > 0
    assert abs(figures["keep"] - 0.75) < 0.03
    assert abs(float(decided[:, :3].float().mean()) - 2 / 3) < 0.04
    assert not decided[:, 3].any()


def test_pairs_keep_one_of_two_layers_that_stand_in_for_each_other() -> None:
    """Either of layers 1 and 2 may go, not both: costs without pairs cannot tell, with pairs the fit leaves out one."""
    flips, _ = planted(600, 0)
    flips = replace(flips, change=torch.tensor([2.0, 0.01, 0.01, 0.5]).expand(600, LAYERS))
    pairs = flips.pairs.clone()
    pairs[:, 1, 2] = pairs[:, 2, 1] = 3.0
    for found, both in ((flips, True), (replace(flips, pairs=pairs), False)):
        model = routed()
        fit_round(model, found, 0.5, adaskip.Objective(keep=0.5), Fit(steps=150, learning_rate=0.02), seed=0)
        with torch.no_grad():
            decided = read_logits(model.routers, found.pooled) > 0
        assert bool((~decided[:, 1] & ~decided[:, 2]).float().mean() > 0.9) is both


def test_a_fit_on_a_toy_meets_its_target_and_resumes_bitwise() -> None:
    rows = batches(6)
    objective, fit = adaskip.Objective(keep=0.5), Fit(rounds=3, examples=16, steps=60, learning_rate=0.02)

    def draw(index: int) -> list:
        return rows[2 * index : 2 * index + 2]

    whole, halves, lines = routed(), routed(), []
    frozen = {name: weight.clone() for name, weight in whole.backbone.state_dict().items()}
    fit_from_bounds(whole, draw, objective, fit, after=lambda state, figures: lines.append((state, figures)))
    assert all(torch.equal(frozen[name], weight) for name, weight in whole.backbone.state_dict().items())
    assert [state.round for state, _ in lines] == [1, 2, 3]
    assert [round(figures["target"], 4) for _, figures in lines] == [0.8333, 0.6667, 0.5]
    assert abs(lines[-1][1]["keep"] - 0.5) < 0.1
    with pytest.raises(KeyboardInterrupt):
        fit_from_bounds(halves, draw, objective, fit, after=stop_after_one)
    fit_from_bounds(halves, draw, objective, fit, state=lines[0][0])
    assert all(torch.equal(a, b) for a, b in zip(whole.routers.parameters(), halves.routers.parameters(), strict=True))


def stop_after_one(state: FitState, figures: dict[str, float]) -> None:
    raise KeyboardInterrupt


def test_what_cannot_be_fitted_is_said() -> None:
    plan = adaskip.attach(toys.make("llama").model, adaskip.SkipPlan.static([1]))
    with pytest.raises(ConfigError, match=r"expected one decision a layer and prompt, by learned routers; attach with"):
        survey_flips(plan, batches(1))
    tokens = adaskip.attach(plan.detach(), adaskip.RouterConfig(scope="token"))
    with pytest.raises(ConfigError, match=r"expected one decision a layer and prompt, by learned routers; attach with"):
        survey_flips(tokens, batches(1))
    with pytest.raises(ConfigError) as caught:
        Fit(rounds=0, steps=-1, learning_rate=0)
    assert str(caught.value).count("expected") == 3


FIT = [
    "method=from-bounds",
    "fit.rounds=2",
    "fit.examples=16",
    "fit.steps=20",
    "fit.batch_size=8",
    "objective.warmup=0",
]


@pytest.mark.parametrize("steps", [0, 4])
def test_a_run_from_bounds_is_complete_and_resumes(
    language_model: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    steps: int,
) -> None:
    """Stopped after the first round and again before the tuning: bitwise the routers of the uninterrupted run."""
    arguments = [*SHORT, *FIT, f"trainer.steps={steps}", f"backbone.path={language_model}", f"data.source={data}"]
    run, stopped = tmp_path / "run", tmp_path / "stopped"
    summary = train(load("causal-lm", [*arguments, f"output={run}"])).to_dict()
    files = {path.name for path in run.iterdir()}
    assert files >= {"recipe.resolved.yaml", "env.json", "metrics.csv", "conditions.jsonl", "keep_rates.json"}
    assert files >= {"summary.json", "prices.json", "report.md", "router", runfiles.FIT, runfiles.FIT_ROUTERS}
    assert list(summary["parts"]) == ["price", "fit", *(["train"] if steps else []), "threshold", "check"]
    lines = [json.loads(line) for line in (run / runfiles.FIT).read_text().splitlines()]
    assert [line["round"] for line in lines] == [1, 2]
    assert f"0,fit/keep,{lines[-1]['keep']!r}" in (run / "metrics.csv").read_text()
    assert "`fit/keep`" in (run / "report.md").read_text()
    assert summary["val"]["keep"] <= load("causal-lm").objective.keep + 1e-6

    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    recipe = load("causal-lm", [*arguments, f"output={stopped}"])
    with monkeypatch.context() as patch:
        patch.setattr("adaskip.training.fit_run._save", lambda *args: (save(*args), interrupted()))
        with pytest.raises(KeyboardInterrupt):
            train(recipe)
    assert len((stopped / runfiles.FIT).read_text().splitlines()) == 1
    train(recipe, resume=True)
    expected, resumed = (load_file(f / "router" / "router.safetensors") for f in (run, stopped))
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)
    if steps:
        return
    (stopped / runfiles.FIT_ROUTERS).write_bytes(b"not safetensors")
    with pytest.raises(
        CheckpointError, match=r"fit.safetensors: damaged, or of another model .*; delete it and resume"
    ):
        train(recipe, resume=True)


save = fit_run._save
