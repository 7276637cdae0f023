"""What a decoder layer is made of: its attention and its MLP.

No module is recognised by its name. A few plain tokens go through the untouched model while every module inside its
layers is watched: the attention is the module that hands keys and values to the cache; the MLP is whatever else, with
weights of its own, turns states into states. A sublayer that is left out adds nothing, so with both left out a layer
must be the identity; where it is not, the unit is refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from adaskip.backbone.probe import ROWS, TOKENS, ToldCache, dense_pass
from adaskip.errors import BackboneError
from adaskip.sites import PARTS, Part, Unit


@dataclass(frozen=True)
class Sublayers:
    """Name the parts of one decoder layer.

    Attributes:
        attention: the module that hands keys and values to the cache.
        mlp: the other modules that turn states into states: one, or an MLP and the experts beside it.
        outputs: what each of them returns: a tensor (0), or a tuple of this many.
        cache_names: the argument by which the layer and its attention receive the cache.
    """

    attention: nn.Module = field(repr=False)
    mlp: tuple[nn.Module, ...] = field(repr=False)
    outputs: dict[nn.Module, int] = field(repr=False)
    cache_names: tuple[str, str] = ("past_key_values", "past_key_values")

    def modules(self, part: Part) -> tuple[nn.Module, ...]:
        """Return the modules that leave with a part of the layer; none for the whole of it."""
        return {"block": (), "attention": (self.attention,), "mlp": self.mlp}[part]


def find_sublayers(
    model: PreTrainedModel, layers: tuple[nn.Module, ...], width: int, unit: Unit
) -> tuple[Sublayers, ...]:
    """Find the parts of every layer, for a unit that is about to be routed.

    Raises:
        BackboneError: the parts cannot be told apart, or leaving the unit out would be unsound; says why.
    """
    name = type(model).__name__
    if any(weight.is_meta for weight in model.parameters()):
        raise BackboneError(f"{name}: its weights are on device 'meta', so its layers cannot be watched; load them")
    if "past_key_values" not in inspect.signature(type(model).forward).parameters:
        raise BackboneError(
            f"{name}: it keeps no KV cache, so its attention cannot be told from the rest of a layer; "
            "use RouterConfig(unit='block', kv='absent', scope='prompt')"
        )
    watch = _Watch(layers, torch.Size([ROWS, TOKENS, width]))
    with watch:
        dense_pass(model, past_key_values=ToldCache(watch.store), use_cache=True)
    sublayers = tuple(watch.parts(index) for index in range(len(layers)))
    if unit != "block":
        closing = [watch.closing[i] | {parts.attention} for i, parts in enumerate(sublayers)]
        _check_identity(model, layers, closing, unit)
    if "mlp" in PARTS[unit] and any(not parts.mlp for parts in sublayers):
        index = next(i for i, parts in enumerate(sublayers) if not parts.mlp)
        raise BackboneError(
            f"{name}: unit {unit!r}: decoder layer {index} has no MLP module of its own that turns states into states; "
            "use unit='attention' or unit='block'"
        )
    return sublayers


def _check_identity(
    model: PreTrainedModel, layers: tuple[nn.Module, ...], sublayers: list[set[nn.Module]], unit: Unit
) -> None:
    """Refuse layers that are not the identity once none of their sublayers adds anything."""
    gaps: dict[int, float] = {}

    def silence(module: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
        return (torch.zeros_like(out[0]), *out[1:]) if isinstance(out, tuple) else torch.zeros_like(out)

    def compare(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            after = out[0] if isinstance(out, tuple) else out
            gaps[index] = float((after - before).float().norm() / before.float().norm().clamp(min=1e-12))

        return hook

    handles = [module.register_forward_hook(silence) for parts in sublayers for module in parts]
    handles += [layer.register_forward_hook(compare(i), with_kwargs=True) for i, layer in enumerate(layers)]
    try:
        dense_pass(model, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    moved = [index for index, gap in gaps.items() if not gap <= 1e-3]
    if moved:
        raise BackboneError(
            f"{type(model).__name__}: unit {unit!r}: decoder layer {moved[0]} is not the identity when its attention "
            "and MLP add nothing (the residual is added inside, or normed or scaled after them), so neither can be "
            "left out alone; use unit='block'"
        )


class _Watch:
    """Record what is called inside each layer, and where it hands its keys and values over."""

    def __init__(self, layers: tuple[nn.Module, ...], states: torch.Size) -> None:
        self.layers, self.states = layers, states
        self.stack: list[nn.Module] = []
        self.layer = 0
        self.attention: dict[int, nn.Module] = {}
        self.closing: list[set[nn.Module]] = [set() for _ in layers]
        self.through: list[list[nn.Module]] = [[] for _ in layers]
        self.outputs: dict[nn.Module, int] = {}
        self.cache_names: dict[nn.Module, str] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> None:
        for index, layer in enumerate(self.layers):
            for module in layer.modules():
                self._handles.append(module.register_forward_pre_hook(self._before(index), with_kwargs=True))
                self._handles.append(module.register_forward_hook(self._after, with_kwargs=True))

    def __exit__(self, *raised: Any) -> None:
        for handle in self._handles:
            handle.remove()

    def _before(self, index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not self.stack:
                self.layer = index
            self.stack.append(module)
            names = list(inspect.signature(type(module).forward).parameters)[1:]
            for name, value in {**dict(zip(names, args, strict=False)), **kwargs}.items():
                if isinstance(value, ToldCache):
                    self.cache_names[module] = name

        return hook

    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        self.stack.pop()
        # only what the layer calls itself is a sublayer: the stack then holds the layer alone
        if len(self.stack) != 1 or not any(weight.dim() >= 2 for weight in module.parameters()):
            return
        before = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
        after = out[0] if isinstance(out, tuple) else out
        if not isinstance(after, Tensor) or after.shape[-1] != self.states[-1] or after.numel() != self.states.numel():
            return
        self.closing[self.layer].add(module)  # it may have flattened rows and tokens
        shapes = [after.shape, *([] if before is None else [before.shape])]
        if shapes == [self.states] * 2 and module not in self.through[self.layer]:
            self.through[self.layer].append(module)
            self.outputs[module] = len(out) if isinstance(out, tuple) else 0

    def store(self, slot: int) -> None:
        """Note the module that has just handed over keys and values; called by the cache."""
        if len(self.stack) > 1 and self.layer not in self.attention:
            self.attention[self.layer] = self.stack[1]

    def parts(self, index: int) -> Sublayers:
        """Return the parts of one layer, as the pass showed them."""
        attention = self.attention.get(index)
        if attention is None or attention not in self.through[index]:
            raise BackboneError(
                f"decoder layer {index}: no module of its own turns states into states through the KV cache, so its "
                "attention cannot be left out or asked for keys and values alone; use unit='block', kv='absent'"
            )
        mlp = tuple(module for module in self.through[index] if module is not attention)
        names = (self.cache_names[self.layers[index]], self.cache_names[attention])
        return Sublayers(attention, mlp, {part: self.outputs[part] for part in self.through[index]}, names)
