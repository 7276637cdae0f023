"""`adaskip compare` of a finished run: it names model, data and group, and stands beside the methods."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import adaskip
from adaskip.errors import ConfigError
from adaskip.verbs import cells
from tests.faults.finished import copy_of

SMALL: dict[str, Any] = {"examples": 24, "fit": 24, "seeds": 1, "batch_size": 24, "new_tokens": 1, "policies": []}


def test_a_run_stands_beside_the_methods(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the budget that it was trained for; catches a method's plan under its name, and a rival that keeps less."""
    monkeypatch.setattr(cells, "ROUNDS", 1)
    copied = copy_of(run, tmp_path / "run", spread=0.5)
    found = adaskip.compare(copied, budgets=(0.9, 0.5), output=tmp_path / "out", **SMALL)
    row = next(row for row in found.rows if row["policy"] == "learned")
    assert (row["budget"], row["plans"]) == (0.6, [None])
    assert 0 < row["keep"] < 1
    assert row["rival"] == "random"
    assert row["rival_keep"] >= row["keep"] - 0.005  # its plan of budget 0.5 keeps less
    assert (tmp_path / "out" / "cells" / "learned-0.6-seed0.json").is_file()


def test_another_run_of_the_same_name_is_refused(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same method, budget and seed, other weights; catches the first run's figures under the second's folder."""
    monkeypatch.setattr(cells, "ROUNDS", 1)
    other = copy_of(run, tmp_path / "other", spread=0.5)
    text = (
        r"other: expected one run of learned, keep 0\.6 and seed 0, found another in learned-0\.6-seed0\.json; give it "
        r"a name of its own: --run LABEL=\S*other"
    )
    with pytest.raises(ConfigError, match=text):
        adaskip.compare(run, budgets=(0.9,), runs=[other], output=tmp_path / "both", **SMALL)
    assert not [*(tmp_path / "both" / "cells").iterdir()], "said before anything is measured"
    adaskip.compare(run, budgets=(0.9,), runs=[run], output=tmp_path / "out", **SMALL)
    with pytest.raises(ConfigError, match=text):
        adaskip.compare("digits-vlm", budgets=(0.9,), runs=[other], output=tmp_path / "out", **SMALL)


def test_labels_set_runs_of_one_name_side_by_side(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs of one method, budget and seed; catches one's figures under both labels, a subject that is measured
    twice, and a folder whose own name holds the sign of a label."""
    monkeypatch.setattr(cells, "ROUNDS", 1)
    other = copy_of(run, tmp_path / "spread=half", spread=0.5)
    found = adaskip.compare(run, budgets=(0.9,), runs=[f"as.made={run}", other], output=tmp_path / "out", **SMALL)
    rows = {row["policy"]: row for row in found.rows}
    assert {*rows} == {"none", "random", "as.made", "learned"}
    assert rows["as.made"]["keep"] != rows["learned"]["keep"]
    assert (tmp_path / "out" / "cells" / "as.made-0.6-seed0.json").is_file()
    with pytest.raises(ConfigError, match=r"expected one run of as\.made, .* found another in as\.made-0\.6-seed0"):
        adaskip.compare("digits-vlm", budgets=(0.9,), runs=[f"as.made={other}"], output=tmp_path / "out", **SMALL)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ("a/b=runs/x", r"--run a/b=runs/x: expected LABEL=FOLDER with a label of letters, .* got 'a/b'"),
        ("kept=", "--run kept=: expected LABEL=FOLDER"),
        ("greedy=runs/x", "greedy is a method; choose another label, such as my-greedy"),
    ],
)
def test_labels_that_are_none(given: str, text: str, tmp_path: Path) -> None:
    """Said before anything is loaded; catches a cell outside of its folder, and a run under a method's name."""
    with pytest.raises(ConfigError, match=text):
        adaskip.compare("no-such-model", budgets=(0.9,), runs=[given], output=tmp_path, **SMALL)


def test_a_run_that_fell_back_to_its_plan_is_no_learned_one(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the static plan was better, `router` holds it; catches the plan's figures under the routers' name."""
    monkeypatch.setattr(cells, "ROUNDS", 1)
    copied = copy_of(run, tmp_path / "run")
    base = adaskip.RoutedModel.from_pretrained(copied / "router").detach()
    adaskip.attach(base, adaskip.SkipPlan.static([4, 9])).save_pretrained(copied / "router")
    found = adaskip.compare(copied, budgets=(0.9,), output=tmp_path / "out", **SMALL)
    assert {row["policy"]: row["plans"] for row in found.rows}["static"] == [[4, 9]]
    assert "learned" not in {row["policy"] for row in found.rows}


def test_a_run_of_another_group_is_refused(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells, "ROUNDS", 1)
    with pytest.raises(ConfigError, match=r"expected a run with router\.group=vision, got all; compare it apart"):
        adaskip.compare("digits-vlm", budgets=(0.9,), group="vision", runs=[run], output=tmp_path, **SMALL)
    with pytest.raises(ConfigError, match="routes group all; leave --group out, or name a model instead"):
        adaskip.compare(run, budgets=(0.9,), group="vision", output=tmp_path, **SMALL)
