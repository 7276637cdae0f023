"""Records with wrong types, missing fields and too few rows: all of them named, with file and line, before any work."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from adaskip.errors import DataError
from adaskip.recipe import load
from adaskip.training.data import load_records, read_prompts
from adaskip.verbs.train import train

GOOD = {"prompt": "w1", "answer": "w2"}


def write(folder: Path, *rows: Any, split: str = "train") -> Path:
    path = folder / f"{split}.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def read(folder: Path, split: str = "train", limit: int | None = None, **columns: str) -> list[dict[str, Any]]:
    return load_records(str(folder), split, limit, 0, columns)


@pytest.mark.parametrize(("row", "message"), [
    ({"answer": 7}, 'answer is 7 (a number); expected text: write "7", in quotes'),
    ({"answer": 2.5}, 'answer is 2.5 (a number); expected text: write "2.5", in quotes'),
    ({"answer": True}, 'answer is True (true or false); expected text: write "true", in quotes'),
    ({"answer": ["w1"]}, "answer is ['w1'] (a list); expected text"),
    ({"answer": {}}, "answer is {} (an object); expected text"),
    ({"answer": ""}, "answer is empty; expected text"),
    ({"answer": " \n"}, "answer is empty; expected text"),
    ({"answer": None}, "answer is null; expected text"),
    ({"prompt": None}, "prompt is null; expected text"),
    ('{"prompt": "w1"}', "expected text in answer, found fields prompt; name your columns under data.columns"),
    ('{"prompt": "w1", "answer": NaN}', "answer is nan (a number); expected text"),
    ({"prompt": 3}, 'prompt is 3 (a number); expected text: write "3", in quotes'),
    ({"prompt": ""}, "prompt is empty; expected text"),
    ({"prompt": [{"role": "user", "content": "w1"}]}, "prompt is a list of messages; expected text. Put the whole"),
    ({"answer": "\ud800"}, "answer holds half a character"),
    ({"kind": ["a"]}, "kind is ['a'] (a list); expected text"),
    ('{"prompt": "w1", "answer": "w2", "kind": NaN}', "kind is nan (a number); expected text"),
    ({"present": "cat"}, 'present is \'cat\' (text); expected a list of what an answer may name, such as ["cat",'),
    ({"present": ["cat", 3]}, "present is ['cat', 3] (a list); expected a list of what an answer may name, such"),
    ("[1, 2]", "expected a JSON object, got list: [1, 2]"),
    ("7", "expected a JSON object, got int: 7"),
    ("null", "expected a JSON object, got NoneType: None"),
    ('{"prompt": "w1", "answer": "w2", "answer": "w3"}', "answer appears twice; keep one"),
    ('{"prompt": "w1"', "not JSON (Expecting ',' delimiter); expected one object a line"),
    ('{"prompt": "w1", "image": NaN, "answer": "w2"}', "image is nan; expected a path"),
    ({"image": {"url": "x.png"}}, "image is {'url': 'x.png'}; expected a path"),
], ids=str)  # fmt: skip
def test_a_wrong_row_is_named(tmp_path: Path, row: Any, message: str) -> None:
    """Each wrong type ends in one sentence with file, line, what arrived and what to write."""
    path = write(tmp_path, GOOD, {**GOOD, **row} if isinstance(row, dict) else row)
    with pytest.raises(DataError) as caught:
        read(tmp_path)
    assert str(caught.value).startswith(f"{path}, line 2: {message}")


def test_unknown_columns_are_no_concern(tmp_path: Path) -> None:
    """Whatever else stands in a row may be of any type, NaN and repeated keys included."""
    write(tmp_path, '{"id": 1, "id": 2, "prompt": "w1", "score": NaN, "answer": "w2", "meta": {"a": 1, "a": 2}}')
    assert read(tmp_path) == [GOOD]


def test_kinds_become_text(tmp_path: Path) -> None:
    """A number beside text cannot be sorted, and kinds are keys of JSON files: all become text."""
    write(tmp_path, *({**GOOD, "kind": kind} for kind in ("a", 3, 2.5, True, None, "")), GOOD)
    assert [record.get("kind") for record in read(tmp_path)] == ["a", "3", "2.5", "true", None, None, None]


def test_all_bad_rows_are_listed(tmp_path: Path) -> None:
    """Mending one row a run is no way to mend a file: the first twenty, and how many more."""
    write(tmp_path, GOOD, "{", {**GOOD, "answer": 1}, {**GOOD, "image": "none.png"}, {"prompt": "w1"})
    with pytest.raises(DataError) as caught:
        read(tmp_path)
    head, *faults = str(caught.value).split("\n  ")
    assert head.endswith("train.jsonl: 4 faults")
    assert sorted(fault.split(": ")[0].split(", ")[-1] for fault in faults) == ["line 2", "line 3", "line 4", "line 5"]
    write(tmp_path, *[{"prompt": "w1"}] * 50)
    with pytest.raises(DataError) as caught:
        read(tmp_path)
    head, *faults = str(caught.value).split("\n  ")
    assert (head.split(": ")[-1], len(faults), faults[-1]) == ("50 faults", 21, "and 30 more")


def test_pictures_of_rows_that_are_not_read_need_not_be_there(tmp_path: Path) -> None:
    """`data.examples.train=1` for a trial reads one row of a large file, and its picture alone."""
    write(tmp_path, GOOD, {**GOOD, "image": "none.png"})
    assert read(tmp_path, limit=1) == [GOOD]


def test_one_validation_row(tmp_path: Path) -> None:
    """Halved into validation and calibration, one row leaves the second empty; the error says so and what to do."""
    write(tmp_path, GOOD, split="validation")
    assert read(tmp_path, "validation") == [GOOD]
    with pytest.raises(
        DataError, match=r"validation.jsonl: holds 1 row, and without a calibration .* add rows, or .*calibration.jsonl"
    ):
        read(tmp_path, "calibration")
    write(tmp_path, GOOD, split="calibration")
    assert read(tmp_path, "calibration") == [GOOD]


def test_sources_that_are_no_folder_of_lines(tmp_path: Path) -> None:
    """A file, a folder of .json files, a mistyped path, a Windows path: none is looked for on the hub."""
    (tmp_path / "train.json").write_text(json.dumps([GOOD]))
    with pytest.raises(
        DataError,
        match=r"train.json' is a file; expected one that ends in .jsonl, .*the folder that holds train.jsonl: data",
    ):
        load_records(str(tmp_path / "train.json"), "train", None, 0)
    with pytest.raises(
        DataError, match=r"no .jsonl file but train.json; write one JSON object a line, into files that end in"
    ):
        read(tmp_path)
    for name in (str(tmp_path / "nowhere"), "./nowhere", "~/nowhere", "C:\\data", "C:/data", "..\\data"):
        with pytest.raises(DataError, match=r"no such folder; expected a folder that holds train\.jsonl"):
            load_records(name, "train", None, 0)
    write(tmp_path, GOOD, split="validation")
    with pytest.raises(
        DataError, match=r"train\.jsonl: no such file; expected train.jsonl in .*, which holds validation.jsonl"
    ):
        read(tmp_path)


def test_a_folder_named_like_a_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies here comes before what may lie on the hub, through a symbolic link as well."""
    (tmp_path / "data").mkdir()
    write(tmp_path / "data", GOOD)
    (tmp_path / "user").mkdir()
    (tmp_path / "user" / "set").symlink_to(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    assert load_records("user/set", "train", None, 0) == [GOOD]


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Permissions are an error of the data, not a traceback."""
    path = write(tmp_path, GOOD)

    def refuse(*args: Any, **options: Any) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError, match=r"train.jsonl: cannot be read \(Permission denied\)"):
        read(tmp_path)


def test_columns_of_ones_own(tmp_path: Path) -> None:
    """Faults speak of the source's own names."""
    write(tmp_path, {"question": "w1", "label": 3})
    with pytest.raises(DataError, match="line 1: label is 3"):
        read(tmp_path, prompt="question", answer="label")


def test_prompts_to_answer(tmp_path: Path) -> None:
    """A file of prompts goes through the same reader; it needs no answers, and all its faults are listed."""
    with pytest.raises(DataError) as caught:
        read_prompts(write(tmp_path, {"image": 3}, {"prompt": 7}, "[]", {"prompt": "w1", "image": "none.png"}))
    faults = str(caught.value).split("\n  ")[1:]
    assert len(faults) == 4
    assert all('expected an object such as {"prompt": "..."}; ' in fault for fault in faults[:3])
    path = write(tmp_path, {"prompt": "w1"}, "", {"prompt": "w2", "answer": "w3", "id": 1})
    assert [question["prompt"] for question in read_prompts(path)] == ["w1", "w2"]


class Table(list):
    """Rows of a data set of the hub, one of which does not decode."""

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, int) and super().__getitem__(index) == "broken":
            raise OSError("cannot identify image file")
        return super().__getitem__(index)


