"""A method of the field from a recipe to a finished run that every verb takes, and on from where it was stopped."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoProcessor

import adaskip
from adaskip.errors import ConfigError
from adaskip.methods import method as methods
from adaskip.methods.names import METHODS
from adaskip.recipe import Recipe, load, recipes
from adaskip.runfiles import EVIDENCE
from adaskip.survey import ledger
from adaskip.training.data import load_records
from adaskip.verbs import choice
from adaskip.verbs.check import check
from adaskip.verbs.entries import Named, read_entries
from adaskip.verbs.evaluate import evaluate
from adaskip.verbs.export import export
from adaskip.verbs.generate import answer
from adaskip.verbs.subject import open_subject
from adaskip.verbs.train import train

SHORT = [
    "trainer.batch_size=24",
    "conditions.examples=18",
    "data.examples.train=24",
    "data.examples.validation=24",
    "data.examples.calibration=36",
    "data.examples.test=24",
    "tracking.wandb=disabled",
]


def recipe(name: str, folder: Path, *more: str) -> Recipe:
    return load(name, [*SHORT, f"output={folder}", *more])


@pytest.mark.parametrize(
    ("name", "kind"), [("block-influence", "static"), ("fastv", "fastv"), ("skip-vision", "skip_vision")]
)
def test_every_verb_takes_what_a_method_chose(name: str, kind: str, tmp_path: Path) -> None:
    """A plan, a policy of single tokens, one that rewrites what enters; catches a choice that is saved as routers."""
    result = train(recipe(name, tmp_path / "run"))
    summary = json.loads((result.folder / "summary.json").read_text())
    keep = load(name).objective.keep
    assert (summary["budget"], result.steps) == ("held", 0)
    assert keep - 0.1 < summary["val"]["keep"] <= keep
    model = adaskip.RoutedModel.from_pretrained(result.folder / "router", adaskip.demo.backbone.load()[0])
    assert model.policy.kind == kind
    model.detach()
    (entry,) = read_entries([Named(result.folder)], open_subject("digits-vlm", None, load(name).router.group), tmp_path)
    assert entry.policy == f"{load(name).method}-run", "apart from what a comparison chooses by itself"
    assert not (result.folder / EVIDENCE).exists(), "nothing dear was looked at"
    assert check(result.folder).to_dict()["rows"]
    assert evaluate(result.folder, per_kind=4).mean["keep"] < 1
    assert answer(result.folder, example=0).to_dict()["layers"] == 12
    export(result.folder, tmp_path / "export")
    assert (tmp_path / "export").is_dir()


def test_a_plan_for_generated_tokens_alone(tmp_path: Path) -> None:
    """As Unified Layer Skipping was published; catches a phase that a recipe names and nothing reads."""
    result = train(recipe("unified", tmp_path / "run", "router.phase=decode", "objective.keep=0.97"))
    model = adaskip.RoutedModel.from_pretrained(result.folder / "router", adaskip.demo.backbone.load()[0])
    assert model.target.phase == "decode"
    assert result.ok
    records = load_records("digits-vlm", "test", 6, 0)
    batch = adaskip.Collator(AutoProcessor.from_pretrained(adaskip.demo.backbone.FOLDER))(records)
    with torch.no_grad():
        model(**batch.arguments())
        assert float(model.routing.keep_rate.max()) < 1
        model(**batch.inputs, use_cache=True)  # all of it a prompt
        assert float(model.routing.keep_rate.min()) == 1
    with pytest.raises(ConfigError, match="method fastv: expected phase both, got 'prefill'"):
        train(recipe("fastv", tmp_path / "other", "router.phase=prefill"))


def press_ctrl_c(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_choice_that_was_stopped_goes_on_from_its_costs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exact costs are minutes of work: catches a resume that measures them again, or chooses otherwise."""
    whole = train(recipe("greedy", tmp_path / "whole"))
    folder = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        patch.setattr(choice, "judge", press_ctrl_c)
        with pytest.raises(KeyboardInterrupt):
            train(recipe("greedy", folder))
    assert (folder / EVIDENCE).is_dir()
    with pytest.raises(ConfigError, match="already holds a run; go on with it"):
        train(recipe("greedy", folder))
    writes: list[int] = []
    monkeypatch.setattr(ledger.Ledger, "_write", lambda self: writes.append(1))
    result = train(recipe("greedy", folder), resume=True)
    assert not writes, "everything that had been measured was known"
    assert result.validation == whole.validation


def test_a_choice_that_validation_finds_too_heavy_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs that a method looks at may keep less than others; catches a budget that only they hold."""
    goals: list[float] = []
    choose, judge = methods.Method.policy, choice.judge

    def note(self: methods.Method, evidence: Any, keep: float, seed: int = 0) -> Any:
        goals.append(keep)
        return choose(self, evidence, keep, seed)

    def heavy_at_first(model: Any, batches: Any) -> Any:
        found = judge(model, batches)
        more = 0.72 if len(goals) == 1 else found.figures["keep"]
        return replace(found, figures=found.figures | {"keep": more})

    monkeypatch.setattr(methods.Method, "policy", note)
    monkeypatch.setattr(choice, "judge", heavy_at_first)
    result = train(recipe("uniform", tmp_path / "run"))
    assert goals == pytest.approx([0.7, 0.68])
    assert result.ok


def test_a_choice_that_cannot_be_lighter_ends_in_a_whole_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Validation misses the budget by a hair at the least that a method can choose; catches an error that names a
    budget which nobody asked for, and leaves no run."""
    choose, judge, goals = methods.Method.policy, choice.judge, []

    def least(self: methods.Method, evidence: Any, keep: float, seed: int = 0) -> Any:
        goals.append(keep)
        if keep < 0.7:
            raise ConfigError(f"keep={keep:g}: expected at least 0.700")
        return choose(self, evidence, keep, seed)

    def heavy(model: Any, batches: Any) -> Any:
        found = judge(model, batches)
        return replace(found, figures=found.figures | {"keep": 0.705})

    monkeypatch.setattr(methods.Method, "policy", least)
    monkeypatch.setattr(choice, "judge", heavy)
    result = train(recipe("uniform", tmp_path / "run"))
    assert goals == pytest.approx([0.7, 0.695])
    summary = json.loads((result.folder / "summary.json").read_text())
    assert (result.ok, summary["budget"]) == (False, "missed")
    assert "the method can choose no less" in summary["budget_sentence"]
    assert (result.folder / "router").is_dir()


def test_a_budget_that_no_choice_holds_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"keep=0.2: expected at least 0\.\d+"):
        train(recipe("fastv", tmp_path / "run", "objective.keep=0.2"))


def test_a_recipe_must_say_what_its_method_leaves_out() -> None:
    """Catches conditions that are checked on whole layers where halves go, and layers held against the choice."""
    with pytest.raises(ConfigError, match=r"method skip_vision: expected router.unit=sublayers"):
        train(load("skip-vision", ["router.unit=block"]))
    with pytest.raises(ConfigError, match=r"method greedy: expected conditions.hold_above=null"):
        train(load("greedy", ["conditions.hold_above=10"]))
    with pytest.raises(ConfigError, match=r"router.group: expected vision with method fastv, got 'all'"):
        train(load("fastv", ["router.group=all"]))
    with pytest.raises(ConfigError, match=r"method uniform: expected trainer.steps 0"):
        load("uniform", ["trainer.steps=10"])


def test_every_method_has_a_recipe() -> None:
    """Of the same name; catches a new method that nobody can train by its name. `none` chooses nothing."""
    assert set(METHODS) - {load(name).method for name in recipes()} == {"none"}
