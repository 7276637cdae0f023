"""The gradient of a drawn path's cost: unbiased by enumeration, forward passes only, resumed, refused, trained with."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor

import adaskip
from adaskip.errors import ConfigError, DataError
from adaskip.policy import Policy
from adaskip.recipe import load
from adaskip.runtime import gates
from adaskip.survey.flips import PathCost
from adaskip.theory.costs import predicted
from adaskip.training.gradient import check_strategy, draw_layers, draw_path, slope_of
from adaskip.training.sharding import ShardedBackbone
from adaskip.verbs.train import train
from tests import toys
from tests.own_data import SHORT
from tests.tuning import DATA, batches, loader, planted, trainer, weights, with_answers

LAYERS = 4
BIASES = [0.4, -0.7, 1.1, 0.1]
FLIPS: dict[str, Any] = {"gradient": "flips", "bound_weight": 0.0, "warmup": 0.0}


def biased(family: str, **config: Any) -> adaskip.RoutedModel:
    """A toy whose routers say the same of every input, so that decisions of a path are independent."""
    model = adaskip.attach(toys.make(family).model, adaskip.RouterConfig(threshold=0.2, **config))
    with torch.no_grad():
        for head, bias in zip(model.routers, BIASES, strict=True):
            head.outer.bias.fill_(bias)
    return model


def dense_logits(model: adaskip.RoutedModel, batch: adaskip.Batch) -> Tensor:
    with model.dense(), torch.no_grad():
        return model(**batch.arguments()).logits


def slopes(model: adaskip.RoutedModel) -> Tensor:
    """The gradient that has arrived at each router's bias."""
    return torch.stack([head.outer.bias.grad[0] for head in model.routers])


