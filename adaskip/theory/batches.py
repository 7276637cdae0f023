"""Batches of prompts with answers, as `Collator` makes them: checked, taken from a loader, counted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from adaskip.batch import IGNORED, Batch
from adaskip.errors import DataError


def check_batch(batch: Any, where: str, answers: bool = True) -> None:
    """Refuse what is no batch, or one of bare prompts where answers are needed.

    Raises:
        DataError: says what arrived, and what a collator has to return.
    """
    if not isinstance(batch, Batch):
        found = type(batch).__name__
        if isinstance(batch, Mapping):
            found += f" of {', '.join(map(str, batch)) or 'nothing'}"
        raise DataError(
            f"{where}: expected batches as adaskip.Collator(processor) makes them, got a {found}; pass "
            "collate_fn=adaskip.Collator(processor) to the loader, or let your own collator return "
            "adaskip.Batch(inputs, labels, prompt_mask)"
        )
    if answers and not batch.supervised.any():
        raise DataError(
            f"{where}: expected prompts with answers, got bare prompts: all labels are {IGNORED}; pass "
            "collate_fn=adaskip.Collator(processor), which puts the answers behind them"
        )


def take(batches: Iterable[Batch], limit: int | None, where: str) -> list[Batch]:
    """The first batches that hold ``limit`` inputs together, or all of them.

    Raises:
        DataError: an item is no batch.
    """
    if not isinstance(batches, Iterable) or isinstance(batches, Mapping | str | Tensor):
        hint = "; put it into a list" if isinstance(batches, Mapping | Batch) else ""
        raise DataError(f"{where}: expected a loader or a list of batches, got a {type(batches).__name__}{hint}")
    found: list[Batch] = []
    for batch in batches:
        check_batch(batch, where)
        found.append(batch)
        if limit is not None and count(found) >= limit:
            break
    return found


def count(batches: Iterable[Batch]) -> int:
    """How many inputs the batches hold."""
    return sum(map(len, batches))
