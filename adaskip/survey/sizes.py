"""Check that batches fit the model and the machine, before anything is measured on them."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from adaskip.backbone.inspect import count_positions
from adaskip.batch import Batch
from adaskip.errors import DataError
from adaskip.runtime.attach import RoutedModel

_COPIES = 6
"""Float64 tables of all scored tokens' logits that a comparison holds at once, about."""


def check_sizes(model: RoutedModel, batches: Sequence[Batch]) -> None:
    """Refuse rows longer than the backbone's positions, and batches that surely exceed the memory.

    Raises:
        DataError: says how long the rows are, or how much memory there is, and what to do.
    """
    _check_positions(model, batches)
    for batch in batches:
        _check_memory(model, batch)


def _check_positions(model: RoutedModel, batches: Sequence[Batch]) -> None:
    positions = count_positions(model.backbone.config)
    if positions is None:
        return
    lengths = [int(n) for batch in batches for n in model.read_tokens(batch.inputs).valid.sum(1)]
    if long := [length for length in lengths if length > positions]:
        raise DataError(
            f"profile: {len(long)} of {len(lengths)} rows, prompt and answer, are longer than the backbone's "
            f"{positions} positions, the longest has {max(long)} tokens; shorten them or leave them out"
        )


def _check_memory(model: RoutedModel, batch: Batch) -> None:
    """Compare what a batch needs at least, states and logits, with all the memory of the device."""
    total = memory(model.spec.device)
    if total is None:
        return
    rows, width = batch.labels.shape
    size = next(model.backbone.parameters()).element_size()
    # of every layer the state after it, and how far its skip moves that
    states = 2 * len(model.spec.layers) * rows * width * model.spec.width * size
    scored = int(batch.supervised.sum())
    logits = _COPIES * 8 * scored * model.spec.config.vocab_size
    if (needed := states + logits) > total:
        fitting = rows * total // needed
        cure = f"expected --batch-size of at most {fitting}" if fitting else "shorten the rows"
        raise DataError(
            f"profile: a batch of {rows} rows of {width} tokens, {scored} of them scored, needs at least "
            f"{needed / 1e9:.1f} GB for states and logits, and {model.spec.device} has {total / 1e9:.1f} GB; {cure}"
        )


def memory(device: torch.device) -> int | None:
    """Return all the bytes of a device's memory; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "cpu" and hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None