@pytest.mark.parametrize(("family", "group"), [("llama", "all"), ("llava", "vision")])
def test_the_mean_over_all_paths_is_the_gradient_of_the_expected_cost(
    family: str, group: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Would catch: a wrong sign, a wrong law of the draws, a temperature or threshold or part of the cost left out."""
    model, temperature = biased(family, group=group), 0.7
    batch = with_answers(toys.make(family).batch([5, 7, 4]))
    dense = dense_logits(model, batch)
    goal = adaskip.Objective(gradient="flips", flips=LAYERS, task_weight=0.5)
    cost = PathCost(predicted(dense, batch.supervised), batch, goal.task_weight)
    biases = torch.tensor(BIASES, dtype=torch.float64, requires_grad=True)
    law = torch.sigmoid((biases - 0.2) / temperature)
    expected: Any = 0.0
    found = torch.zeros(LAYERS)
    for path in product([True, False], repeat=LAYERS):
        keep = torch.tensor(path)
        chance = torch.where(keep, law, 1 - law).prod()
        with torch.no_grad():
            logits = model(**batch.arguments(), routing=keep[:, None].expand(-1, len(batch))).logits
        expected = expected + chance * cost(predicted(logits, batch.supervised)).mean()
        turn = iter(path)
        drawn = lambda logits, *_: logits + (100.0 if next(turn) else -100.0)  # noqa: B023, E731
        monkeypatch.setattr(gates, "perturb", drawn)
        model.policy.zero_grad()
        kl, task = draw_path(model, batch, dense, goal, torch.Generator(), temperature)
        (kl + goal.task_weight * task).backward()
        assert model.routing.keep.T.equal(keep.expand(len(batch), -1))  # not that of the last rerun
        found += chance.detach() * slopes(model)
    expected.backward()
    assert torch.allclose(found.double(), biases.grad, rtol=1e-3, atol=1e-6)
    assert biases.grad.abs().min() > 1e-3


def answers_of(counts: list[int]) -> adaskip.Batch:
    """Prompts whose answers are so many tokens long."""
    inputs = toys.make("llama").batch([8] * len(counts))
    labels = inputs["input_ids"].clone()
    for row, count in zip(labels, counts, strict=True):
        row[:-count] = -100
    return adaskip.Batch(inputs, labels, labels == -100)


@pytest.mark.parametrize("gradient", ["straight-through", "flips"])
def test_a_drawn_path_costs_what_it_costs_each_input_in_the_mean(gradient: Any) -> None:
    """Answers of one, three and five tokens, along the path that was drawn, run again.

    Catches a mean over tokens, a KL the wrong way round, another token's label, and a slope that adds to the value.
    """
    model, batch = biased("llama"), answers_of([1, 3, 5])
    dense = dense_logits(model, batch)
    goal = adaskip.Objective(**{**FLIPS, "gradient": gradient})
    kl, task = draw_path(model, batch, dense, goal, torch.Generator().manual_seed(1), 0.7)
    keep, cost = model.routing.keep, PathCost(predicted(dense, batch.supervised), batch, 1.0)
    assert 0 < keep.float().mean() < 1
    with torch.no_grad():
        logits = predicted(model(**batch.arguments(), routing=keep).logits, batch.supervised)
    assert float(kl.detach()) == pytest.approx(float(cost.kl(logits).mean()), rel=1e-4)
    assert float(task.detach()) == pytest.approx(float(cost.task(logits).mean()), rel=1e-4)


@pytest.mark.parametrize("gradient", ["flips", "straight-through"])
def test_the_temperature_is_that_of_draws(gradient: Any) -> None:
    """Biases .4, -.7, 1.1 and .1 at a threshold of .2: near temperature 0 nothing is left to chance, at 1000 all is."""
    model, batch = biased("llama"), answers_of([1] * 64)
    dense, goal = dense_logits(model, batch), adaskip.Objective(**FLIPS | {"gradient": gradient})
    draw_path(model, batch, dense, goal, torch.Generator().manual_seed(0), 1e-4)
    assert model.routing.keep.T.tolist() == [[True, False, True, False]] * 64
    draw_path(model, batch, dense, goal, torch.Generator().manual_seed(0), 1000.0)
    assert ((model.routing.keep.float().mean(1) - 0.5).abs() < 0.2).all()


def test_the_temperature_is_that_of_straight_through_slopes() -> None:
    """A gate hardly slopes at a high temperature; catches one left out."""
    model, batch, found = biased("llama"), answers_of([1] * 16), []
    for temperature in (1.0, 1000.0):
        model.policy.zero_grad()
        goal, noise = adaskip.Objective(bound_weight=0.0), torch.Generator().manual_seed(0)
        draw_path(model, batch, dense_logits(model, batch), goal, noise, temperature)[0].backward()
        found.append(slopes(model).abs())
    assert (found[1] < 0.1 * found[0]).all()


def test_the_temperature_falls_geometrically_to_the_last_step() -> None:
    """From 1 to .01 in 4 steps: 1, .32, .1, .03 and, where training goes on, .01; without a last one it stays."""
    model = biased("llama")
    goal = adaskip.Objective(bound_weight=0.0)
    falling = adaskip.RouterTuner(model, goal, steps=4, last_temperature=0.01)
    found = []
    for step in (0, 1, 2, 3, 4, 9):
        falling._trainer = SimpleNamespace(global_step=step)  # type: ignore[assignment]
        falling._length = 4
        found.append(falling.temperature())
    assert found == pytest.approx([1.0, 10**-0.5, 0.1, 10**-1.5, 0.01, 0.01])
    staying = adaskip.RouterTuner(model, goal, steps=4, temperature=0.7)
    staying._trainer = SimpleNamespace(global_step=3)  # type: ignore[assignment]
    assert staying.temperature() == 0.7
    with pytest.raises(ConfigError, match="last_temperature: expected a number > 0, got 0"):
        adaskip.RouterTuner(model, goal, last_temperature=0)


def test_a_flip_counts_for_those_that_were_not_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer of four, drawn with chance 1/4, moves its router four times as far as if it were drawn always."""
    model, batch, found = biased("llama"), answers_of([1, 2, 3]), []
    goal = adaskip.Objective(**FLIPS)
    for chance in (1.0, 0.25):
        drawn = torch.full((1, 3), 2), torch.full((1, 3), chance)
        monkeypatch.setattr("adaskip.training.gradient.draw_layers", lambda *_, drawn=drawn: drawn)
        model.policy.zero_grad()
        draw_path(model, batch, dense_logits(model, batch), goal, torch.Generator().manual_seed(0), 1.0)[0].backward()
        found.append(slopes(model))
    assert found[0][2] != 0
    assert not found[0][[0, 1, 3]].any()
    assert torch.allclose(found[1], 4 * found[0])


def test_layers_are_drawn_by_how_far_a_logit_moves_them() -> None:
    """p (1 - p) at the threshold and the temperature of the draws; catches ones that draw what is settled."""
    model = biased("llama")
    model(**answers_of([1, 2]).arguments())
    p = torch.sigmoid((torch.tensor(BIASES) - 0.2) / 0.5)
    assert torch.allclose(slope_of(model, 0.5), (p * (1 - p))[:, None].expand(-1, 2))


def test_rows_draw_layers_apart_and_by_their_own_weights() -> None:
    """Two rows that want other layers, and layers without any weight; catches one draw, or one law, for a batch."""
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).repeat(1, 500)
    layers, chance = draw_layers(weight, 1, torch.Generator().manual_seed(0))
    assert layers[0].tolist() == [0, 1] * 500
    assert torch.allclose(chance, torch.ones(1, 1000), atol=1e-5)
    layers, chance = draw_layers(torch.ones(2, 1000), 1, torch.Generator().manual_seed(0))
    assert 400 < int(layers.sum()) < 600
    layers, chance = draw_layers(torch.zeros(2, 1000), 1, torch.Generator().manual_seed(0))
    assert 400 < int(layers.sum()) < 600
    assert chance.unique().tolist() == [0.5]


