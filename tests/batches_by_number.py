"""Prompts with answers on a toy model, in batches of inputs given by number, as surveys of paths ask for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from adaskip.batch import Batch
from tests import toys


def two_kinds(toy: toys.Toy) -> Callable[[Sequence[int]], list[Batch]]:
    """Prompts of one token repeated, and of random ones, with two tokens to answer; batches of them by number."""
    inputs = toy.batch([6 + i % 5 for i in range(24)])
    ids = inputs["input_ids"]
    inputs["input_ids"] = torch.where((torch.arange(24) % 2 == 0)[:, None] & (ids != 0), 7, ids)
    labels = torch.where(inputs["attention_mask"].bool(), inputs["input_ids"], -100)
    labels[:, :-2] = -100
    prompt = inputs["attention_mask"].bool() & (labels == -100)

    def batches(rows: Sequence[int]) -> list[Batch]:
        chosen = list(rows)
        return [Batch({n: v[chosen] for n, v in inputs.items()}, labels[chosen], prompt[chosen])]

    return batches
