"""`adaskip calibrate` on a small run of the embedded model: what it certifies, stores, and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import adaskip
from adaskip.backbone.load import load_backbone
from adaskip.batch import exact_match
from adaskip.errors import ConfigError, DataError
from adaskip.generate.greedy import greedy_processors
from adaskip.recipe import dump, load
from adaskip.training.data import Collator
from adaskip.verbs.calibrate import KEEP_ALL, answered, calibrate, digest, disagreement, fresh_records
from adaskip.verbs.run import Run
from adaskip.verbs.splits import records

SMALL = [
    "conditions.examples=6",
    "data.examples.validation=24",
    "data.examples.calibration=60",
    "trainer.batch_size=24",
    "tracking.wandb=disabled",
]


def make_run(folder: Path, spread: float, first: float = 0.0) -> Path:
    """A run folder with untrained routers whose logits spread like `spread`; `first` lowers layer 0's."""
    recipe = load("digits-vlm", [*SMALL, f"output={folder}"])
    folder.mkdir()
    (folder / "recipe.resolved.yaml").write_text(dump(recipe))
    model = adaskip.attach(load_backbone("digits-vlm"), recipe.router)
    draw = torch.Generator().manual_seed(0)
    for layer, head in enumerate(model.routers):
        with torch.no_grad():
            head.outer.weight.copy_(spread * torch.randn(head.outer.weight.shape, generator=draw))
            head.outer.bias.fill_(-first if layer == 0 else 6.0 - layer)  # late layers go first
    model.save_pretrained(folder / "router")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("calibrate") / "run", spread=0.5, first=-8.0)


@pytest.fixture(scope="module")
def found(run: Path) -> dict:
    return calibrate(run, risk=0.2, delta=0.2).to_dict()


def by_generation(model: adaskip.RoutedModel, batch: adaskip.Batch) -> list[bool]:
    """Whether the routed answer differs from the dense one, both generated, one input at a time."""
    options = {"max_new_tokens": 16, "do_sample": False}
    with model.dense():
        dense = model.generate(**batch.inputs, **options)
    routed = model.generate(**batch.inputs, **options)
    width = max(dense.shape[1], routed.shape[1])
    pad = [torch.nn.functional.pad(x, (0, width - x.shape[1])) for x in (dense, routed)]
    return (pad[0] != pad[1]).any(1).tolist()


