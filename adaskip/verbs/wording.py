"""Judge generated answers by their words: how far they lie from the data's own, what they name that is not there."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torchmetrics.functional.text import edit_distance


def edit_distances(said: Sequence[str], wanted: Sequence[str]) -> list[float]:
    """Return the edit distance of each answer from the wanted one, over the wanted one's length.

    The distance counts characters to insert, delete or replace (Levenshtein), so 0 is an exact match, and an answer
    that goes on without an end lies beyond 1.

    >>> edit_distances(["9 8 0", "9 8"], ["9 8 1", "9 8"])
    [0.2, 0.0]
    """
    distances = [0.0] * len(said)
    # most answers are right, and a distance takes the product of both lengths
    if wrong := [place for place, pair in enumerate(zip(said, wanted, strict=True)) if pair[0] != pair[1]]:
        edits = edit_distance([said[place] for place in wrong], [wanted[place] for place in wrong], reduction="none")
        for place, count in zip(wrong, edits.tolist(), strict=True):
            distances[place] = count / max(1, len(wanted[place]))
    return distances


class Content:
    """Find what answers name, and whether it is there: the CHAIR rule (arXiv 1809.02156), on words that the data list.

    Args:
        records: all that are judged. Those with ``present`` say what an answer may name; together they are the words
            that count as naming something. A word counts where it stands whole, in upper or lower case.

    >>> content = Content([{"present": ["cat", "traffic light"]}, {"present": ["light"]}, {}])
    >>> content.hallucinates("A Cat, a light.", ["cat", "traffic light"]), content.hallucinates("lights", ["cat"])
    (True, False)
    """

    def __init__(self, records: Sequence[Mapping[str, Any]]) -> None:
        words = {str(word).casefold() for record in records for word in record.get("present") or ()}
        # longer ones first: a traffic light names no light
        choices = "|".join(re.escape(word) for word in sorted(words, key=lambda word: (-len(word), word)))
        self._naming = re.compile(rf"(?<!\w)(?:{choices})(?!\w)") if words else None

    def hallucinates(self, said: str, present: Sequence[str]) -> bool:
        """Return whether an answer names anything that is not among what is present."""
        named = set() if self._naming is None else {*self._naming.findall(said.casefold())}
        return bool(named - {str(word).casefold() for word in present})

    def shares(self, said: Sequence[str], records: Sequence[Mapping[str, Any]]) -> list[float | None]:
        """Return 1 for each answer that names what is not there, else 0; None where its record does not say."""
        return [
            None if record.get("present") is None else float(self.hallucinates(text, record["present"]))
            for text, record in zip(said, records, strict=True)
        ]
