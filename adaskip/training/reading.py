"""Read one split of a data source: a file, a folder of files, a data set of the Hub, or what ships with the package."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

from adaskip import sources
from adaskip.errors import DataError
from adaskip.lines import json_lines
from adaskip.training.bad_records import BadRecords
from adaskip.training.division import divide
from adaskip.training.records import FIELDS, Choose, Reader, Record, Row
from adaskip.training.tables import hub_splits, hub_table, parquet_table, table_rows

ENDINGS = (".jsonl", ".jsonl.gz", ".parquet")
"""What a file of data ends in; in a folder, the first that is there is read."""


@dataclass(frozen=True)
class _Stored:
    """Hold the rows that a split lies among, and how it is chosen from the records that they make."""

    title: str
    rows: Iterable[Row]
    folder: Path | None  # that paths of pictures are relative to
    choose: Choose = lambda records: records


def load_records(
    source: str,
    split: str,
    limit: int | None,
    seed: int,
    columns: Mapping[str, str] | None = None,
    *,
    bad: BadRecords | None = None,
    subset: str | None = None,
    max_pixels: int | None = None,
) -> list[Record]:
    """Load one split of a data source, as records with ``prompt`` and ``answer``, or with ``messages``.

    Args:
        source: ``digits-vlm`` (made on the spot), a folder of ``<split>.jsonl`` files, one file, or a Hugging Face
            dataset id. Files are JSON lines, gzipped or not, or Parquet.
        split: train, validation, calibration or test. Where a source has no calibration split, the second half of its
            validation split serves, and validation is the first half. A file, and a data set of the Hub without a
            validation split, is divided with the seed: `adaskip.training.division.divide`.
        limit: at most this many records; for ``digits-vlm`` how many are drawn.
        seed: of the draw (``digits-vlm``) or the division.
        columns: the source's own names of our fields.
        bad: hears of bad records, which are left out; None: a source with any is refused.
        subset: the configuration of a data set of the Hub.
        max_pixels: of a picture; a record with a larger one is bad.

    Raises:
        DataError: the source or split is missing, or records are wrong; lists them with file and line.
    """
    if sources.is_shipped(source):
        return sources.shipped_records(source, split, limit, seed)
    reader = Reader({field: (columns or {}).get(field, field) for field in FIELDS}, max_pixels=max_pixels)
    path = sources.expanded(source)
    if path.is_dir():
        stored = _in_folder(path, split, reader)
    elif path.is_file():
        stored = _in_file(path, split, seed, reader)
    else:
        _check_hub_name(source, split)
        stored = _on_hub(source, split, seed, subset, limit)
    own = BadRecords() if bad is None else bad
    records = reader.read(stored.rows, lambda rows: stored.choose(rows)[:limit], stored.folder, own)
    if bad is None:
        own.stop(stored.title)
    return records


def read_prompts(path: Path) -> list[Record]:
    """Read prompts to answer: an object a line with ``prompt`` or ``messages``, and maybe ``image``, a path.

    Raises:
        DataError: the file or lines of it are wrong; lists them.
    """
    reader = Reader(
        {field: field for field in FIELDS}, ("prompt",), 'expected an object such as {"prompt": "..."}; ', ""
    )
    bad = BadRecords()
    records = reader.read(_file_rows(path, reader), lambda rows: rows, path.parent, bad)
    bad.stop(str(path))
    return records


def describe_half(source: str, split: str) -> str:
    """Say how a split came about that is none of the source's own; an empty text where it is one.

    >>> describe_half("digits-vlm", "validation")
    ''
    """
    path = sources.expanded(source)
    if path.is_file():
        return f"{split} is a share of {source}, drawn with data.seed"
    if sources.is_shipped(source) or not _is_half(path, split):
        return ""
    which = "first" if split == "validation" else "second"
    whole, lacks = f"the validation split of {source}", "a calibration split"
    if path.is_dir():
        whole, lacks = str(split_file(path, "validation")), split_file(path, "calibration").name
    return f"{split} is the {which} half of {whole}, which serves validation and calibration, for want of {lacks}"


def holds_split(source: str, split: str, subset: str | None = None) -> bool:
    """Return whether a source holds a split, damaged or not, or one that is made of what it holds."""
    path = sources.expanded(source)
    if sources.is_shipped(source) or path.is_file():
        return True
    if path.is_dir():
        return split_file(path, split).is_file()
    held = hub_splits(source, subset)
    return split in held or "validation" not in held


def split_file(folder: Path, split: str) -> Path:
    """Return the file of a split in a folder; where there is none, what it is called as JSON lines."""
    choices = [folder / f"{split}{ending}" for ending in ENDINGS]
    return next((path for path in choices if path.is_file()), choices[0])


# -- files -------------------------------------------------------------------------------------------------------------


def _in_folder(folder: Path, split: str, reader: Reader) -> _Stored:
    shared = _is_half(folder, split)
    path = split_file(folder, "validation" if shared else split)
    if not path.is_file():
        alone = split_file(folder, "train")
        hint = f"; to draw all splits from {alone.name}: data.source={alone}" if alone.is_file() else ""
        raise DataError(
            f"{path}: no such file; expected {path.name} in {folder}, which holds {_holdings(folder)}{hint}"
        )
    choose: Choose = (lambda rows: _half(rows, split, str(path))) if shared else (lambda rows: rows)
    return _Stored(str(path), _file_rows(path, reader), folder, choose)


def _in_file(path: Path, split: str, seed: int, reader: Reader) -> _Stored:
    if not path.name.endswith(ENDINGS):
        raise DataError(
            f"data.source {str(path)!r} is a file; expected one that ends in {', '.join(ENDINGS)}, or the folder that "
            f"holds {split}.jsonl: data.source={path.parent}"
        )
    choose = _share(split, seed, str(path), ())
    return _Stored(str(path), _file_rows(path, reader), path.parent, choose)


def _file_rows(path: Path, reader: Reader) -> list[Row]:
    if path.suffix == ".parquet":
        rows = [*table_rows(parquet_table(path), f"{path}, row")]
    else:
        rows = [(f"{path}, line {number}", row, fault) for number, row, fault in json_lines(path)]
    if not rows:
        needed = ", ".join(FIELDS if reader.answers else reader.needed)
        raise DataError(f"{path}: the file is empty; expected one JSON object a line with {needed}")
    return rows


def _holdings(folder: Path) -> str:
    lines = sorted(path.name for path in folder.iterdir() if path.name.endswith(ENDINGS))
    if lines:
        return ", ".join(lines)
    others = sorted(path.name for path in folder.iterdir())
    hint = f" but {', '.join(others[:5])}{' ...' if len(others) > 5 else ''}" if others else ""
    if any(name.endswith(".json") for name in others):
        hint += "; write one JSON object a line, into files that end in .jsonl"
    return f"no .jsonl file{hint}"


# -- the Hub -----------------------------------------------------------------------------------------------------------


def _check_hub_name(source: str, split: str) -> None:
    """Refuse what is meant as a path, before anybody looks for a data set of that name on the hub."""
    if source.startswith((".", "/", "~")) or "\\" in source or PureWindowsPath(source).drive:
        raise DataError(f"data.source {source!r}: no such folder; expected a folder that holds {split}.jsonl")


def _on_hub(source: str, split: str, seed: int, subset: str | None, limit: int | None) -> _Stored:
    held, name = hub_splits(source, subset), split
    choose: Choose = lambda records: records  # noqa: E731
    if "validation" not in held and split not in held - {"train"}:
        name, limit = "train", None
        choose = _share(split, seed, f"{source}, train", [*held - {"train"}])
    elif split in ("validation", "calibration") and "calibration" not in held:
        name, limit = "validation", None
        choose = lambda records: _half(records, split, f"{source}, validation")  # noqa: E731
    title = f"{source}, {name}"
    return _Stored(title, table_rows(hub_table(source, name, subset, limit), f"{title} row"), None, choose)


# -- splits that are made ----------------------------------------------------------------------------------------------


def _is_half(folder: Path, split: str) -> bool:
    """Return whether validation and calibration share what a source holds of validation."""
    return split in ("validation", "calibration") and not split_file(folder, "calibration").is_file()


def _half(rows: list[Any], split: str, title: str) -> list[Any]:
    middle = (len(rows) + 1) // 2
    half = rows[middle:] if split == "calibration" else rows[:middle]
    if not half:
        raise DataError(
            f"{title}: holds {len(rows)} row{'' if len(rows) == 1 else 's'}, and without a calibration split its "
            "second half serves as one, which is empty; add rows, or a split of its own (calibration.jsonl)"
        )
    return half


def _share(split: str, seed: int, title: str, stored: Sequence[str]) -> Choose:
    """Return what draws a split from records that come without, and says so where it gets none."""

    def choose(records: list[Record]) -> list[Record]:
        drawn = divide(records, split, seed, stored)
        if not drawn:
            raise DataError(
                f"{title}: holds {len(records)} record{'' if len(records) == 1 else 's'} to draw all splits from, and "
                f"{split} gets none; add rows"
            )
        return drawn

    return choose