def test_the_losses_are_those_of_generation(run: Path, found: dict) -> None:
    loaded = Run.open(run)
    batch = Collator(loaded.processor, answers=False)(fresh_records(loaded.recipe, 1, ""))
    assert found["n"] == len(batch.answer) == 48
    losses = []
    for step in found["steps"][:: max(1, len(found["steps"]) // 3)] + found["steps"][-1:]:
        loaded.model.set_threshold(step["threshold"])
        told = by_generation(loaded.model, batch)
        losses.append(sum(told) / len(told))
        assert step["loss"] == pytest.approx(losses[-1])
        assert step["keep"] == pytest.approx(float(loaded.model.routing.keep_rate.mean()), abs=0.02)
    assert losses[-1] > 0
    assert (found["generate_checked"], found["generate_differs"]) == (24, 0)


@pytest.mark.parametrize(
    "options",
    [{"suppress_tokens": "common"}, {"repetition_penalty": 4.0}, {"min_new_tokens": 4, "no_repeat_ngram_size": 1}],
    ids=lambda options: "-".join(options),
)
def test_the_losses_are_those_of_generation_under_logits_processors(run: Path, options: dict) -> None:
    """A generation config that changes logits changes both answers; the teacher-forced loss follows it exactly."""
    loaded = Run.open(run)
    model = loaded.model
    batch = Collator(loaded.processor, answers=False)(fresh_records(loaded.recipe, 1, ""))
    if options.get("suppress_tokens"):
        with model.dense():
            first = model(**batch.inputs).logits[:, -1].argmax(-1)
        options = {"suppress_tokens": first.unique().tolist()}
    model.backbone.generation_config.update(**options)
    batch_answered = answered(model, batch, 16, 0)
    assert batch_answered.processors
    for threshold in (-6.0, -5.5, -5.0, -4.5, -4.0, -3.0, -2.0, 0.0, 2.0):
        model.set_threshold(threshold)
        expected = by_generation(model, batch)
        if 0 < sum(expected) < len(expected):
            break
    assert 0 < sum(expected) < len(expected)
    assert disagreement(model, batch_answered)[0].tolist() == expected
    raw = model(**batch_answered.arguments()).logits
    assert (~exact_match(raw, batch_answered.labels)).tolist() != expected  # what the raw logits rank is not told


def test_a_generation_that_is_not_greedy_is_refused(run: Path) -> None:
    loaded = Run.open(run)
    inputs = Collator(loaded.processor, answers=False)(fresh_records(loaded.recipe, 1, "")[:2]).inputs
    assert list(greedy_processors(loaded.model, inputs, 4)) == []
    config = loaded.model.backbone.generation_config
    config.prompt_lookup_num_tokens = 2
    with pytest.raises(ConfigError, match="expected greedy decoding, got assisted_generation; unset what asks for it"):
        greedy_processors(loaded.model, inputs, 4)
    config.prompt_lookup_num_tokens, config.guidance_scale = None, 1.5
    with pytest.raises(ConfigError, match=r"guidance_scale=1.5 runs the model twice a token.*= None"):
        greedy_processors(loaded.model, inputs, 4)


def test_what_is_stored_is_applied(run: Path, found: dict) -> None:
    assert found["ok"]
    assert found["steps"][-1]["p_value"] > found["delta"]
    certified = found["steps"][-2]
    assert (found["threshold"], found["keep"]) == (certified["threshold"], certified["keep"])
    assert certified["p_value"] <= found["delta"]
    assert found["keep"] < 1
    model = adaskip.RoutedModel.from_pretrained(run / "router")
    assert model.policy.threshold == found["threshold"]
    assert model.certificate == json.loads((run / "calibration.json").read_text())
    assert model.certificate == {name: value for name, value in found.items() if name != "ok"}
    card = (run / "router" / "README.md").read_text()
    assert "differ on at most 0.2 of the inputs, with probability 0.8" in card
    assert found["data"]["digest"] in card
    assert set(model.facts) == {"target_keep", "validation_keep", "validation_accuracy"}
    model.set_threshold(0.0)
    assert model.certificate is None


def test_calibrating_again_asks_the_same_question(run: Path, found: dict) -> None:
    again = calibrate(run, risk=0.2, delta=0.2).to_dict()
    assert again == found


def test_calibration_inputs_are_fresh(run: Path, found: dict) -> None:
    recipe = load(run / "recipe.resolved.yaml")
    fresh = fresh_records(recipe, 1, "")
    every = records(recipe, "calibration")
    assert digest(every[12:]) == digest(fresh) == found["data"]["digest"]
    assert digest(every[:12]) != digest(fresh)
    assert digest(fresh[:-1]) != digest(fresh) != digest([*fresh[:-1], {**fresh[-1], "prompt": "x"}])
    seen = {digest([record]) for split in ("train", "validation") for record in records(recipe, split)}
    assert not seen & {digest([record]) for record in fresh}


def test_nothing_certified_means_dense(tmp_path: Path) -> None:
    """Routers that would skip the first layer first, which this model cannot do without."""
    folder = make_run(tmp_path / "bad", spread=0.0, first=20.0)
    found = calibrate(folder, risk=0.1, delta=0.1).to_dict()
    assert (found["ok"], found["threshold"], found["keep"]) == (False, None, 1.0)
    model = adaskip.RoutedModel.from_pretrained(folder / "router")
    assert model.policy.threshold == KEEP_ALL
    assert "every layer runs" in (folder / "router" / "README.md").read_text()
    loaded = Run.open(folder)
    batch = Collator(loaded.processor, answers=False)(fresh_records(loaded.recipe, 1, "")[:6])
    assert not any(by_generation(model, batch))
    assert model.routing.keep.all()


def test_what_cannot_be_certified_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"needs at least 114 inputs.* used 12 calibration records and left 48\. Give"):
        calibrate(run)
    with pytest.raises(ConfigError, match=r"risk: expected a number in \(0, 1\), got 1.5"):
        calibrate(run, risk=1.5)
    flat = make_run(tmp_path / "flat", spread=0.0)
    loaded = adaskip.RoutedModel.from_pretrained(flat / "router")
    for head in loaded.routers:
        torch.nn.init.zeros_(head.outer.bias)
    loaded.save_pretrained(flat / "router")
    with pytest.raises(ConfigError, match="one logit; train them before calibrating"):
        calibrate(flat, risk=0.2, delta=0.2)
