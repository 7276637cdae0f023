"""Inputs that must be the same on every process, and fingerprints that tell which inputs are equal."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import lightning
import torch
from torch import Tensor

from adaskip.batch import IGNORED, Batch
from adaskip.errors import AdaSkipError

T = TypeVar("T")


def fingerprints(batches: Iterable[Batch]) -> list[str]:
    """Return one string an input, equal where tokens, labels and pictures are equal, whatever the padding.

    A value that a processor returns without an axis for rows (all patches of all pictures, say) can only be compared
    for the whole batch; one input in two such batches counts as two.
    """
    return [mark for batch in batches for mark in _rows(batch)]


def _rows(batch: Batch) -> Iterator[str]:
    shape = batch.labels.shape
    named = {name: x.cpu() for name, x in batch.inputs.items() if isinstance(x, Tensor)} | {
        "labels": batch.labels.cpu()
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
