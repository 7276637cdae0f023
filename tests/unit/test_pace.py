"""How many tokens to draft: what pays by acceptance and seconds, and what trying costs where nothing does."""

from __future__ import annotations

import random

import pytest

from adaskip.generate.pace import Pace, expected_tokens


def decode(pace: Pace, tokens: int, acceptance: float, draft_s: float, more_s: float = 0.0, seed: int = 0) -> float:
    """Simulated seconds of so many tokens; a dense pass takes 1, and ``more_s`` for each token behind its first."""
    draw, seconds, emitted = random.Random(seed), 0.0, 0
    while emitted < tokens:
        length = pace.choose(tokens - emitted - 1)
        accepted = 0
        while accepted < length and draw.random() < acceptance:
            accepted += 1
        tried = min(accepted + 1, length)
        pace.note(length, tried, accepted, accepted + 1, length * draft_s, 1 + more_s * length)
        emitted += accepted + 1
        seconds += length * draft_s + 1 + more_s * length
    return seconds


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("draft_s", [0.3, 0.7])
def test_where_nothing_is_accepted_trying_costs_three_percent_at_most(draft_s: float, seed: int) -> None:
    """Of a first text of 300 tokens, and of 60 ones later on. It fails where trials are not paid from plain passes."""
    pace = Pace(draft_s)
    assert decode(pace, 300, 0.0, draft_s, 0.1, seed) <= 300 * 1.03
    assert sum(decode(pace, 60, 0.0, draft_s, 0.1, seed) for _ in range(10)) <= 600 * 1.03


@pytest.mark.parametrize(("acceptance", "draft_s"), [(0.9, 0.5), (0.7, 0.2), (0.97, 0.8), (1.0, 0.5)])
def test_lengths_are_near_the_best_fixed_one(acceptance: float, draft_s: float) -> None:
    """It fails where the length does not follow acceptance, or seconds are put beside the wrong number of tokens."""
    best = max(expected_tokens(acceptance, length) / (length * draft_s + 1 + 0.05 * length) for length in range(13))
    seconds = [decode(Pace(draft_s), 1000, acceptance, draft_s, 0.05, seed) for seed in range(5)]
    assert sum(seconds) / 5 <= 1.06 * 1000 / best


def test_drafts_come_back_where_they_begin_to_pay() -> None:
    """Text that no draft had a part in, then text that every draft agrees with: rare trials find out.

    It fails where drafts that once stopped are never tried again, or where one trial's success is not followed up.
    """
    pace = Pace(0.5)
    decode(pace, 300, 0.0, 0.5)
    assert pace.choose(100) <= 1
    assert decode(pace, 600, 1.0, 0.5) <= 450


def test_the_first_pass_is_plain_and_room_is_kept() -> None:
    """Nothing can be compared before a plain pass was measured; a draft never exceeds the room."""
    pace = Pace(0.5)
    assert pace.choose(100) == 0
    pace.note(0, 0, 0, 1, 0.0, 1.0)
    assert pace.choose(100) > 1
    assert (pace.choose(1), pace.choose(0)) == (1, 0)


def test_a_stall_does_not_stop_drafts() -> None:
    """One pass that took twenty times as long, as on a busy machine, moves the running seconds by a third at most."""
    pace = Pace(0.3)
    decode(pace, 200, 0.9, 0.3)
    pace.note(0, 0, 0, 1, 0.0, 1.0)  # it was due, after many rounds of drafts
    pace.note(4, 4, 4, 5, 24.0, 20.0)
    assert pace.choose(100) > 0
    decode(pace, 20, 0.9, 0.3)
    assert pace.choose(100) > 1
