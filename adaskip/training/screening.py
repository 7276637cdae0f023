"""Screen records against a backbone's processor: conversations are written for it, and what it cannot take is noted."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

from adaskip.errors import DataError
from adaskip.training.bad_records import BadRecords
from adaskip.training.collate import Collator
from adaskip.training.pictures import pictures_of
from adaskip.training.prompts import Refusal
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
    if any("messages" in record for record in records):
        collate.chat.check()
    faults: dict[str, list[str]] = {}
    rendered: list[Record] = []
    for record in records:
        try:
            rendered += collate.rendered([record])
        except DataError as error:
            faults[where(record)] = [str(error).removeprefix(f"{where(record)}: ")]
    for record, text in collate.faults(rendered):
        faults.setdefault(where(record), []).append(text)
    taken = [record for record in rendered if where(record) not in faults]
    counts = TokenCounts(collate)
    for record in taken:
        # a token is a byte at least, so that most texts need not be counted
        if pictures_of(record) or (longest is not None and _bytes(record) + _AROUND > longest):
            try:
                count = sum(counts([record])[0])
            except Refusal as error:
                faults[where(record)] = [f"the processor does not take it ({error})"]
                continue
            if longest is not None and count > longest:
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
