"""Records {image, prompt, answer, kind, present} or {messages, image, kind}: what a row must hold to become one."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaskip.errors import DataError
from adaskip.lines import Repeating
from adaskip.training.bad_records import BadRecords
from adaskip.training.messages import read_messages
from adaskip.training.pictures import located, look, pictures_of
from adaskip.training.values import named, short, text_fault

FIELDS = ("image", "prompt", "answer", "kind", "present", "messages")
SPLITS = ("train", "validation", "calibration", "test")
Record = dict[str, Any]
Row = tuple[str, Any, str | None]
"""Where it was read, its value, and why it could not be read."""
Choose = Callable[[list[Record]], list[Record]]


class SourcedRecord(Record):
    """Remember where a record was read, so that a fault found later can say so; else it is a plain dict."""

    __slots__ = ("where",)
    where: str


@dataclass(frozen=True)
class Reader:
    """Say how rows become records: the fields they must have, and the names that the source gives our fields."""

    names: Mapping[str, str]
    needed: Sequence[str] = ("prompt", "answer")
    lead: str = ""  # of the error for a missing field
    tail: str = "; name your columns under data.columns"
    max_pixels: int | None = None  # of a picture

    @property
    def answers(self) -> bool:
        """Return whether a record must hold an answer."""
        return "answer" in self.needed

    def read(self, rows: Iterable[Row], choose: Choose, folder: Path | None, bad: BadRecords) -> list[Record]:
        """Make records of rows, and decode the pictures of the chosen ones; what is wrong with any goes to ``bad``."""
        records: list[Record] = []
        for place, row, fault in rows:
            if texts := [fault] if fault else [*self._faults(row)]:
                bad.note(place, texts)
                continue
            record = self._record(row, place)
            texts = record.pop("faults", [])
            if texts:
                bad.note(place, texts)
            else:
                records.append(record)
        chosen = records if bad.too_many else choose(records)
        with ThreadPoolExecutor() as pool:  # Pillow decodes beside Python
            found = [*pool.map(_Pictures(folder, self.max_pixels), chosen)]
        for record, text in zip(chosen, found, strict=True):
            if text is not None:
                bad.note(where(record), [text])
        return [record for record, text in zip(chosen, found, strict=True) if text is None]

    def _faults(self, row: Any) -> Iterator[str]:
        """Yield what is wrong with a row, except for its conversation and pictures."""
        names = self.names
        if not isinstance(row, dict):
            yield f"{self.lead or 'expected a JSON object, '}got {type(row).__name__}: {short(row)}"
            return
        if isinstance(row, Repeating) and (repeated := set(row.repeated) & {*names.values(), "images"}):
            yield f"{' and '.join(sorted(repeated))} appears twice; keep one"
            return
        if not self._is_conversation(row):
            yield from self._prompt_faults(row)
        kind = row.get(names["kind"])
        if not isinstance(kind, str | int | float | None) or (isinstance(kind, float) and not math.isfinite(kind)):
            yield f"{names['kind']} is {named(kind)}; expected text"
        present, name = row.get(names["present"]), names["present"]
        if present is not None and not (
            isinstance(present, list) and all(isinstance(w, str) and w.strip() for w in present)
        ):
            yield (
                f'{name} is {named(present)}; expected a list of what an answer may name, such as ["cat", "dog"], '
                "or another name for it under data.columns.present"
            )

    def _is_conversation(self, row: Mapping[str, Any]) -> bool:
        """Return whether a row holds messages; a table gives every row all columns, and leaves them empty."""
        name = self.names["messages"]
        return name in row and (row[name] is not None or self.names["prompt"] not in row)

    def _prompt_faults(self, row: Mapping[str, Any]) -> Iterator[str]:
        missing = [name for field in self.needed if (name := self.names[field]) not in row]
        if missing:
            wanted = f"{' and '.join(missing)}{', or turns in messages' if self.names['prompt'] in missing else ''}"
            yield f"{self.lead}expected text in {wanted}, found fields {', '.join(row)}{self.tail}"
            return
        for field in self.needed:
            if (text := text_fault(row[self.names[field]])) is not None:
                yield f"{self.lead}{self.names[field]} {text}"

    def _record(self, row: Mapping[str, Any], place: str) -> Record:
        """Return the record of a row; what is wrong with its conversation stands under ``faults``."""
        names = self.names
        fields = {field: row[names[field]] for field in FIELDS if row.get(names[field]) not in (None, "")}
        if names["image"] == "image" and row.get("images"):
            fields["images"] = row["images"]
        if "kind" in fields and not isinstance(fields["kind"], str):
            fields["kind"] = json.dumps(fields["kind"])  # kinds are sorted, and keys of JSON files: text, all of them
        record = SourcedRecord(fields)
        record.where = place
        if self._is_conversation(row):
            self._take_messages(record, row[names["messages"]])
        return record

    def _take_messages(self, record: Record, messages: Any) -> None:
        try:
            beside = pictures_of(record)
        except DataError as error:
            record["faults"] = [str(error)]
            return
        turns, pictures, faults = read_messages(messages, beside, self.answers)
        for name in ("images", "image", "prompt", "answer"):
            record.pop(name, None)
        record["messages"] = turns
        if pictures:
            record["image"] = pictures
        if faults:
            record["faults"] = [f"{self.names['messages']}{fault}" for fault in faults]


class _Pictures:
    """Find and decode the pictures of records; a file that serves many of them is decoded once."""

    def __init__(self, folder: Path | None, max_pixels: int | None) -> None:
        self.folder, self.max_pixels = folder, max_pixels
        self.seen: set[str] = set()

    def __call__(self, record: Record) -> str | None:
        """Put a record's pictures under ``image``, one or a list of them, with paths that open; no key without any.

        Returns what is wrong with them.
        """
        try:
            pictures = [located(picture, self.folder) for picture in pictures_of(record)]
            for picture in pictures:
                if not isinstance(picture, Path):
                    look(picture, self.max_pixels)
                elif str(picture) not in self.seen:
                    look(picture, self.max_pixels)
                    self.seen.add(str(picture))
        except DataError as error:
            return str(error)
        record.pop("images", None)
        record.pop("image", None)
        if pictures:
            record["image"] = pictures[0] if len(pictures) == 1 else pictures
        return None


def where(record: Mapping[str, Any]) -> str:
    """Return where a record comes from, or for one built by hand how its prompt begins."""
    if isinstance(record, SourcedRecord):
        return record.where
    prompt = str(record.get("prompt", record.get("messages", "")))
    return f"the record with prompt {prompt if len(prompt) <= 60 else prompt[:57] + '...'!r}"
