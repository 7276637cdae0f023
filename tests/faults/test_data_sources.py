"""Data as they come: one file without splits, gzip, Parquet, a data set of the Hub; the same records from each."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from adaskip.errors import DataError
from adaskip.recipe import load
from adaskip.training.bad_records import BadRecords
from adaskip.training.data import SPLITS, Collator, load_records, open_image
from adaskip.training.division import shares
from adaskip.training.screening import screen
from adaskip.verbs.splits import has_test, records
from tests.processors import picture_processor

ROWS = [{"prompt": f"w{i % 40} w{i % 23}", "answer": f"w{i % 7}"} for i in range(200)]


def write(path: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def drawn(source: Path | str, seed: int = 0) -> dict[str, list[Any]]:
    return {split: load_records(str(source), split, None, seed) for split in SPLITS}


def texts(found: list[Any]) -> set[str]:
    return {record["prompt"] for record in found}


def test_a_file_is_divided_with_the_seed(tmp_path: Path) -> None:
    """All splits hold all rows once, and no prompt twice; catches a draw that depends on the order or the place."""
    rows = ROWS + ROWS[:60]  # equal inputs stay together
    found = drawn(write(tmp_path / "mine.jsonl", rows))
    assert sorted(r["prompt"] for part in found.values() for r in part) == sorted(r["prompt"] for r in rows)
    for i, split in enumerate(SPLITS):
        assert found[split]
        for other in SPLITS[i + 1 :]:
            assert not texts(found[split]) & texts(found[other])
    assert all(len(found[split]) - share in range(4) for split, share in shares(len(rows)).items())
    (tmp_path / "elsewhere").mkdir()
    turned = drawn(write(tmp_path / "elsewhere" / "other.jsonl", rows[::-1]))
    assert {split: texts(part) for split, part in turned.items()} == {s: texts(part) for s, part in found.items()}
    assert texts(drawn(tmp_path / "mine.jsonl", seed=1)["test"]) != texts(found["test"])
    assert load_records(str(tmp_path / "mine.jsonl"), "train", 5, 0) == found["train"][:5]


@pytest.mark.parametrize("rows", [1, 3])
def test_a_file_too_small_to_divide(tmp_path: Path, rows: int) -> None:
    """A split that gets nothing is said, with how many records there are."""
    path = write(tmp_path / "mine.jsonl", ROWS[:rows])
    with pytest.raises(
        DataError, match=rf"mine.jsonl: holds {rows} records? to draw all splits from, and calibration gets"
    ):
        load_records(str(path), "calibration", None, 0)


def test_a_train_file_alone_says_how_to_divide_it(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl")
    with pytest.raises(
        DataError, match=r"validation.jsonl: no such file; .*; to draw all splits from train.jsonl: data.so"
    ):
        load_records(str(tmp_path), "validation", None, 0)


def test_ten_thousand_lines(tmp_path: Path) -> None:
    """As many lines as a small data set of instructions; every number of a bad line is that of an editor."""
    rows = [{"prompt": f"w{i}", "answer": "w1"} for i in range(10_000)]
    path = write(tmp_path / "mine.jsonl", rows)
    assert len(load_records(str(path), "train", None, 0)) == 7000
    path.write_bytes(path.read_bytes().replace(b'"w9876"', b'"w9876'))
    with pytest.raises(DataError, match="line 9877: not JSON"):
        load_records(str(path), "train", None, 0)


def picture(colour: str) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (16, 16), colour).save(stream, "png")
    return stream.getvalue()


def table(rows: list[dict[str, Any]], images: bool = False) -> datasets.Dataset:
    if not images:
        return datasets.Dataset.from_list(rows)
    pictured = [{**row, "image": {"bytes": picture("red"), "path": None}} for row in rows]
    return datasets.Dataset.from_list(pictured).cast_column("image", datasets.Image())


@pytest.mark.parametrize("name", ["mine.jsonl.gz", "mine.parquet"])
def test_other_files(tmp_path: Path, name: str) -> None:
    """A packed file and a table give the same splits as the lines; as one file, and as the files of a folder."""
    expected = drawn(write(tmp_path / "mine.jsonl"))
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / name, tmp_path / "folder" / name.replace("mine", "train")):
        table(ROWS).to_parquet(path) if path.suffix == ".parquet" else write(path)
    assert drawn(tmp_path / name) == expected
    assert load_records(str(tmp_path / "folder"), "train", None, 0) == ROWS


def test_a_table_of_conversations_with_pictures(tmp_path: Path) -> None:
    """A table gives every row all columns, empty ones too; pictures stay packed until a batch wants them."""
    turns = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
    rows = [{"messages": turns, "prompt": None, "answer": None}, {"messages": None, "prompt": "w3", "answer": "w4"}]
    table(rows, images=True).to_parquet(tmp_path / "train.parquet")
    chat, plain = load_records(str(tmp_path), "train", None, 0)
    assert [part["type"] for part in chat["messages"][0]["content"]] == ["image", "text"]
    assert isinstance(plain["image"], dict)
    assert open_image(plain["image"]).getpixel((3, 3)) == (255, 0, 0)
    (tmp_path / "train.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match=r"train\.parquet: cannot be read as Parquet"):
        load_records(str(tmp_path), "train", None, 0)


class Hub:
    """Stands for the Hub: splits of rows, and what was asked of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **splits: datasets.Dataset) -> None:
        self.splits, self.asked = splits, []
        monkeypatch.setattr(datasets, "get_dataset_split_names", lambda source, subset: [*splits])
        monkeypatch.setattr(datasets, "load_dataset", self.load)

    def load(self, source: str, subset: str | None, split: str, streaming: bool = False) -> Any:
        self.asked.append((subset, split, streaming))
        return self.splits[split].to_iterable_dataset() if streaming else self.splits[split]


