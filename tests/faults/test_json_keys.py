"""What ``--json`` prints: programs read these keys, so that none may go or be renamed without a word in CHANGELOG.md.

``json_keys.json`` was written by the commands as they were before each verb's result became a dataclass.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from adaskip.cli import main
from adaskip.verbs.calibrate import calibrate
from adaskip.verbs.check import check
from adaskip.verbs.compare import compare
from adaskip.verbs.data import data
from adaskip.verbs.evaluate import evaluate
from adaskip.verbs.export import export
from adaskip.verbs.generate import answer, answer_many
from adaskip.verbs.profile import profile_model
from tests.faults.finished import copy_of
from tests.keys_of import keys_of

BEFORE = json.loads(Path(__file__).with_name("json_keys.json").read_text())


def same(verb: str, values: dict[str, Any]) -> None:
    """The same keys in the same order, and values that JSON can hold."""
    assert json.dumps(keys_of(json.loads(json.dumps(values)))) == json.dumps(BEFORE[verb])


def test_the_summary_of_a_run(run: Path) -> None:
    """`train` prints what it leaves in ``summary.json``."""
    same("train", json.loads((run / "summary.json").read_text()))


def test_what_is_done_with_a_run(run: Path, tmp_path: Path) -> None:
    copied = copy_of(run, tmp_path / "run", spread=0.5)
    result = evaluate(copied, per_kind=2, static=[4, 5])
    same("eval", result.to_dict())
    assert json.loads((copied / "evaluation.json").read_text()) == result.to_dict()
    result = check(copied, bands=True)
    values = result.to_dict()
    same("check_bands", values)
    values.pop("bands")
    same("check", values)
    certified = calibrate(copied, risk=0.3, delta=0.3)
    same("calibrate", certified.to_dict())
    assert json.loads((copied / "calibration.json").read_text()) == certified.stored()
    same("generate", answer(copied, example=1).to_dict())
    same("generate_lossless", answer(copied, example=1, lossless=True).to_dict())
    (tmp_path / "many.jsonl").write_text('{"prompt": "3 plus 4 ?"}\n{"prompt": "repeat 3 4 5 ?"}\n')
    same("many", answer_many(copied, tmp_path / "many.jsonl").to_dict())
    same("export", export(copied, tmp_path / "out").to_dict())


def test_data() -> None:
    few = {f"data.examples.{split}": 6 for split in ("train", "validation", "calibration", "test")}
    same("data", data("digits-vlm", few).to_dict())


def test_a_recipe_that_is_validated(capfd: pytest.CaptureFixture[str]) -> None:
    """Its values, where each comes from, and the estimate; a new key of a recipe comes to both."""
    with pytest.raises(SystemExit) as stop:
        main(["validate", "digits-vlm", "--json"])
    assert not stop.value.code
    same("validate", json.loads(capfd.readouterr().out))


def test_a_profile(tmp_path: Path) -> None:
    same("profile", profile_model("digits-vlm", group="all", examples=33, output=tmp_path).to_dict())


def test_a_comparison(tmp_path: Path) -> None:
    small = {"examples": 12, "fit": 40, "seeds": 1, "batch_size": 12, "new_tokens": 1, "oracle": 2}
    found = compare("digits-vlm", policies=[], budgets=(0.7,), output=tmp_path, **small)
    same("compare", found.to_dict())
    assert json.loads((tmp_path / "compare.json").read_text()) == json.loads(json.dumps(found.to_dict()))


@pytest.mark.parametrize(
    ("verb", "settings"),
    [
        (
            "bench",
            {"backbone": "llama", "layers": "2", "hidden": "64", "vocabulary": "96", "prompt": "8", "skip": "0,0.5"},
        ),
        ("bench_demo", {"target": "digits-vlm"}),
    ],
)
def test_a_bench(verb: str, settings: dict[str, str]) -> None:
    from adaskip.bench.settings import read
    from adaskip.bench.table import run

    same(verb, run(read(settings | {"new": "2", "batch": "1", "budget": "0.1"})).to_dict())
