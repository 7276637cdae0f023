"""The threshold search: logits of any scale, ties, budgets that cannot be met; and what `train` says of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import adaskip
from adaskip.batch import Batch
from adaskip.errors import ConfigError, DataError
from adaskip.plan import KEEP_ALL
from adaskip.recipe import load
from adaskip.report import write
from adaskip.verbs.budget import Budget, hold_budget, quality
from adaskip.verbs.train import train
from tests import toys

SHORT = [
    "trainer.steps=2",
    "trainer.batch_size=8",
    "trainer.checkpoint_every=2",
    "trainer.validate_every=2",
    "trainer.progress=false",
    "conditions.every=0",
    "conditions.examples=8",
    "data.examples.train=16",
    "data.examples.validation=12",
    "data.examples.calibration=16",
    "tracking.wandb=disabled",
]


def routed(
    scale: float = 1.0, shift: float = 0.0, name: str = "llama", **config: object
) -> tuple[adaskip.RoutedModel, list[dict]]:
    """Routers whose logits spread like ``scale`` around ``shift``, and prompts with an answer of one token."""
    toy = toys.make(name)
    model = adaskip.attach(toy.model, adaskip.RouterConfig(**config))  # type: ignore[arg-type]
    draw = torch.Generator().manual_seed(3)
    for head in model.routers:
        with torch.no_grad():
            head.outer.weight.copy_(scale * torch.randn(head.outer.weight.shape, generator=draw))
            head.outer.bias.fill_(shift)
    batches = []
    for seed in range(4):
        inputs = toy.batch([9, 5, 7, 6, 8, 4, 9, 5], seed=seed)
        labels = torch.full_like(inputs["input_ids"], -100)
        labels[:, -1] = inputs["input_ids"][:, -1]
        mask = inputs["attention_mask"].bool() & (labels < 0)
        batches.append(Batch(inputs, labels, mask))
    return model, batches


@pytest.mark.parametrize("scope", ["prompt", "token"])
@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (0.3, 19.0), (1e-4, -2.0), (1e4, -3e5), (2.0, 1e3)])
def test_logits_of_any_scale(scale: float, shift: float, scope: str) -> None:
    """Routers fitted from bounds have logits of 17 to 21; a search of 16 around 0 ends at keep 1 without a word."""
    model, batches = routed(scale, shift, scope=scope)
    found = hold_budget(model, batches, 0.7)
    keep, _ = quality(model, batches)
    assert model.policy.threshold == found.threshold
    assert keep == pytest.approx(found.keep)
    assert 0.7 - 0.06 <= keep <= 0.7 + 1e-9
    assert found.met


@pytest.mark.parametrize("scope", ["prompt", "token"])
@pytest.mark.parametrize("shift", [3e12, -3e12, 3e30, -3e30])
def test_logits_beyond_any_round_number(shift: float, scope: str) -> None:
    """Would catch: a threshold for "every layer runs" that such logits pass, and a budget missed for a wrong reason."""
    model, batches = routed(abs(shift) / 10, shift, scope=scope)
    for batch in batches:
        with model.keep_all():
            model(**batch.arguments())
        assert model.routing.keep_rate.min() == 1
    found = hold_budget(model, batches, 0.7)
    assert found.met
    assert (found.least, quality(model, batches)[0]) == (0, pytest.approx(found.keep))
    assert found.keep >= 0.64


def test_every_layer_runs_though_its_logit_is_no_number() -> None:
    """Would catch: `keep_all` as a mere comparison, by which a logit of NaN or -inf leaves the layer out."""
    model, batches = routed(0.0)
    with torch.no_grad():
        for head, bias in zip(model.routers, (float("nan"), float("-inf"), float("inf"), KEEP_ALL), strict=True):
            head.outer.bias.fill_(bias)
    with model.keep_all():
        model(**batches[0].arguments())
    assert model.routing.keep.all()
    model(**batches[0].arguments())
    assert model.routing.keep.float().mean() == 0.25


def test_nothing_better_lies_between() -> None:
    """A search that stops early leaves compute unused: no other logit as a threshold comes closer from below."""
    model, batches = routed()
    found = hold_budget(model, batches, 0.55)
    values: list[float] = []
    for batch in batches:
        model(**batch.arguments())
        values += model.routing.decided.tolist()
    rates = []
    for value in values:
        model.set_threshold(value)
        rates.append(quality(model, batches)[0])
    below = [rate for rate in rates if rate <= 0.55]
    assert found.keep >= max(below) - 0.002


def test_equal_logits_leave_two_paths() -> None:
    """Untrained routers give every layer one logit: all run or none; the far lower one is taken, and said to be it."""
    model, batches = routed(0.0, 25.0)
    found = hold_budget(model, batches, 0.6)
    assert (found.keep, found.threshold, quality(model, batches)[0]) == (0.0, 25.0, 0.0)
    assert found.met
    assert "0.600 below what was asked: the routers decide so coarsely" in found.sentence


def test_two_distinct_paths() -> None:
    """One layer's logit differs for half of the inputs: three keep rates exist, and the right one is found."""
    model, batches = routed(0.0, 21.0)
    with torch.no_grad():
        model.routers[2].outer.bias.fill_(17.0)
    found = hold_budget(model, batches, 0.8)
    assert (found.threshold, found.keep) == (17.0, 0.75)