def test_an_input_without_an_answer_is_refused() -> None:
    model, batch = biased("llama"), answers_of([1, 2])
    batch.labels[1] = -100
    with pytest.raises(
        DataError, match=r"rows \[1\] of a batch have no answer to learn from: .* leave such inputs out"
    ):
        draw_path(model, batch, torch.zeros(()), adaskip.Objective(**FLIPS), torch.Generator(), 1.0)


def test_layers_drawn_stand_for_all() -> None:
    """Would catch: a chance that is not the one drawn by; runs that leave a layer out, the last above all."""
    rows = 60_000
    weight = torch.tensor([0.25, 0.04, 0.2, 0.1, 0.0, 0.25, 0.06])[:, None].expand(-1, rows)
    for count, parts in ((1, 1), (3, 3), (99, 7)):
        layers, chance = draw_layers(weight, count, torch.Generator().manual_seed(0))
        assert layers.shape == chance.shape == (parts, rows)
        assert torch.equal(layers.sort(0).values, layers)
        drawn = torch.zeros(7).index_add(0, layers.flatten(), (1 / chance / rows).flatten())
        drawn[4] = 1.0  # whose weight is nothing is hardly ever drawn
        assert torch.allclose(drawn, torch.ones(7), atol=0.04)


def test_draws_follow_the_law_that_their_gradient_is_of() -> None:
    """Would catch: noise that forgets the temperature; a held layer that is drawn out, or no longer learned of."""
    model = biased("llama", held=(1,))
    batch, noise, kept = batches(1, rows=32)[0], torch.Generator().manual_seed(0), torch.zeros(LAYERS)
    for _ in range(40):
        with model.explore(noise, 0.5, soft=False):
            model(**batch.arguments())
        kept += model.routing.keep.float().mean(1) / 40
    law = model.runtime.routing.gates
    expected = torch.sigmoid((torch.tensor(BIASES) - 0.2) / 0.5)
    expected[1] = 1.0
    assert torch.allclose(law, expected[:, None].expand_as(law), atol=1e-6)
    assert torch.allclose(kept, expected, atol=0.04)
    law.sum().backward()
    assert (slopes(model) > 0).all()


def test_nothing_is_propagated_through_the_backbone() -> None:
    """Would catch: a graph through the model, which is what costs the memory, also where its weights want gradients."""
    model = biased("llama").train()
    model.backbone.requires_grad_()
    outputs: list[Tensor] = []
    model.backbone.register_forward_hook(lambda *args: outputs.append(args[-1].logits))
    batch = batches(1)[0]
    goal = adaskip.Objective(gradient="flips", flips=2)
    kl, task = draw_path(model, batch, dense_logits(model, batch), goal, torch.Generator().manual_seed(0), 1.0)
    (kl + task).backward()
    assert len(outputs) == 1 + 1 + 2  # dense, the path, a rerun a flip
    assert not any(logits.requires_grad for logits in outputs)
    assert all(weight.grad is None for weight in model.backbone.parameters())
    assert slopes(model).abs().min() > 0


def tuner(**options: Any) -> adaskip.RouterTuner:
    goal = adaskip.Objective(keep=0.75, **{**FLIPS, **options})
    return adaskip.RouterTuner(planted(0.0), goal, learning_rate=0.05, steps=40, seed=2)


