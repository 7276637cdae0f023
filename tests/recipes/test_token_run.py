"""Method token-plan from a recipe to a finished run that every verb takes, and on from where it was stopped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import adaskip
from adaskip.errors import ConfigError
from adaskip.recipe import Recipe, load
from adaskip.runfiles import TOKEN_PRICES
from adaskip.stages import SILENT
from adaskip.survey import token_plan
from adaskip.survey.token_plan import TokenPlans
from adaskip.training.data import load_records
from adaskip.verbs.amounts import fitted
from adaskip.verbs.calibrate import calibrate
from adaskip.verbs.check import check
from adaskip.verbs.evaluate import evaluate
from adaskip.verbs.export import export
from adaskip.verbs.generate import answer
from adaskip.verbs.token_plan import plan_tokens
from adaskip.verbs.train import train

SHORT = [
    "method=token-plan",
    "seed=3",
    "router.scope=token",
    "trainer.steps=0",
    "trainer.batch_size=24",
    "objective.keep=0.8",
    "objective.warmup=0",
    "conditions.every=0",
    "conditions.examples=18",
    "data.examples.train=24",
    "data.examples.validation=24",
    "data.examples.calibration=66",
    "data.examples.test=24",
    "tokens.examples=12",
    "tokens.prompt=2",
    "tokens.answer=1",
    "tokens.entry=1",
    "tokens.band=4",
    "tokens.width=2",
    "static.width=2",
    "static.fallback=false",
    "tracking.wandb=disabled",
]


def backbone() -> torch.nn.Module:
    return adaskip.demo.backbone.load()[0]


def recipe(folder: Path) -> Recipe:
    return load("digits-vlm", [*SHORT, f"output={folder}"])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(recipe(tmp_path_factory.mktemp("runs") / "tokens")).folder


def test_a_plan_holds_its_budget_and_the_layers_that_are_dear(run: Path) -> None:
    """Catches a plan that holds the budget of the inputs it was found on alone, and classes that are not saved."""
    summary = json.loads((run / "summary.json").read_text())
    assert summary["budget"] == "held"
    assert summary["val"]["keep"] <= 0.8
    assert summary["static"]["comparison"]["n"] == 24
    model = adaskip.RoutedModel.from_pretrained(run / "router", backbone())
    assert model.target.scope == "token"
    assert model.policy.centres.norm(dim=1).allclose(torch.ones(5))
    assert any(model.policy.skips)
    held = summary["conditions"]["held"]
    assert held
    assert model.policy.held == tuple(held), "whoever loads the routers has them held as well"
    assert not {layer for skip in model.policy.skips for layer in skip} & {*held}


def test_plans_go_a_little_below_the_budget(tmp_path: Path) -> None:
    """Validation inputs may keep more than those planned on; catches plans that end at the budget itself."""
    model = adaskip.attach(backbone(), adaskip.RouterConfig(scope="token")).eval()
    collate, records = adaskip.Collator(adaskip.demo.backbone.load()[1]), load_records("digits-vlm", "train", 12, 0)

    def found(keep: float) -> TokenPlans:
        asked = load("digits-vlm", [*SHORT, f"objective.keep={keep}"])
        return plan_tokens(asked, tmp_path, model, records, collate, SILENT)

    ended = found(0.8).steps
    further = found(ended[-1].keep + 0.005).steps
    assert further[: len(ended)] == ended
    assert further[-1].keep < ended[-1].keep - 0.005


def test_costs_are_of_the_recipes_classes(run: Path) -> None:
    """Their file names what they were measured with; catches a seed or a number of classes that is not the recipe's."""
    with safe_open(run / TOKEN_PRICES, "pt") as file:
        named = file.metadata()
    assert named["inputs"].startswith("12 inputs ")
    assert named["settings"].endswith(" entry=1 classes=(2, 1) seed=3")


def test_its_gauge_is_calibrated_apart_and_judged_on_validation(run: Path) -> None:
    """Catches a gauge that is judged on the inputs it was fitted on, and one that is not exported.

    Stands before the test that calibrates the run, which voids its gauge."""
    summary = json.loads((run / "summary.json").read_text())
    model = adaskip.RoutedModel.from_pretrained(run / "router", backbone())
    assert model.gauge is not None
    assert model.gauge.scored == fitted(recipe(run)) // 3
    assert summary["conditions"]["gauge"]["n"] == summary["conditions"]["joint"]["n"]
    assert check(run).to_dict()["summary"]["gauge"]["n"] > 0
    assert "What a routed pass tells of its own cost" in (run / "report.md").read_text()


def test_every_verb_takes_the_run(run: Path, tmp_path: Path) -> None:
    assert check(run).to_dict()["rows"]
    assert evaluate(run, per_kind=4).mean["keep"] < 1
    assert answer(run, prompt="3 plus 4 ?").to_dict()["layers"] == 12
    export(run, tmp_path / "export")
    assert (tmp_path / "export").is_dir()
    assert calibrate(run, risk=0.9, delta=0.1).to_dict()["keep"] <= 1


def test_a_run_that_was_stopped_goes_on_and_ends_alike(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped while it prices; catches costs that are measured again, and classes that are drawn anew."""
    folder, measured = tmp_path / "tokens", [0]
    measure = token_plan._Prices._measure

    def stopping(*args):
        measured[0] += 1
        if measured[0] == 4:
            raise KeyboardInterrupt
        return measure(*args)

    with monkeypatch.context() as patch:
        patch.setattr(token_plan._Prices, "_measure", stopping)
        with pytest.raises(KeyboardInterrupt):
            train(recipe(folder))
        assert (folder / TOKEN_PRICES).is_file()
        patch.setattr(token_plan._Prices, "_measure", lambda *args: measured.append(1) or measure(*args))
        train(load(folder / "recipe.resolved.yaml"), resume=True)
    known = len(load_file(run / TOKEN_PRICES)["figures"])
    assert len(measured) - 1 == known - 3
    one, other = (adaskip.RoutedModel.from_pretrained(place / "router", backbone()) for place in (run, folder))
    assert one.policy.to_dict() == other.policy.to_dict()
    assert torch.equal(one.policy.centres, other.policy.centres)


def test_a_recipe_that_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"token-plan: expected trainer.steps 0 .* router.scope token, got 0 and"):
        load("digits-vlm", [*SHORT, "router.scope=prompt"])