def test_keep_of_one_runs_everything() -> None:
    """A budget of the whole model is met by running it, whatever the logits are."""
    model, batches = routed(1.0, -30.0)
    assert hold_budget(model, batches, 1.0).keep == 1.0
    assert quality(model, batches)[0] == 1.0


def test_held_layers_miss_the_budget_in_words() -> None:
    """Three of four layers are held: half of the compute cannot be saved, and the reason is named."""
    model, batches = routed(held=(0, 1, 3))
    found = hold_budget(model, batches, 0.5)
    assert not found.met
    assert found.keep == found.least == 0.75
    assert "objective.keep=0.5 was asked for and a mean keep rate of 0.750 reached" in found.sentence
    assert "3 of 4 layers are held and run whatever their routers say (0, 1, 3)" in found.sentence
    assert "Ask for at least 0.75" in found.sentence
    assert found.to_dict()["budget"] == "missed"


def test_vision_tokens_alone_cannot_meet_a_small_budget() -> None:
    """Group vision leaves text running: the sentence says so instead of a silent keep rate above the target."""
    model, batches = routed(name="llava", group="vision")
    found = hold_budget(model, batches, 0.05)
    assert not found.met
    assert "text tokens run every layer under router.group=vision" in found.sentence
    assert quality(model, batches)[0] == pytest.approx(found.least)


def test_logits_that_are_not_finite_are_named() -> None:
    """Training that diverged leaves NaN; no threshold orders it, and skipping everything is no answer."""
    model, batches = routed(float("nan"))
    with pytest.raises(DataError, match="logits of the routers are not finite"):
        hold_budget(model, batches, 0.5)


def test_a_budget_just_missed_by_rounding_is_met() -> None:
    """0.75 asked for and 0.75 kept, up to float64's last digit, is no missed budget."""
    assert Budget(0.75, 0.75 + 1e-15, 0.0, 0.5).met


def test_train_says_that_the_budget_was_missed(tmp_path: Path) -> None:
    """Ten of twelve layers held from the start and keep=.5: the run is saved, and says missed in all places."""
    folder = tmp_path / "run"
    held = "router.held=[0,1,2,3,4,5,6,7,8,9]"
    done = train(load("digits-vlm", [*SHORT, held, "objective.keep=0.5", f"output={folder}"])).to_dict()
    assert done["ok"] is False
    stored = json.loads((folder / "summary.json").read_text())
    assert (stored["budget"], stored["ok"]) == ("missed", False)
    assert stored["reached_keep"] == pytest.approx(10 / 12)
    assert "10 of 12 layers are held" in stored["budget_sentence"]
    assert adaskip.RoutedModel.from_pretrained(folder / "router").policy.threshold == stored["threshold"]
    assert "**budget: missed**" in write(folder).read_text()


def test_behind_a_trainer_of_ones_own() -> None:
    """Catches a search in training mode, where gates are drawn, and a data loader that can be read only once."""
    model, batches = routed(1.0, 0.0)
    model.train()
    found = adaskip.hold_budget(model, iter(batches), 0.7)
    assert model.training
    keep, _ = quality(model.eval(), batches)
    assert (keep, found.met) == (pytest.approx(found.keep), True)
    with pytest.raises(DataError, match="expected batches of validation inputs, got none"):
        adaskip.hold_budget(model, [], 0.7)
    planned = adaskip.attach(model.detach(), adaskip.SkipPlan.static([0]))
    with pytest.raises(ConfigError, match="a policy of kind 'static' has no threshold"):
        adaskip.hold_budget(planned, batches, 0.7)
