"""Bad records: each noted once with its place and its faults, left out, and too many once they pass a limit."""

from __future__ import annotations

from collections.abc import Sequence

from adaskip.errors import DataError
from adaskip.lines import listed


class BadRecords:
    """Note the bad records of a source, so that all are told at once and some may be left out.

    Args:
        limit: so many records may be bad; None: any number.

    >>> bad = BadRecords(limit=1)
    >>> bad.note("a.jsonl, line 3", ["answer is empty; expected text"])
    >>> bad.stop("a.jsonl")  # one is allowed
    >>> bad.lines()
    ['a.jsonl, line 3: answer is empty; expected text']
    """

    def __init__(self, limit: int | None = 0) -> None:
        self.limit = limit
        self.faults: dict[str, tuple[str, ...]] = {}  # place -> what is wrong there

    def __len__(self) -> int:
        """Count the records."""
        return len(self.faults)

    def note(self, place: str, texts: Sequence[str]) -> None:
        """Note what is wrong at a place; one that was noted before, when another split was read, stays one."""
        self.faults.setdefault(place, tuple(texts))

    def lines(self) -> list[str]:
        """List all faults, each behind its place."""
        return [f"{place}: {text}" for place, texts in self.faults.items() for text in texts]

    @property
    def too_many(self) -> bool:
        """Return whether there are more than the limit."""
        return self.limit is not None and len(self) > self.limit

    def stop(self, title: str) -> None:
        """Refuse more bad records than the limit.

        Raises:
            DataError: lists them.
        """
        if not self.too_many:
            return
        allowed = f"{title}: {len(self)} bad records, and data.bad_limit lets {self.limit} be left out"
        raise DataError(listed(self.lines(), allowed if self.limit else title))
