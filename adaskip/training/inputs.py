"""Batches that are read again and again: taken from a loader, told apart, moved, the same on every process."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import lightning
import torch
from torch import Tensor

from adaskip.errors import AdaSkipError, DataError
from adaskip.theory.profile import IGNORED
from adaskip.training.data import Batch

T = TypeVar("T")
NEEDED = ("inputs", "labels", "prompt_mask")


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The same batch with every tensor on a device."""
    moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    return moved | {"inputs": {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch["inputs"].items()}}


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
    if not isinstance(batches, Iterable) or isinstance(batches, dict):
        raise DataError(f"{where}: expected a loader or a list of batches, got {type(batches).__name__}")
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


def fingerprints(batches: Iterable[Batch]) -> list[str]:
    """One string an input, equal where tokens, labels and pictures are equal, whatever the padding.

    Of what a processor returns without an axis for rows (all patches of all pictures, say) only the whole batch can be
    compared; one input in two such batches passes for two.
    """
    return [mark for batch in batches for mark in _rows(batch)]


def _rows(batch: Batch) -> Iterator[str]:
    shape = batch["labels"].shape
    named = {name: x.cpu() for name, x in batch["inputs"].items() if isinstance(x, Tensor)} | {
        "labels": batch["labels"].cpu()
    }
    real = named.get("attention_mask", named["labels"] != IGNORED).bool()
    real = real if real.shape == shape else torch.ones(shape, dtype=torch.bool)
    for row in range(shape[0]):
        mark = hashlib.sha256()
        for name, value in sorted(named.items()):
            part = value[row] if value.dim() and len(value) == shape[0] else value
            part = part[real[row]] if value.shape == shape else part
            mark.update(f"{name} {tuple(part.shape)} ".encode())
            mark.update(part.contiguous().view(torch.uint8).numpy().tobytes() if part.dim() else str(part).encode())
        yield mark.hexdigest()[:24]


def from_rank_zero(trainer: lightning.Trainer, call: Callable[[], T]) -> T:
    """What the call returns on rank 0, on every rank; an error that it raises there is raised on every rank.

    A rank that raised alone would leave the others waiting.
    """
    if trainer.world_size == 1:
        return call()
    done: tuple[T | None, AdaSkipError | None] = None, None
    if trainer.is_global_zero:
        try:
            done = call(), None
        except AdaSkipError as error:
            done = None, error
    value, failure = trainer.strategy.broadcast(done)
    if failure is not None:
        raise failure
    return value  # type: ignore[return-value]