def test_rows_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a data set are checked like those of a file, and named by split and number."""

    class Library:
        @staticmethod
        def get_dataset_split_names(source: str, subset: str | None) -> list[str]:
            return ["train", "validation"]

        @staticmethod
        def load_dataset(source: str, subset: str | None, split: str) -> Table:
            return Table([GOOD, "broken", {**GOOD, "answer": 4}, GOOD])

    monkeypatch.setitem(sys.modules, "datasets", Library)
    with pytest.raises(DataError) as caught:
        load_records("user/set", "train", None, 0)
    assert str(caught.value).split("\n  ") == [
        "user/set, train: 2 faults",
        "user/set, train row 1: cannot be read (cannot identify image file)",
        'user/set, train row 2: answer is 4 (a number); expected text: write "4", in quotes',
    ]


def test_training_says_it_before_the_model_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data that do not fit the processor are refused in seconds, not after the layers were measured."""
    for split in ("train", "validation", "test"):
        write(tmp_path, *[{"prompt": "<image> digit ?", "answer": "1"}] * 4, split=split)
    monkeypatch.setattr("adaskip.verbs.train.load_model", lambda *args, **options: pytest.fail("the model was loaded"))
    with pytest.raises(DataError, match=r"train.jsonl, line 1: 1 <image> in the prompt and no picture"):
        train(load("digits-vlm", [f"data.source={tmp_path}", f"output={tmp_path / 'run'}", "tracking.wandb=disabled"]))
