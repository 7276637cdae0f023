"""A comparison pairs its policies over the same inputs: what would mix others in is refused, and counted once."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

import adaskip
from adaskip.errors import ConfigError
from adaskip.recipe import load
from adaskip.report.pareto import comparison_table, pareto_plot
from adaskip.runfiles import LEARNED
from adaskip.training.data import SPLITS
from adaskip.verbs import cells, entries
from adaskip.verbs.cells import Cell
from adaskip.verbs.entries import Named, read_entries
from adaskip.verbs.splits import records
from adaskip.verbs.standings import standings
from adaskip.verbs.subject import open_subject
from tests.faults.finished import copy_of
from tests.own_data import SHORT, data, language_model  # noqa: F401  (fixtures)

SMALL: dict[str, Any] = {"examples": 24, "fit": 24, "batch_size": 24, "new_tokens": 1, "budgets": (0.7,), "seeds": 1}


@pytest.fixture(autouse=True)
def _seconds_are_taken_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells, "ROUNDS", 1)


def change(folder: Path, *settings: str) -> Path:
    """Rewrite the recipe of a finished run, as if it had been trained by another one."""
    path = folder / "recipe.resolved.yaml"
    path.write_text(adaskip.recipe.dump(load(path, settings)))
    return folder


def cell(policy: str, kl: float, recipe: str = "", seed: int = 0) -> Cell:
    seconds = {"prefill": 1.0, "dense_prefill": 2.0, "generate": 3.0, "dense_generate": 4.0}
    return Cell(
        policy, 0.5, seed, None, [0.5] * 2, [kl] * 2, [1.0] * 2, [0.0] * 2, [1.0] * 2, ["a", "b"], [1.0], seconds,
        recipe=recipe,
    )  # fmt: skip


def test_one_file_has_the_same_test_inputs_whatever_the_seed_of_a_run(data: Path) -> None:  # noqa: F811
    """A comparison judges runs of several seeds on the same inputs; catches seeds that train on another's test."""
    file = str(data / "train.jsonl")
    asked = [f"data.source={file}", "trainer.batch_size=8"]
    runs = [load("causal-lm", ["backbone.path=digits-vlm", f"seed={seed}", *asked]) for seed in (0, 1)]
    for split in SPLITS:
        one, other = ([record["prompt"] for record in records(recipe, split)] for recipe in runs)
        assert one == other, split
    moved = load("causal-lm", ["backbone.path=digits-vlm", "data.seed=1", *asked])
    assert [r["prompt"] for r in records(moved, "test")] != [r["prompt"] for r in records(runs[0], "test")]


def test_a_run_on_another_division_of_the_file_is_refused(language_model: Path, data: Path, tmp_path: Path) -> None:  # noqa: F811
    """Most of what is judged would be what it was trained on."""
    own = [*SHORT, f"backbone.path={language_model}", "backbone.dtype=auto", "data.seed=3"]
    own.append(f"data.source={data / 'train.jsonl'}")
    subject = open_subject(str(language_model), str(data / "train.jsonl"), "all")
    with pytest.raises(ConfigError, match=r"a run: expected a run with data\.seed=0, got 3; compare it apart"):
        entries.check_same("a run", "run", load("causal-lm", own), subject)
    entries.check_same("a run", "run", load("causal-lm", [*own, "data.seed=0"]), subject)


def test_a_backbone_of_other_weights_is_refused() -> None:
    """The dense model of a comparison is one: catches a run in 4 bits beside the logits of a whole one."""
    subject = open_subject("digits-vlm", None, "all")
    with pytest.raises(ConfigError, match=r"expected a run with backbone\.dtype=auto, got bfloat16; compare it apart"):
        entries.check_same("a run", "run", load("digits-vlm", ["backbone.dtype=bfloat16"]), subject)


