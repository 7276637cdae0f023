"""Find the request of a layer that gradient checkpointing runs again.

The forward pass is over by then, another one may have begun, and for tensors on a GPU autograd computes in a thread of
its own, where no request is under way. What the layer is called with tells: beside its states it gets the very objects
that it got in the forward pass (masks, positions), because the checkpoint holds them.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor

from adaskip.runtime.request import Request


class Reruns:
    """Soft requests whose gradients are still to come, by the tensors that their layers were called with."""

    def __init__(self) -> None:
        self._by_tensor: dict[int, tuple[weakref.ref[Tensor], Request]] = {}
        self._pending: dict[int, weakref.ref[Request]] = {}

    def __reduce__(self) -> tuple[type[Reruns], tuple[Any, ...]]:
        """Copy and pickle no request."""
        return Reruns, ()

    def note(self, request: Request, named: dict[str, Any]) -> None:
        """Remember whose tensors these are, as long as they live, which is as long as a checkpoint needs them."""
        if request.rerun is None:
            # What this request holds must not hold the tensors, or they would never die: its memo does.
            options = replace(request.options, observer=None, replay=())
            request.rerun = again = replace(request, memo={}, decision=None, options=options)
            number = id(again)
            self._pending[number] = weakref.ref(again, lambda _: self._pending.pop(number, None))
        own = (request.prompt, request.tokens.valid, request.tokens.vision, request.options.prompt_mask)
        for tensor in _tensors(named):
            key = id(tensor)
            known = self._by_tensor.get(key)
            if any(tensor is other for other in own) or (known is not None and known[1] is request.rerun):
                continue
            dead = weakref.ref(tensor, lambda _, key=key: self._by_tensor.pop(key, None))  # type: ignore[misc]
            self._by_tensor[key] = dead, request.rerun

    def find(self, named: dict[str, Any]) -> Request | None:
        """Return the request that most of these tensors belong to; where none does, the only one there is."""
        entries = [self._by_tensor.get(id(tensor)) for tensor in _tensors(named)]
        matches = [entry[1] for entry in entries if entry is not None]
        if matches:
            return max(matches, key=matches.count)
        pending = [request for reference in list(self._pending.values()) if (request := reference()) is not None]
        return pending[0] if len(pending) == 1 else None


def _tensors(named: dict[str, Any]) -> Iterator[Tensor]:
    """Tensors among a layer's arguments, also in pairs such as a rotation's cosines and sines."""
    for value in named.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            if isinstance(part, Tensor):
                yield part
