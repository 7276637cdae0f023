"""Inputs that must be the same on every process."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import lightning

from adaskip.errors import AdaSkipError

T = TypeVar("T")


def from_rank_zero(trainer: lightning.Trainer, call: Callable[[], T]) -> T:
    """Call on rank 0 and return the result on every rank; an error that the call raises is raised on every rank.

    If one rank alone raised, the others would wait for it for ever.
    """
    if trainer.world_size == 1:
        return call()
    outcome: tuple[T | None, AdaSkipError | None] = None, None
    if trainer.is_global_zero:
        try:
            outcome = call(), None
        except AdaSkipError as error:
            outcome = None, error
    value, failure = trainer.strategy.broadcast(outcome)
    if failure is not None:
        raise failure
    return value  # type: ignore[return-value]
