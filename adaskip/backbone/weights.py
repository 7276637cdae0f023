"""A model's weights as its forward pass uses them: brought back from offloading, with adapters merged.

Nothing of the model is changed, and only one layer's weights are copied at a time.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Precisions in which a weight is a number; any other is a code that only its quantiser can read."""

HEALING = "healing"
"""peft's name of adapters that are the policy's and no part of the model."""

_COMPILED = "_orig_mod"


def effective_weights(model: nn.Module) -> Iterator[tuple[str, Tensor | None]]:
    """Yield every weight by the name that it has without adapters and compilers; None: it cannot be read as numbers.

    Tied weights come once for each of their names: whether they are tied depends on how a model is loaded.
    """
    yield from _walk("", model, [])


def _walk(name: str, module: nn.Module, stores: list[tuple[str, Any]]) -> Iterator[tuple[str, Tensor | None]]:
    module = _without_adapters(module)
    hook = module.__dict__.get("_hf_hook")  # accelerate keeps offloaded weights in a map, by their names from here on
    maps = (getattr(part, "weights_map", None) for part in getattr(hook, "hooks", (hook,)))
    stores = stores + [("", weights_map) for weights_map in maps if weights_map]
    for key, weight in module._parameters.items():
        if weight is not None:
            yield name + key, _read(weight, [(prefix + key, store) for prefix, store in stores])
    if _is_packed(module):
        yield f"{name}weight", None
    for key, child in module._modules.items():
        if child is not None:
            inside = name if key == _COMPILED else f"{name}{key}."
            yield from _walk(inside, child, [(f"{prefix}{key}.", store) for prefix, store in stores])


def _read(weight: Tensor, stored: list[tuple[str, Any]]) -> Tensor | None:
    if weight.is_meta:
        # the innermost map comes last and is asked first
        values = (_lookup(store, key) for key, store in reversed(stored))
        weight = next((value for value in values if value is not None), weight)
    return None if weight.is_meta or not _is_plain(weight) else weight.detach()


def _is_plain(weight: Tensor) -> bool:
    """Return whether a weight is numbers; quantisers and sharders have classes, precisions or sizes of their own."""
    return type(weight) in (Tensor, nn.Parameter) and weight.dtype in PLAIN and bool(weight.numel())


def count_unreadable(model: nn.Module) -> tuple[int, int]:
    """Count the weights that are no numbers, and all there are; nothing is merged, moved or read from disk for it."""
    plain = [
        _is_plain(weight) for part in model.modules() for weight in part._parameters.values() if weight is not None
    ]
    return plain.count(False), len(plain)


def _lookup(store: Any, key: str) -> Tensor | None:
    try:
        weight: Tensor = store[key]
    except KeyError:
        return None
    return weight


def _without_adapters(module: nn.Module) -> nn.Module:
    """Return what PEFT's ``merge_and_unload`` would put in this module's place; if it is no adapter, the module itself.

    If the weight under an adapter is no number, the base module is returned without the adapter: nothing can be added
    to such a weight.
    """
    if "peft" not in sys.modules:
        return module
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    if isinstance(module, AuxiliaryTrainingWrapper):
        if module.disable_adapters:
            original: nn.Module = module.original_module
            return original
        whole: nn.Module = _copied(module).unload_and_optionally_merge_module(
            merge=True, safe_merge=False, adapter_names=None
        )
        return whole
    if not isinstance(module, BaseTunerLayer):
        return module
    base: nn.Module = module.get_base_layer()
    read = all(_read(weight, []) is not None for weight in base.parameters())
    if module.disable_adapters or not read or HEALING in module.active_adapters:
        return base
    merged: nn.Module = _copied(module)
    while isinstance(merged, BaseTunerLayer):  # adapters of several parameters of one module stand inside one another
        merged.merge()  # does nothing if it is merged already
        inner: Any = merged.base_layer
        merged = inner
    return merged


def _copied(module: Any) -> Any:
    """Copy one layer, but share whatever its forward was replaced with: that may hold the whole model."""
    shared = {id(f): f for part in module.modules() if (f := part.__dict__.get("forward")) is not None}
    return copy.deepcopy(module, shared)


def find_packed(model: nn.Module) -> nn.Module | None:
    """Find a module whose weight is no parameter, as dynamic quantisation leaves it; None if there is none."""
    return next((part for part in model.modules() if _is_packed(part)), None)


def _is_packed(module: nn.Module) -> bool:
    return callable(getattr(type(module), "weight", None))
