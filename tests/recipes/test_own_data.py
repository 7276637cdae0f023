"""A language model and data of one's own: JSON lines, a folder backbone, and plain errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from adaskip.errors import AdaSkipError, CheckpointError, DataError
from adaskip.recipe import load
from adaskip.verbs.check import check
from adaskip.verbs.evaluate import evaluate
from adaskip.verbs.generate import answer
from adaskip.verbs.train import train
from tests.own_data import SHORT


def test_text_only_recipe_end_to_end(language_model: Path, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    recipe = load("causal-lm", [*SHORT, f"backbone.path={language_model}", f"data.source={data}", f"output={folder}"])
    train(recipe)
    found = evaluate(folder, per_kind=4, batch_size=4, max_new_tokens=3).to_dict()
    assert [row["kind"] for row in found["kinds"]] == ["k0", "k1"]
    assert len(answer(folder, prompt="w1 w2 w3", max_new_tokens=2).route) == 4
    found = check(folder, bands=True).to_dict()
    assert found["summary"]["split"] == "test"
    assert [row["band"] for row in found["bands"]] == [
        *(f"late entry {k}" for k in (1, 2, 3)),
        *(f"early exit {k}" for k in (1, 2, 3)),
    ]
    assert {len(row["notions"]) for row in found["bands"]} == {3}
    assert all(row["low"] is None or row["low"] <= row["estimate"] for row in found["bands"])
    (data / "test.jsonl").unlink()
    with pytest.raises(DataError, match=r"training used 16 calibration records and left 0; add a test.jsonl"):
        check(folder)


def test_a_run_that_stops_at_violated_conditions_says_so(language_model: Path, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    strict = ["conditions.on_violation=stop", "conditions.tolerance=0", "conditions.level=0.5", "router.keep_bias=-2"]
    settings = [*SHORT, *strict, f"backbone.path={language_model}", f"data.source={data}", f"output={folder}"]
    done = train(load("causal-lm", settings)).to_dict()
    assert (done["ok"], done["steps"]) == (False, 2)
    assert done["stopped"].startswith("conditions violated at step 2: layer ")
    assert not (folder / "router").exists()
    assert (
        json.loads((folder / "conditions.jsonl").read_text().splitlines()[0])["skips"][0]["verdict"] == "inadmissible"
    )


def test_group_vision_needs_vision_tokens(language_model: Path, data: Path, tmp_path: Path) -> None:
    recipe = load(
        "causal-lm",
        [
            *SHORT,
            f"backbone.path={language_model}",
            f"data.source={data}",
            f"output={tmp_path / 'r'}",
            "router.group=vision",
        ],
    )
    with pytest.raises(AdaSkipError, match=r"LlamaForCausalLM has no vision tokens in its sequence .* use group='all'"):
        train(recipe)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"train.jsonl, line 2: not JSON"),
        ("[1]", r"line 2: expected a JSON object, got list"),
        ('{"prompt": "w1"}', r"line 2: expected text in answer, found fields prompt"),
        ('{"prompt": "w1", "answer": "w2", "image": "none.png"}', r"line 2: image .*none.png does not exist"),
    ],
)
def test_bad_records_are_named(data: Path, line: str, message: str) -> None:
    from adaskip.training.data import load_records

    path = data / "train.jsonl"
    lines = path.read_text().splitlines()
    lines[1] = line
    path.write_text("\n".join(lines))
    with pytest.raises(DataError, match=message):
        load_records(str(data), "train", None, 0)


def test_splits_do_not_overlap(data: Path) -> None:
    from adaskip.training.data import load_records

    halves = [load_records(str(data), split, None, 0) for split in ("validation", "calibration")]
    whole = [json.loads(line) for line in (data / "validation.jsonl").read_text().splitlines()]
    assert halves[0] + halves[1] == whole
    assert len(halves[0]) == len(halves[1]) == 16


def test_missing_backbone_and_data(tmp_path: Path, language_model: Path) -> None:
    settings = [*SHORT, f"backbone.path={language_model}", f"output={tmp_path / 'r'}"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"expected train.jsonl in .*empty, which holds no .jsonl file"):
        train(load("causal-lm", [*settings, f"data.source={tmp_path / 'empty'}"]))
    with pytest.raises(CheckpointError, match=r"backbone '.*nowhere': no such folder; expected a Hugging Face id"):
        train(load("causal-lm", [*SHORT, f"backbone.path={tmp_path / 'nowhere'}", f"output={tmp_path / 's'}"]))