def test_routers_learn_which_layer_is_free(tmp_path: Path) -> None:
    """Would catch: a sign or a budget that points the wrong way in the loop as a whole."""
    tuned = tuner(flips=2)
    trainer(tmp_path, steps=40).fit(tuned, loader(DATA[:8]))
    with torch.no_grad():
        tuned.model.eval()(**DATA[8].arguments())
    kept = tuned.model.routing.keep.float().mean(1)
    assert kept[2] == 0
    assert kept[[0, 1, 3]].min() > 0.6


def test_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    """Would catch: draws of layers or paths that are no function of seed, step and micro-batch."""
    whole, rest = tuner(), tuner()
    saver = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, save_on_train_epoch_end=True)
    options: dict[str, Any] = {"steps": -1, "max_epochs": 2, "accumulate_grad_batches": 2}
    trainer(tmp_path, **options, callbacks=[saver], saves=True).fit(whole, loader(DATA[:4]))
    trainer(tmp_path, **options).fit(rest, loader(DATA[:4]), ckpt_path=str(tmp_path / "step=2.ckpt"))
    assert torch.equal(weights(rest), weights(whole))
    assert torch.equal(rest.multiplier, whole.multiplier)
    assert not torch.equal(weights(tuner()), weights(whole))


class Coin(Policy):
    """Decides by a boolean that has a parameter, but no gradient."""

    kind = "coin-of-a-test"

    def __init__(self) -> None:
        super().__init__()
        self.level = torch.nn.Parameter(torch.zeros(()))

    def decide(self, layer: int, states: Tensor, request: Any) -> Tensor:
        return torch.ones(len(states), dtype=torch.bool)


def test_what_flips_cannot_do_is_said(tmp_path: Path) -> None:
    """Would catch: a traceback, or a gradient that means nothing, where a plain sentence belongs."""
    goal = adaskip.Objective(**FLIPS)
    with pytest.raises(ConfigError) as caught:
        adaskip.Objective(gradient="slopes", flips=0)  # type: ignore[arg-type]
    assert "gradient: expected straight-through | flips, got 'slopes'" in str(caught.value)
    assert "flips: expected an integer >= 1, got 0" in str(caught.value)
    with pytest.raises(ConfigError, match=r"objective.gradient: expected straight-through for .* token, since"):
        adaskip.RouterTuner(adaskip.attach(toys.make("llama").model, adaskip.RouterConfig(scope="token")), goal)
    with pytest.raises(ConfigError, match=r"\n  objective.gradient: expected .* \(scope prompt\), got 'flips'$"):
        load("causal-lm", ["objective.gradient=flips", "router.scope=token"])
    for other in (FSDPStrategy(), ModelParallelStrategy()):
        for objective in (goal, adaskip.Objective()):
            with pytest.raises(ConfigError, match=r"(FSDP|ModelParallel)Strategy would share out routers .*: fsdp2\)"):
                check_strategy(objective, SimpleNamespace(strategy=other))  # type: ignore[arg-type]
    for strategy in (ShardedBackbone(), DeepSpeedStrategy.__new__(DeepSpeedStrategy)):
        with pytest.raises(ConfigError, match=r"got (ShardedBackbone|DeepSpeedStrategy), under which .* use strategy"):
            check_strategy(goal, SimpleNamespace(strategy=strategy))  # type: ignore[arg-type]
        check_strategy(adaskip.Objective(), SimpleNamespace(strategy=strategy))  # type: ignore[arg-type]
    coin = adaskip.RouterTuner(adaskip.attach(toys.make("llama").model, Coin()), goal)
    with pytest.raises(ConfigError, match="decide returned booleans, through which nothing can be learned"):
        trainer(tmp_path).fit(coin, loader(DATA[:2]))


def test_a_recipe_trains_with_flips(
    language_model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Would catch: a key that the recipe takes and training forgets."""
    counts: list[int] = []

    def counted(weight: Tensor, count: int, noise: torch.Generator) -> Any:
        counts.append(count)
        return draw_layers(weight, count, noise)

    monkeypatch.setattr("adaskip.training.gradient.draw_layers", counted)
    source = [f"backbone.path={language_model}", f"data.source={data}", f"output={tmp_path / 'run'}"]
    recipe = load("causal-lm", [*SHORT, *source, "objective.gradient=flips", "objective.flips=2"])
    assert train(recipe).to_dict()["val"]["keep"] <= recipe.objective.keep + 1e-6
    assert counts == [2] * 4
    assert "gradient: flips" in (tmp_path / "run" / "recipe.resolved.yaml").read_text()
