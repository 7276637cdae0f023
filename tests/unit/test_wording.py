"""Generated answers by their words: edit distance against a definition, and what counts as named and as absent."""

from __future__ import annotations

from functools import lru_cache

import pytest

from adaskip.verbs.wording import Content, edit_distances


def edits(said: str, wanted: str) -> int:
    """By the definition of Levenshtein's distance, from the ends."""

    @lru_cache
    def between(i: int, j: int) -> int:
        if not i or not j:
            return i + j
        return min(between(i - 1, j) + 1, between(i, j - 1) + 1, between(i - 1, j - 1) + (said[i - 1] != wanted[j - 1]))

    return between(len(said), len(wanted))


def test_edit_distance_by_its_definition() -> None:
    """Catches a share of the wrong text's length, words in the place of characters, and a mean over answers."""
    pairs = [("9 8 0", "9 8 1"), ("", "41.50"), ("the sun", "sunday"), ("7 7 7 7 7", "7"), ("same", "same")]
    found = edit_distances([said for said, _ in pairs], [wanted for _, wanted in pairs])
    assert found == pytest.approx([edits(said, wanted) / len(wanted) for said, wanted in pairs])
    assert found[3] > 1
    assert edit_distances([], []) == []


@pytest.mark.parametrize(
    ("said", "present", "found"),
    [
        ("3 8", ["3", "8"], False),
        ("3 9", ["3", "8"], True),
        ("18", ["1"], False),  # neither the 1 nor the 8: a word of its own, which is nobody's
        ("A Dog, sitting.", ["3"], True),
        ("doghouse", ["3"], False),
        ("hot dog", ["hot dog"], False),  # names no dog
        ("hot dog and dog", ["hot dog"], True),
        ("", [], False),
        ("3", [], True),
    ],
)
def test_what_is_named_and_absent(said: str, present: list[str], found: bool) -> None:
    """Catches words inside of words, capitals that hide a word, and a short name inside of a longer one."""
    content = Content([{"present": ["3", "8", "1", "9"]}, {"present": ["dog", "hot", "Hot Dog"]}, {"answer": "cat"}])
    assert content.hallucinates(said, present) is found


def test_records_that_do_not_say_are_not_counted() -> None:
    """Catches a 0 where nothing is known, which would make a model look honest."""
    records = [{"present": ["3"]}, {}, {"present": ["4"]}]
    assert Content(records).shares(["4", "4", "4"], records) == [1.0, None, 0.0]
    assert Content([{}]).shares(["4"], [{}]) == [None]
