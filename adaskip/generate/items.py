"""Check prompts as a user hands them over, item by item, move their padding to the left, and take batches apart."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from adaskip.batch import Batch
from adaskip.errors import ConfigError, DataError

TOKENS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
"""Inputs that have one value a token."""

_REMEDY = "write tokenizer(text, return_tensors='pt') for each item"


def read_items(prompts: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return all items, each with a mask and with its padding on the left, as generating needs it.

    Raises:
        DataError: what is no list of a model's inputs; names the item.
    """
    if isinstance(prompts, Mapping):
        raise DataError("generate_many: expected a list of items, got a single one; write generate_many([inputs])")
    if isinstance(prompts, str | Tensor) or not isinstance(prompts, Iterable):
        raise DataError(
            f"generate_many: expected a list of items, got a {type(prompts).__name__}; write generate_many([inputs]), "
            "where inputs is what the tokenizer or processor returned with return_tensors='pt'"
        )
    return [_align(number, item) for number, item in enumerate(prompts)]


def padding(inputs: Mapping[str, Any]) -> Tensor:
    """Return the number of leading positions that are padding, long (b)."""
    leading: Tensor = inputs["attention_mask"].long().argmax(1)
    return leading


def _align(number: int, item: Any) -> dict[str, Any]:
    """Return an item's inputs with each row's padding moved to the left.

    a b p p  ->  p p a b     a stable sort by the mask keeps the tokens in order
    a b c p      p a b c
    """
    inputs = _check(f"generate_many: item {number}", item)
    order = inputs["attention_mask"].long().argsort(dim=1, stable=True)

    def reorder(value: Tensor) -> Tensor:  # (... b t), or of one row for all
        shape = (*value.shape[:-2], *order.shape)
        return value.expand(shape).gather(-1, order.expand(shape))

    return {name: reorder(value) if name in (*TOKENS, "position_ids") else value for name, value in inputs.items()}


def _check(where: str, item: Any) -> dict[str, Any]:
    """Return the item with ids (b t) and a mask of that shape; a single prompt's ids may come without a row axis."""
    if not isinstance(item, Mapping):
        remedy = "pass its inputs, batch.inputs" if isinstance(item, Batch) else _REMEDY
        raise DataError(f"{where}: expected the model's inputs by name, got a {type(item).__name__}; {remedy}")
    ids = item.get("input_ids")
    if ids is None:
        raise DataError(f"{where}: expected input_ids in each item, got {', '.join(item) or 'nothing'}")
    if item.get("inputs_embeds") is not None:
        raise DataError(f"{where}: inputs_embeds do not go with many prompts; pass input_ids alone, or call generate")
    fields = {name: item[name] for name in (*TOKENS, "position_ids") if item.get(name) is not None}
    for name, value in fields.items():
        if not isinstance(value, Tensor):
            raise DataError(f"{where}: {name}: expected a tensor, got a {type(value).__name__}; {_REMEDY}")
    if ids.dim() == 1:
        fields = {name: value[None] if value.dim() == 1 else value for name, value in fields.items()}
        ids = fields["input_ids"]
    if ids.dim() != 2 or ids.is_floating_point() or not ids.numel():
        raise DataError(
            f"{where}: input_ids: expected whole numbers of shape (batch, tokens), got {ids.dtype} of shape "
            f"{tuple(ids.shape)}; {_REMEDY}"
        )
    for name, value in fields.items():
        if value.dim() < 2 or value.shape[-1] != ids.shape[1] or value.shape[-2] not in (1, len(ids)):
            raise DataError(f"{where}: {name}: expected shape {tuple(ids.shape)}, got {tuple(value.shape)}")
    rest = {name: value for name, value in item.items() if value is not None}
    inputs = {"attention_mask": torch.ones_like(ids), **rest, **fields}
    if not bool((inputs["attention_mask"] != 0).any(-1).all()):
        raise DataError(f"{where}: attention_mask: a row has no token; give every prompt at least one")
    return inputs


def split(items: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield one item a prompt, so that one can be prefilled anew without the others.

    Raises:
        ConfigError: an item of several prompts holds something that cannot be told apart.
    """
    for inputs in items:
        count = len(inputs["input_ids"])
        if count > 1 and (other := [name for name in inputs if name not in TOKENS]):
            raise ConfigError(
                "generate_many: paths: expected one prompt an item where there is more than tokens "
                f"({', '.join(other)}), got {count}"
            )
        if count == 1:
            yield inputs
            continue
        for i, begin in enumerate(padding(inputs).tolist()):
            yield {name: value[i : i + 1, begin:] for name, value in inputs.items()}