def test_runs_of_other_settings_are_no_seeds_of_one_policy(run: Path, tmp_path: Path) -> None:
    """Catches a mean over a short and a long training, now and where one of them was measured before."""
    one, other = copy_of(run, tmp_path / "one"), change(copy_of(run, tmp_path / "other"), "seed=1", "trainer.steps=9")
    alike = change(copy_of(run, tmp_path / "alike"), "seed=2", "output=elsewhere", "static.fallback=false")
    given: dict[str, Any] = SMALL | {"policies": [], "output": tmp_path / "compared"}
    refused = (
        r"other: expected a run of learned trained by the recipe of .*, but for|but for keep and seed, got one of other"
    )
    with pytest.raises(ConfigError, match=refused):
        adaskip.compare("digits-vlm", runs=[one, other], **given)
    found = adaskip.compare("digits-vlm", runs=[one, alike], **given)
    assert {row["policy"]: row["seeds"] for row in found.rows}["learned"] == 2
    with pytest.raises(ConfigError, match=refused):
        adaskip.compare("digits-vlm", runs=[other], **given)
    found = adaskip.compare("digits-vlm", runs=[f"long={other}", one, one], **given | {"budgets": (0.7, 0.7)})
    assert {row["policy"]: row["seeds"] for row in found.rows} == {"none": 1, "random": 1, "learned": 2, "long": 1}


def test_a_plan_that_beat_a_method_has_not_its_name(run: Path, tmp_path: Path) -> None:
    """Catches a static plan under the name of the method that it won against."""
    folder = change(copy_of(run, tmp_path / "run"), "method=fastv", "router.group=vision", "trainer.steps=0")
    base = adaskip.RoutedModel.from_pretrained(folder / "router").detach()
    adaskip.attach(base, adaskip.SkipPlan.static([3], group="vision")).save_pretrained(folder / "router")
    subject = open_subject("digits-vlm", None, "vision")
    assert [entry.policy for entry in read_entries([Named(folder)], subject, tmp_path)] == ["fastv-run"]
    (folder / LEARNED).mkdir()
    assert [entry.policy for entry in read_entries([Named(folder)], subject, tmp_path)] == ["static"]


def test_changed_inputs_are_no_more_of_the_same_comparison(language_model: Path, data: Path, tmp_path: Path) -> None:  # noqa: F811
    """Catches cells that are paired by position over rows which have moved."""
    given: dict[str, Any] = SMALL | {"policies": ["uniform"], "output": tmp_path / "compared", "examples": 8}
    adaskip.compare(language_model, str(data), **given)
    rows = (data / "test.jsonl").read_text().splitlines()
    (data / "test.jsonl").write_text("\n".join(rows[::-1]) + "\n")
    with pytest.raises(ConfigError, match=r"holds a comparison on other inputs of .*, which has changed since"):
        adaskip.compare(language_model, str(data), **given)


def test_a_path_that_overflows_leaves_the_others_their_rows(tmp_path: Path) -> None:
    """One infinite KL ended every later call; and JSON has no word for it."""
    rows = standings([cell("broken", math.inf), cell("lost", math.nan), cell("fine", 0.5), cell("light", 0.1)])
    assert [row["policy"] for row in rows][:2] == ["light", "fine"]
    broken = rows[-1] if rows[-1]["policy"] == "broken" else rows[-2]
    assert (broken["kl"], broken["front"], broken["rival"], broken["recovery"]) == (None, False, None, None)
    assert rows[1]["rival"] == "light"
    json.dumps(rows, allow_nan=False)
    assert "| n/a |" in comparison_table(rows)
    pareto_plot(rows, tmp_path / "picture.png")


def test_cells_of_before_sublayers_are_read(tmp_path: Path) -> None:
    """Catches an older comparison of which every cell must be measured again."""
    newer = cell("greedy", 0.5)
    stored = {name: value for name, value in asdict(newer).items() if name not in ("unit", "kv", "origin", "recipe")}
    (tmp_path / "cell.json").write_text(json.dumps(stored))
    assert Cell.read(tmp_path / "cell.json") == newer


def test_a_method_with_too_few_inputs_leaves_the_others(tmp_path: Path) -> None:
    """Catches a comparison that one method's refusal of its data ends, and a reason that does not say whose it is."""
    found = adaskip.compare("digits-vlm", policies=["skip_it", "uniform"], output=tmp_path, **SMALL | {"fit": 6})
    assert {row["policy"] for row in found.rows} == {"none", "random", "uniform"}
    assert [text[:20] for text in found.left_out] == ["skip_it at keep 0.7:"]
