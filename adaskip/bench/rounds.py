"""Fair timing of programs against one another: rounds in which each takes two turns, until the interval is narrow."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping

import torch

from adaskip.theory.intervals import Interval, bootstrap_mean

LEAST, MOST = 10, 200  # few rounds that happen to agree would stop too early, with an interval that is too narrow
Seconds = dict[str, list[float]]


def interleave(
    calls: Mapping[str, Callable[[], float]],
    enough: Callable[[Seconds], bool],
    budget: float,
    on_round: Callable[[Seconds], None] = lambda seconds: None,
) -> Seconds:
    """Time calls in rounds, in which each takes two turns; return each call's seconds, one mean a round.

    A round runs the calls in order and then in reverse (for two of them: A B B A), so that whatever drifts evenly
    during a round, such as a processor that gets hot, falls on all calls alike.

    Args:
        calls: by name; each does its work once and returns its seconds.
        enough: whether the rounds so far suffice; asked after every round from the `LEAST`th on.
        budget: seconds after which no further round begins; one round is always made.
        on_round: called with the seconds so far after every round.
    """
    start = time.perf_counter()
    seconds: Seconds = {name: [] for name in calls}
    for done in range(1, MOST + 1):
        turns: Seconds = {name: [] for name in calls}
        for name in (*calls, *reversed(tuple(calls))):
            turns[name].append(calls[name]())
        for name, both in turns.items():
            seconds[name].append(statistics.fmean(both))
        on_round(seconds)
        if time.perf_counter() - start >= budget or (done >= LEAST and enough(seconds)):
            break
    return seconds


def ratio(above: list[float], below: list[float], level: float = 0.95) -> Interval:
    """Estimate ``exp E log(above / below)`` over paired rounds, with its studentised bootstrap interval (estimator).

    >>> ratio([2.0, 2.0, 2.0], [1.0, 1.0, 1.0]).estimate
    2.0
    """
    logs = torch.tensor(above, dtype=torch.float64).log() - torch.tensor(below, dtype=torch.float64).log()
    interval = bootstrap_mean(logs, level)
    low, middle, high = (
        torch.tensor([interval.low, interval.estimate, interval.high], dtype=torch.float64).exp().tolist()
    )
    return Interval(middle, low, high, interval.n)


def bounded_ratio(above: list[float], below: list[float]) -> list[float | None]:
    """Return `ratio` and the ends of its interval; None for both ends where there are too few rounds to know them.

    >>> bounded_ratio([2.0], [1.0])
    [2.0, None, None]
    """
    interval = ratio(above, below)
    ends = (interval.low, interval.high) if math.isfinite(interval.high) and interval.low > 0 else (None, None)
    return [interval.estimate, *ends]


def spread(values: list[float]) -> list[float]:
    """Return the lower and the upper quartile; a single value is both."""
    if len(values) == 1:
        return values * 2
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return [low, high]
