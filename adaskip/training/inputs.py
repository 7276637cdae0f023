"""Batches that are read again and again: told apart, the same on every process."""

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
    """One string an input, equal where tokens, labels and pictures are equal, whatever the padding.

    Of what a processor returns without an axis for rows (all patches of all pictures, say) only the whole batch can be
    compared; one input in two such batches passes for two.
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
