"""Records {image, prompt, answer, kind, present}, read and checked: JSON lines, a Hugging Face data set, the demo's."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

from adaskip import sources
from adaskip.errors import DataError
from adaskip.lines import Repeating, json_lines, listed
from adaskip.training.pictures import located, look, pictures_of

FIELDS = ("image", "prompt", "answer", "kind", "present")
SPLITS = ("train", "validation", "calibration", "test")
Record = dict[str, Any]


class SourcedRecord(Record):
    """Remember where a record was read, so that a fault found later can say so; else it is a plain dict."""

    __slots__ = ("where",)
    where: str


@dataclass(frozen=True)
class _Reader:
    """Say how rows become records: the fields they must have, and the names that the source gives our fields."""

    names: Mapping[str, str]
    needed: Sequence[str] = ("prompt", "answer")
    lead: str = ""  # of the error for a missing field
    tail: str = "; name your columns under data.columns"


def load_records(
    source: str, split: str, limit: int | None, seed: int, columns: Mapping[str, str] | None = None
) -> list[Record]:
    """Load one split of a data source, as records with at least ``prompt`` and ``answer``.

    Args:
        source: ``digits-vlm`` (made on the spot), a folder of ``<split>.jsonl`` files, or a Hugging Face dataset id.
        split: train, validation, calibration or test. Where a source has no calibration split, the second half of its
            validation split serves, and validation is the first half.
        limit: at most this many records; for ``digits-vlm`` how many are drawn.
        seed: of the draw (``digits-vlm``).
        columns: the source's own names of our fields.

    Raises:
        DataError: the source or split is missing, or records are wrong; lists them with file and line.
    """
    if sources.is_shipped(source):
        return sources.shipped_records(source, split, limit, seed)
    reader = _Reader({field: (columns or {}).get(field, field) for field in FIELDS})
    folder = Path(source).expanduser()
    if folder.is_dir():
        return _read_folder(folder, split, limit, reader)
    _check_hub_name(source, folder, split)
    return _read_hub(source, split, limit, reader)


def describe_half(source: str, split: str) -> str:
    """Say which half of the validation split a split is; an empty text where it is one of its own.

    >>> describe_half("digits-vlm", "validation")
    ''
    """
    folder = Path(source).expanduser()
    if sources.is_shipped(source) or not _is_half(folder, split):
        return ""
    which = "first" if split == "validation" else "second"
    whole, lacks = f"the validation split of {source}", "a calibration split"
    if folder.is_dir():
        whole, lacks = str(split_file(folder, "validation")), split_file(folder, "calibration").name
    return f"{split} is the {which} half of {whole}, which serves validation and calibration, for want of {lacks}"


def read_prompts(path: Path) -> list[Record]:
    """Read prompts to answer, one object a line with ``prompt`` and maybe ``image``, a path relative to the file.

    Raises:
        DataError: the file or lines of it are wrong; lists them.
    """
    names = {field: field for field in FIELDS}
    lead = 'expected an object such as {"prompt": "..."}; '
    return _read_file(path, _Reader(names, ("prompt",), lead, ""), lambda rows: rows)


def where(record: Mapping[str, Any]) -> str:
    """Return where a record comes from, or for one built by hand how its prompt begins."""
    if isinstance(record, SourcedRecord):
        return record.where
    prompt = str(record.get("prompt", ""))
    return f"the record with prompt {prompt if len(prompt) <= 60 else prompt[:57] + '...'!r}"


def split_file(folder: Path, split: str) -> Path:
    """Return the file of a split in a folder of JSON lines."""
    return folder / f"{split}.jsonl"


def _read_folder(folder: Path, split: str, limit: int | None, reader: _Reader) -> list[Record]:
    shared = _is_half(folder, split)
    path = split_file(folder, "validation" if shared else split)
    if not path.is_file():
        raise DataError(f"{path}: no such file; expected {path.name} in {folder}, which holds {_holdings(folder)}")
    return _read_file(path, reader, lambda rows: (_half(rows, split, str(path)) if shared else rows)[:limit])


def _is_half(folder: Path, split: str) -> bool:
    """Return whether validation and calibration share a file; what is read from the hub has no calibration split."""
    return split in ("validation", "calibration") and not split_file(folder, "calibration").is_file()


def _holdings(folder: Path) -> str:
    lines = sorted(path.name for path in folder.glob("*.jsonl"))
    if lines:
        return ", ".join(lines)
    others = sorted(path.name for path in folder.iterdir())
    hint = f" but {', '.join(others[:5])}{' ...' if len(others) > 5 else ''}" if others else ""
    if any(name.endswith(".json") for name in others):
        hint += "; write one JSON object a line, into files that end in .jsonl"
    return f"no .jsonl file{hint}"


def _read_file(path: Path, reader: _Reader, choose: Any) -> list[Record]:
    """Read the records of a file; those that ``choose`` keeps must have their pictures."""
    rows = [(f"{path}, line {number}", row, fault) for number, row, fault in json_lines(path)]
    if not rows:
        needed = ", ".join(reader.needed if len(reader.needed) == 1 else FIELDS)
        raise DataError(f"{path}: the file is empty; expected one JSON object a line with {needed}")
    return _checked(rows, reader, choose, path.parent, str(path))


def _check_hub_name(source: str, path: Path, split: str) -> None:
    """Refuse what is meant as a path, before anybody looks for a data set of that name on the hub."""
    if path.is_file():
        raise DataError(
            f"data.source {source!r} is a file; expected the folder that holds {split}.jsonl: data.source={path.parent}"
        )
    if source.startswith((".", "/", "~")) or "\\" in source or PureWindowsPath(source).drive:
        raise DataError(f"data.source {source!r}: no such folder; expected a folder that holds {split}.jsonl")


def _read_hub(source: str, split: str, limit: int | None, reader: _Reader) -> list[Record]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise DataError(
            f"data.source {source!r} is no folder; to read it as a Hugging Face dataset: pip install 'adaskip[data]'"
        ) from error
    shared = _is_half(Path(source), split)
    name = "validation" if shared else split
    try:
        table = load_dataset(source, split=name)
    except Exception as error:
        raise DataError(f"data.source {source!r}: neither a folder here nor a dataset that loads ({error})") from error
    rows, title = _table_rows(table, f"{source}, {name} row"), f"{source}, {name}"
    return _checked(rows, reader, lambda rows: (_half(rows, split, title) if shared else rows)[:limit], None, title)


def _table_rows(table: Any, title: str) -> Iterator[tuple[str, Any, str | None]]:
    for number in range(len(table)):
        try:
            yield f"{title} {number}", table[number], None
        except (OSError, SyntaxError, ValueError, TypeError, KeyError, RuntimeError) as error:  # damaged pictures
            yield f"{title} {number}", None, f"cannot be read ({error})"


def _half(rows: list[Any], split: str, title: str) -> list[Any]:
    middle = (len(rows) + 1) // 2
    half = rows[middle:] if split == "calibration" else rows[:middle]
    if not half:
        raise DataError(
            f"{title}: holds 1 row, and without a calibration split its second half serves as one, which is empty; "
            "add rows, or a split of its own (calibration.jsonl)"
        )
    return half


def _checked(
    rows: Iterable[tuple[str, Any, str | None]], reader: _Reader, choose: Any, folder: Path | None, title: str
) -> list[Record]:
    """Make records of rows, and look at the pictures of the chosen ones; raise one error for all faults."""
    records: list[Record] = []
    faults: list[str] = []
    for place, row, fault in rows:
        texts = [fault] if fault else [*_row_faults(row, reader)]
        faults += [f"{place}: {text}" for text in texts]
        if not texts:
            records.append(_record(row, reader.names, place))
    chosen = choose(records) if not faults else records
    paths: set[str] = set()  # of pictures that were looked at: one may serve many records
    for record in chosen:
        try:
            _find_pictures(record, folder, paths)
        except DataError as error:
            faults.append(f"{where(record)}: {error}")
    if faults:
        raise DataError(listed(faults, title))
    return chosen


def _row_faults(row: Any, reader: _Reader) -> Iterator[str]:
    """Yield what is wrong with a row, except for its pictures."""
    if not isinstance(row, dict):
        yield f"{reader.lead or 'expected a JSON object, '}got {type(row).__name__}: {_short(row)}"
        return
    if isinstance(row, Repeating) and (repeated := set(row.repeated) & {*reader.names.values(), "images"}):
        yield f"{' and '.join(sorted(repeated))} appears twice; keep one"
        return
    missing = [name for field in reader.needed if (name := reader.names[field]) not in row]
    if missing:
        yield f"{reader.lead}expected text in {' and '.join(missing)}, found fields {', '.join(row)}{reader.tail}"
        return
    for field in reader.needed:
        if (text := _text_fault(row[reader.names[field]])) is not None:
            yield f"{reader.lead}{reader.names[field]} {text}"
    kind = row.get(reader.names["kind"])
    if not isinstance(kind, str | int | float | None) or (isinstance(kind, float) and not math.isfinite(kind)):
        yield f"{reader.names['kind']} is {_named(kind)}; expected text"
    present, name = row.get(reader.names["present"]), reader.names["present"]
    if present is not None and not (
        isinstance(present, list) and all(isinstance(w, str) and w.strip() for w in present)
    ):
        yield (
            f'{name} is {_named(present)}; expected a list of what an answer may name, such as ["cat", "dog"], '
            "or another name for it under data.columns.present"
        )


def _text_fault(value: Any) -> str | None:
    """Return why a value is no text that a model can read, if it is none."""
    if isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value):
        return (
            "is a list of messages; expected text. Render it: tokenizer.apply_chat_template(messages, tokenize=False, "
            "add_generation_prompt=True)"
        )
    if not isinstance(value, str):
        plain = isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value))
        hint = f': write "{json.dumps(value)}", in quotes' if plain else ""
        return f"is {_named(value)}; expected text{hint}"
    if not value.strip():
        return "is empty; expected text"
    try:
        value.encode()
    except UnicodeEncodeError as error:
        return f"holds half a character, {value[error.start]!r} (a lone surrogate); mend the program that wrote it"
    return None


def _record(row: Mapping[str, Any], names: Mapping[str, str], place: str) -> Record:
    fields = {field: row[names[field]] for field in FIELDS if row.get(names[field]) not in (None, "")}
    if names["image"] == "image" and row.get("images"):
        fields["images"] = row["images"]
    if "kind" in fields and not isinstance(fields["kind"], str):
        fields["kind"] = json.dumps(fields["kind"])  # kinds are sorted, and keys of JSON files: text, all of them
    record = SourcedRecord(fields)
    record.where = place
    return record


def _find_pictures(record: Record, folder: Path | None, paths: set[str]) -> None:
    """Put a record's pictures under ``image``, one or a list of them, with paths that open; no key without any.

    Files whose path is in ``paths`` were looked at before; new ones are added to it.
    """
    pictures = [located(picture, folder) for picture in pictures_of(record)]
    for picture in pictures:
        if not isinstance(picture, Path):
            look(picture)
        elif str(picture) not in paths:
            look(picture)
            paths.add(str(picture))
    record.pop("images", None)
    record.pop("image", None)
    if pictures:
        record["image"] = pictures[0] if len(pictures) == 1 else pictures


def _named(value: Any) -> str:
    """Return a JSON value with its type, as its writer would call it."""
    if value is None:
        return "null"
    kinds = {str: "text", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return f"{_short(value)} ({kinds.get(type(value), type(value).__name__)})"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