def test_a_data_set_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows and pictures as from a file; where a number of rows is asked for, no more than these are fetched."""
    hub = Hub(monkeypatch, train=table(ROWS, images=True), validation=table(ROWS[:10]))
    found = load_records("user/hub-1", "train", 3, 0, subset="small")
    assert [record["prompt"] for record in found] == [row["prompt"] for row in ROWS[:3]]
    assert isinstance(found[0]["image"], dict)
    assert hub.asked == [("small", "train", True)]
    halves = [load_records("user/hub-1", split, None, 0) for split in ("validation", "calibration")]
    assert halves[0] + halves[1] == ROWS[:10]


def test_a_data_set_of_the_hub_without_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most have a train split alone, or a test split beside it: the others are drawn from train, with the seed."""
    Hub(monkeypatch, train=table(ROWS), test=table(ROWS[:9]))
    found = drawn("user/hub-2")
    assert found["test"] == ROWS[:9]
    parts = [found[split] for split in ("train", "validation", "calibration")]
    assert sum(map(len, parts)) == 200
    assert not texts(parts[0]) & texts(parts[1] + parts[2])


def test_limits_of_length_and_size(language_model: Path, tmp_path: Path) -> None:
    """Records over a limit are bad like broken ones: named, and left out where the recipe lets them be."""
    Image.new("RGB", (30, 20)).save(tmp_path / "large.png")
    rows = [*ROWS[:100], {"prompt": "w1 " * 50, "answer": "w2"}, {"prompt": "w1", "answer": "w2", "image": "large.png"}]
    path = write(tmp_path / "mine.jsonl", rows)
    own = [f"backbone.path={language_model}", f"data.source={path}", "data.max_tokens=20", "data.max_pixels=500"]
    with pytest.raises(DataError) as caught:
        [records(load("causal-lm", own), split) for split in SPLITS]
    assert "large.png: 30 x 20 pixels, more than data.max_pixels=500" in str(caught.value) or "line 101: 5" in str(
        caught.value
    )
    recipe = load("causal-lm", [*own, "data.bad_limit=2"])
    assert has_test(recipe)
    assert sum(len(records(recipe, split)) for split in SPLITS) == 100


def test_a_picture_that_the_processor_refuses(tmp_path: Path) -> None:
    """Some take no picture two hundred times as wide as it is high; named before training."""
    processor = picture_processor()
    inner = processor.image_processor

    class Square(type(inner)):
        def __call__(self, images: Any, *args: Any, **options: Any) -> Any:
            if any(image.width > 9 * image.height for row in images for image in row):
                raise ValueError("aspect ratio")
            return super().__call__(images, *args, **options)

    inner.__class__ = Square
    Image.new("RGB", (200, 2)).save(tmp_path / "thin.png")
    Image.new("RGB", (20, 20)).save(tmp_path / "good.png")
    rows = [{"prompt": "<image> w1", "answer": "w2", "image": f"{name}.png"} for name in ("thin", "good")]
    write(tmp_path / "train.jsonl", rows)
    bad = BadRecords(1)
    kept = screen(load_records(str(tmp_path), "train", None, 0), Collator(processor), bad)
    assert len(kept) == 1
    assert bad.lines() == [f"{tmp_path / 'train.jsonl'}, line 1: the processor does not take it (aspect ratio)"]
