"""Method path-bank from a recipe to a finished run that every verb takes, and on from where it was stopped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import adaskip
from adaskip.errors import ConfigError
from adaskip.recipe import Recipe, load
from adaskip.runfiles import BANK_PRICES
from adaskip.survey import bank, ledger
from adaskip.verbs.calibrate import calibrate
from adaskip.verbs.check import check
from adaskip.verbs.evaluate import evaluate
from adaskip.verbs.export import export
from adaskip.verbs.generate import answer
from adaskip.verbs.train import train

SHORT = [
    "method=path-bank",
    "trainer.steps=0",
    "trainer.batch_size=24",
    "objective.keep=0.7",
    "objective.warmup=0",
    "conditions.every=0",
    "conditions.examples=18",
    "data.examples.train=40",
    "data.examples.validation=24",
    "data.examples.calibration=66",
    "data.examples.test=24",
    "bank.examples=40",
    "bank.sample=24",
    "bank.groups=2",
    "bank.paths=4",
    "bank.entry=1",
    "bank.width=2",
    "static.width=2",
    "static.fallback=false",
    "tracking.wandb=disabled",
]


def recipe(folder: Path) -> Recipe:
    return load("digits-vlm", [*SHORT, f"output={folder}"])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose bank is believed, however little choosing pays on so few inputs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bank, "_CLEAR", -torch.inf)
        return train(recipe(tmp_path_factory.mktemp("runs") / "bank")).folder


def test_a_bank_holds_its_budget_and_is_certified(run: Path) -> None:
    """Catches a price that is taken over from other inputs, and a certificate that is not kept in the policy."""
    summary = json.loads((run / "summary.json").read_text())
    assert summary["budget"] == "held"
    assert summary["val"]["keep"] <= 0.7
    assert summary["static"]["keep"] <= 0.7
    assert summary["static"]["comparison"]["n"] == 24
    model = adaskip.RoutedModel.from_pretrained(run / "router", adaskip.demo.backbone.load()[0])
    assert len(model.policy.paths) > 2
    assert model.policy.price > 0
    assert float(model.policy.kappa) == pytest.approx(summary["certificate"]["kappa"], rel=1e-6)
    assert summary["certificate"]["calibrated"] == 36


def test_every_verb_takes_the_run(run: Path, tmp_path: Path) -> None:
    assert check(run).to_dict()["rows"]
    assert evaluate(run, per_kind=4).mean["keep"] < 1
    assert answer(run, prompt="3 plus 4 ?").to_dict()["layers"] == 12
    export(run, tmp_path / "export")
    assert (tmp_path / "export").is_dir()
    assert calibrate(run, risk=0.9, delta=0.1).to_dict()["keep"] < 1


def press_ctrl_c(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_run_that_was_stopped_goes_on_and_ends_alike(run: Path, tmp_path: Path, monkeypatch) -> None:
    """Its exact prices are minutes of work: catches a resume that measures them again, or finds another bank."""
    monkeypatch.setattr(bank, "_CLEAR", -torch.inf)
    folder = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        patch.setattr(bank, "fit_predictor", press_ctrl_c)
        with pytest.raises(KeyboardInterrupt):
            train(recipe(folder))
    assert (folder / BANK_PRICES).is_file()
    with pytest.raises(ConfigError, match="already holds a run; go on with it"):
        train(recipe(folder))
    writes: list[int] = []
    monkeypatch.setattr(ledger.Ledger, "_write", lambda self: writes.append(1))
    train(recipe(folder), resume=True)
    assert not writes, "everything that had been measured was known"
    one, other = (json.loads((place / "summary.json").read_text()) for place in (run, folder))
    for name in ("val", "static", "certificate"):
        assert one[name] == other[name]


def test_a_bank_takes_no_steps() -> None:
    with pytest.raises(ConfigError, match=r"method path-bank: expected trainer.steps 0"):
        load("digits-vlm", [*SHORT, "trainer.steps=10"])
