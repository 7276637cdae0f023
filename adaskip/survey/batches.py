"""Batches of prompts with answers, as `Collator` makes them: checked, taken from a loader, counted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from adaskip.errors import DataError

Batch = dict[str, Any]
NEEDED = ("inputs", "labels", "prompt_mask")


def check_batch(batch: Any, where: str, needed: tuple[str, ...] = NEEDED) -> None:
    """Refuse what is no batch of prompts with answers.

    Raises:
        DataError: says what the batch lacks.
    """
    found = list(batch) if isinstance(batch, dict) else type(batch).__name__
    if not isinstance(batch, dict) or any(name not in batch for name in needed):
        raise DataError(
            f"{where}: expected batches with {', '.join(needed)}, as adaskip.Collator(processor) makes them, got "
            f"{found}; pass collate_fn=adaskip.Collator(processor) to the loader"
        )


def take(batches: Iterable[Batch], limit: int | None, where: str) -> list[Batch]:
    """The first batches that hold ``limit`` inputs together, or all of them.

    Raises:
        DataError: an item is no batch.
    """
    if not isinstance(batches, Iterable) or isinstance(batches, Mapping | str | Tensor):
        hint = "; put it into a list" if isinstance(batches, Mapping) else ""
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
    return sum(len(batch["labels"]) for batch in batches)
