"""Routers that do not beat the best static plan of their budget: the plan is shipped, and every verb works on it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import adaskip
from adaskip.bench.settings import read
from adaskip.bench.table import run as run_bench
from adaskip.cli import app
from adaskip.plan import KEEP_ALL
from adaskip.policies.static import Static
from adaskip.recipe import load
from adaskip.runfiles import LEARNED
from adaskip.survey.static import Contest
from adaskip.training.module import RouterTuner
from adaskip.verbs.calibrate import calibrate
from adaskip.verbs.check import check
from adaskip.verbs.evaluate import evaluate
from adaskip.verbs.export import export
from adaskip.verbs.generate import answer, answer_many
from adaskip.verbs.train import train
from tests.own_data import SHORT, data, language_model  # noqa: F401  (fixtures)

FIT = ["method=from-bounds", "fit.rounds=1", "fit.examples=16", "fit.steps=2", "fit.batch_size=8", "trainer.steps=0"]
LONGER = ["static.width=6", "objective.warmup=0.1"]


@pytest.fixture
def arguments(language_model: Path, data: Path) -> list[str]:  # noqa: F811
    """A run of four steps on a user's own model and data, with enough inputs to calibrate on."""
    rows = [{"prompt": f"w{i % 11} w{i % 5} w{i % 3}", "answer": f"w{i % 7}"} for i in range(80)]
    (data / "calibration.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [*SHORT, *LONGER, f"backbone.path={language_model}", f"data.source={data}"]


@pytest.fixture
def beaten(arguments: list[str], tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """The folder of a run whose routers, hardly trained, lose; and what `train` printed."""
    folder = tmp_path / "run"
    return folder, train(load("causal-lm", [*arguments, f"output={folder}"])).to_dict()


def test_the_plan_is_shipped_and_every_verb_works_on_it(
    beaten: tuple[Path, dict[str, Any]],
    tmp_path: Path,
) -> None:
    """Catches routers shipped that lose to a plan, figures of one beside the other's files, and a verb that fails."""
    folder, done = beaten
    static = done["static"]
    assert (static["comparison"]["winner"], static["router"]) == ("static", "static")
    assert static["routers"]["kl"] > static["kl"]
    assert done["val"] == {name: static[name] for name in ("accuracy", "kl", "keep")}
    assert done["val"]["keep"] <= 0.7
    assert json.loads((folder / "summary.json").read_text())["static"]["skip"] == static["skip"]
    assert f"4,val/static_kl,{static['kl']!r}" in (folder / "metrics.csv").read_text()
    assert "router/ holds the static plan" in (folder / "report.md").read_text()
    shipped = adaskip.RoutedModel.from_pretrained(folder / "router")
    assert isinstance(shipped.policy, Static)
    assert list(shipped.policy.plan.skip) == static["skip"]
    assert "the routers do not beat it" in shipped.facts["beside_the_best_static_plan"]
    learned = adaskip.RoutedModel.from_pretrained(folder / LEARNED, shipped.detach())
    assert learned.routers is not None
    assert learned.policy.threshold == done["threshold"]
    looks = [json.loads(line) for line in (folder / "conditions.jsonl").read_text().splitlines()]
    assert looks[-1]["final"]
    assert {skip["layer"] for skip in looks[-1]["skips"]} == {*static["skip"]}
    assert {tuple(row) for row in json.loads((folder / "keep_rates.json").read_text()).values()} == {
        tuple(0.0 if layer in static["skip"] else 1.0 for layer in range(4))
    }

    assert check(folder).to_dict()["summary"]["n"] == 8
    assert evaluate(folder, max_new_tokens=2).mean["keep"] == pytest.approx(static["keep"], abs=0.01)
    assert answer(folder, example=1, max_new_tokens=2).to_dict()["route"].count(False) == len(static["skip"])
    (tmp_path / "many.jsonl").write_text('{"prompt": "w1 w2"}\n{"prompt": "w3 w4 w5"}\n')
    assert answer_many(folder, tmp_path / "many.jsonl", max_new_tokens=2).figures["groups"] == 1
    export(folder, tmp_path / "out")
    assert isinstance(adaskip.RoutedModel.from_pretrained(tmp_path / "out").policy, Static)
    bench = run_bench(read({"target": str(folder), "new": "2", "batch": "1", "budget": "0.1"})).to_dict()
    assert bench["results"]
    for risk, runs in ((0.95, len(static["skip"])), (0.05, 0)):  # certified, and not: then every layer runs
        found = calibrate(folder, risk=risk, delta=0.3, max_new_tokens=2)
        assert (found.certificate.threshold is None) == (runs == 0)
        assert answer(folder, example=1, max_new_tokens=2).to_dict()["route"].count(False) == runs
    assert adaskip.RoutedModel.from_pretrained(folder / "router").policy.threshold == KEEP_ALL


def test_what_is_asked_for_is_shipped_all_the_same(arguments: list[str], tmp_path: Path) -> None:
    """`static.fallback=false` keeps the routers and says that they lose; `static.width=0` seeks no plan."""
    folder = tmp_path / "run"
    done = train(load("causal-lm", [*arguments, "static.fallback=false", f"output={folder}"])).to_dict()
    assert done["static"]["router"] == "routers"
    assert done["static"]["sentence"].endswith("router/ holds them all the same, as static.fallback is false")
    assert done["val"]["kl"] == pytest.approx(done["static"]["routers"]["kl"], rel=1e-3)
    assert not (folder / LEARNED).exists()
    assert adaskip.RoutedModel.from_pretrained(folder / "router").routers is not None
    folder = tmp_path / "none"
    assert "static" not in train(load("causal-lm", [*arguments, "static.width=0", f"output={folder}"])).to_dict()


def test_routers_that_win_are_shipped(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch a plan that is shipped whoever wins."""
    monkeypatch.setattr(Contest, "winner", "routers")
    folder = tmp_path / "run"
    done = train(load("causal-lm", [*arguments, f"output={folder}"])).to_dict()
    assert done["static"]["router"] == "routers"
    assert adaskip.RoutedModel.from_pretrained(folder / "router").routers is not None
    assert not (folder / LEARNED).exists()


def test_a_fit_from_bounds_is_compared_too(arguments: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    done = train(load("causal-lm", [*arguments, *FIT, "objective.warmup=0", f"output={folder}"])).to_dict()
    assert done["static"]["comparison"]["n"] == 32
    assert (folder / LEARNED).exists() == (done["static"]["router"] == "static")


def test_a_static_start_trains_within_the_budget_and_resumes(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The routers begin at the plan, and a resumed run ends with the same ones; catches a target that starts at 1."""
    whole, resumed, targets, step = tmp_path / "whole", tmp_path / "resumed", [], RouterTuner.training_step

    def training_step(self: RouterTuner, batch: adaskip.Batch, batch_idx: int) -> torch.Tensor:
        targets.append(self.target())
        return step(self, batch, batch_idx)

    monkeypatch.setattr(RouterTuner, "training_step", training_step)
    more = ["static.start=true", "static.fallback=false", "trainer.learning_rate=1e-6", "objective.warmup=0.9"]
    done = train(load("causal-lm", [*arguments, *more, f"output={whole}"])).to_dict()
    plan = done["static"]["skip"]
    assert targets == [0.7] * 4
    model = adaskip.RoutedModel.from_pretrained(whole / "router")
    biases = [float(head.outer.bias) for head in model.routers]
    assert [layer for layer, bias in enumerate(biases) if bias < 0] == plan
    shutil.copytree(whole, resumed)
    for path in ("router", "summary.json", "checkpoints/000004.ckpt"):
        found = resumed / path
        if found.is_dir():
            shutil.rmtree(found)
        else:
            found.unlink(missing_ok=True)
    for path in sorted((resumed / "checkpoints").iterdir())[1:]:
        path.unlink()
    train(load(resumed / "recipe.resolved.yaml"), resume=True)
    expected, again = (load_file(run / "router" / "router.safetensors") for run in (whole, resumed))
    assert all(torch.equal(expected[name], again[name]) for name in expected)


def test_dear_layers_are_held_from_the_start_and_after_a_resume(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line names them, the saved routers hold them, and None holds none; a budget out of reach releases some."""
    from adaskip.stages import LineStages

    folder = tmp_path / "run"
    low = [*arguments, "static.fallback=false", "conditions.tolerance=0.001"]
    train(load("causal-lm", [*low, f"output={folder}"]), stages=LineStages())
    told = [line for line in capsys.readouterr().err.splitlines() if "from the start" in line]
    assert len(told) == 1
    assert "not held, for objective.keep leaves the routers no room otherwise" in told[0]
    held = adaskip.RoutedModel.from_pretrained(folder / "router").policy.held
    assert len(held) == 2  # all four are dear, and keep=.7 has two of them skipped
    assert all(f"{layer} (" in told[0] for layer in held)
    looks = [json.loads(line) for line in (folder / "conditions.jsonl").read_text().splitlines()]
    assert [look["held"] for look in looks] == [list(held)] * len(looks)
    train(load(folder / "recipe.resolved.yaml"), resume=True)
    assert adaskip.RoutedModel.from_pretrained(folder / "router").policy.held == held
    folder = tmp_path / "none"
    train(load("causal-lm", [*low, "conditions.hold_above=null", f"output={folder}"]))
    assert adaskip.RoutedModel.from_pretrained(folder / "router").policy.held == ()


@pytest.mark.parametrize("ok", [True, False])
def test_the_last_lines_say_who_wins(ok: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Would catch a run that loses to a plan without a word; a missed budget is still said last."""
    sides = {"kl": 0.2, "routers": {"kl": 0.1}}
    static = {"sentence": "routers win", **sides}
    result = {"ok": ok, "folder": "run", "static": static, "budget_sentence": "budget missed: ..."}
    monkeypatch.setattr("adaskip.verbs.train.train", lambda *args, **options: result)
    printed = CliRunner().invoke(app, ["train", "digits-vlm", f"output={tmp_path / 'run'}"])
    lines = printed.stdout.splitlines()
    assert printed.exit_code == (0 if ok else 1)
    assert lines[-2:] == (["next: adaskip eval run, adaskip check run", "routers win"] if ok else
                          ["routers win", "budget missed: ..."])  # fmt: skip
