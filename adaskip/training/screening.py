"""Screen records against a backbone's processor: conversations are written for it, and what it cannot take is noted."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

from adaskip.training.bad_records import BadRecords
from adaskip.training.collate import Collator
from adaskip.training.pictures import pictures_of
from adaskip.training.records import Record, where
from adaskip.training.token_counts import TokenCounts

_AROUND = 8  # tokens that a tokenizer puts around a text, at most


def screen(
    records: Sequence[Record], collate: Collator, bad: BadRecords, longest: int | None = None, named: str = ""
) -> list[Record]:
    """Return the records that a collator can take, each with a prompt; the others go to ``bad``.

    Args:
        records: all there are.
        collate: of the backbone's processor.
        bad: hears of the others.
        longest: tokens that a prompt with all that follows it may have; None: any number.
        named: what says so, for an error.

    Raises:
        DataError: there are conversations, and the model has no chat template.
    """
    faults: dict[str, list[str]] = {}
    for record, text in collate.faults(records):
        faults.setdefault(where(record), []).append(text)
    taken = collate.rendered([record for record in records if where(record) not in faults])
    if longest is not None:
        # a token is a byte at least, so that most texts need not be counted
        doubtful = [record for record in taken if pictures_of(record) or _bytes(record) + _AROUND > longest]
        for record, counts in zip(doubtful, TokenCounts(collate)(doubtful), strict=True):
            if (count := sum(counts)) > longest:
                faults[where(record)] = [f"{count} tokens with its answer, more than {longest} ({named}); shorten it"]
    for place, texts in faults.items():
        bad.note(place, texts)
    return [record for record in taken if where(record) not in faults]


def as_conversation(record: Record) -> Record:
    """Return a record of prompt and answer as a conversation of two turns, pictures first; another as it is."""
    if "messages" in record:
        return record
    result = copy(record)  # which keeps its file and line
    pictures = [{"type": "image"} for _ in pictures_of(record)]
    turns = [{"role": "user", "content": [*pictures, {"type": "text", "text": result.pop("prompt")}]}]
    if "answer" in record:
        turns.append({"role": "assistant", "content": [{"type": "text", "text": result.pop("answer")}]})
    result["messages"] = turns
    return result


def _bytes(record: Record) -> int:
    behind = "".join(text for text, _ in record["turns"]) if "turns" in record else record.get("answer", "")
    return len((record["prompt"] + behind).encode())
