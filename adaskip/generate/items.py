"""Prompts as a user hands them over, item by item: checked, with padding on the left, or taken apart."""

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
    """All items, each with padding on the left, where generating is defined, and with a mask.

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
    return [_aligned(number, item) for number, item in enumerate(prompts)]


def padding(inputs: Mapping[str, Any]) -> Tensor:
    """long (b): leading positions that are padding."""
    leading: Tensor = inputs["attention_mask"].long().argmax(1)
    return leading


def _aligned(number: int, item: Any) -> dict[str, Any]:
    inputs = _checked(f"generate_many: item {number}", item)
    order = inputs["attention_mask"].long().argsort(dim=1, stable=True)

    def turned(value: Tensor) -> Tensor:  # (... b t), or of one row for all
        whole = (*value.shape[:-2], *order.shape)
        return value.expand(whole).gather(-1, order.expand(whole))

    return {name: turned(value) if name in (*TOKENS, "position_ids") else value for name, value in inputs.items()}


def _checked(where: str, item: Any) -> dict[str, Any]:
    """The item with its ids (b t) and a mask of the same shape; ids of a single prompt may come without a row axis."""
    if not isinstance(item, Mapping):
        remedy = "pass its inputs, batch.inputs" if isinstance(item, Batch) else _REMEDY
        raise DataError(f"{where}: expected the model's inputs by name, got a {type(item).__name__}; {remedy}")
    ids = item.get("input_ids")
    if ids is None:
        raise DataError(f"{where}: expected input_ids in each item, got {', '.join(item) or 'nothing'}")
    if item.get("inputs_embeds") is not None:
        raise DataError(f"{where}: inputs_embeds do not go with many prompts; pass input_ids alone, or call generate")
    given = {name: item[name] for name in (*TOKENS, "position_ids") if item.get(name) is not None}
    for name, value in given.items():
        if not isinstance(value, Tensor):
            raise DataError(f"{where}: {name}: expected a tensor, got a {type(value).__name__}; {_REMEDY}")
    if ids.dim() == 1:
        given = {name: value[None] if value.dim() == 1 else value for name, value in given.items()}
        ids = given["input_ids"]
    if ids.dim() != 2 or ids.is_floating_point() or not ids.numel():
        raise DataError(
            f"{where}: input_ids: expected whole numbers of shape (batch, tokens), got {ids.dtype} of shape "
            f"{tuple(ids.shape)}; {_REMEDY}"
        )
    for name, value in given.items():
        if value.dim() < 2 or value.shape[-1] != ids.shape[1] or value.shape[-2] not in (1, len(ids)):
            raise DataError(f"{where}: {name}: expected shape {tuple(ids.shape)}, got {tuple(value.shape)}")
    rest = {name: value for name, value in item.items() if value is not None}
    inputs = {"attention_mask": torch.ones_like(ids), **rest, **given}
    if not bool((inputs["attention_mask"] != 0).any(-1).all()):
        raise DataError(f"{where}: attention_mask: a row has no token; give every prompt at least one")
    return inputs


def split(items: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """One item a prompt, so that one can be prefilled anew without the others.

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
