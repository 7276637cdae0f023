"""Find the request of a layer that gradient checkpointing runs again.

The forward pass is over by then, another one may have begun, and for tensors on a GPU autograd computes in a thread of
its own, where no request is under way. The layer's arguments tell: beside its states it gets the very objects that it
got in the forward pass (masks, positions), because the checkpoint holds them.

What runs again depends on transformers. Before 5.23 its checkpoint holds the whole call of a layer, so that gates are
decided anew, by the same draws. Since then it holds the forward of the layer's class, inside the routed one, so that
only sublayers come back. A reentrant checkpoint runs what it holds without gradients the first time, so whether a pass
has any is asked as it begins.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from adaskip.errors import ConfigError
from adaskip.runtime.request import Request


class Reruns:
    """Remember requests whose gradients may still be to come, by the tensors that their layers were called with."""

    def __init__(self) -> None:
        self._by_tensor: dict[int, tuple[weakref.ref[Tensor], Request]] = {}
        self._pending: dict[int, weakref.ref[Request]] = {}

    def __reduce__(self) -> tuple[type[Reruns], tuple[Any, ...]]:
        """Copy and pickle no request."""
        return Reruns, ()

    def note(self, request: Request, named: dict[str, Any]) -> None:
        """Remember whose tensors these are, as long as they live, which is as long as a checkpoint needs them.

        Dense passes are remembered too, so that their tensors are not taken for another's. A pass with a cache is not:
        run again it would write the cache twice, so it is no training. Dynamo can trace no weak reference, and needs
        none: it recomputes its graphs by itself. What forgets a dead tensor is ``dict.pop`` itself, with the dead
        reference as its default: Ctrl-C that arrives while a callback of Python code runs would be swallowed there.
        """
        if request.cache is not None or not request.learns or torch.compiler.is_dynamo_compiling():
            return
        if request.rerun is None:
            # What this request holds must not hold the tensors, or they would never die: what was cut does. The
            # policy's notes stay: a choice that fell before an early layer is not made anew by a late one.
            options = replace(request.options, observer=None, replay=())
            request.rerun = again = replace(request, cut={}, options=options)
            number = id(again)
            self._pending[number] = weakref.ref(again, partial(self._pending.pop, number))
        own = (request.prompt, request.tokens.valid, request.tokens.vision, request.options.prompt_mask)
        for tensor in _tensors(named):
            key = id(tensor)
            entry = self._by_tensor.get(key)
            # the request's own masks live as long as it does, so they would never let go of it
            if any(tensor is other for other in own) or (entry is not None and entry[1] is request.rerun):
                continue
            self._by_tensor[key] = weakref.ref(tensor, partial(self._by_tensor.pop, key)), request.rerun

    def find(self, named: dict[str, Any], last: Request | None) -> Request | None:
        """Return the request that most of these tensors belong to; where none does, the only one there is.

        Args:
            named: arguments of a layer, or of a sublayer, which may get nothing beside its states.
            last: the calling thread's last soft request, if its gradients are still to come.

        Raises:
            ConfigError: any of several requests could be meant.
        """
        entries = [self._by_tensor.get(id(tensor)) for tensor in _tensors(named)]
        matches = [entry[1] for entry in entries if entry is not None]
        if matches:
            return max(matches, key=matches.count)
        pending = [request for reference in list(self._pending.values()) if (request := reference()) is not None]
        if len(pending) > 1:
            raise ConfigError(
                "gradient checkpointing: several training passes wait for their gradients, and a layer that runs again "
                "gets nothing that tells whose it is; run backward() after every forward pass, in one thread at a time"
            )
        return pending[0] if pending else last


def _tensors(named: dict[str, Any]) -> Iterator[Tensor]:
    """Yield the tensors among a layer's arguments, also in pairs such as a rotation's cosines and sines."""
    for value in named.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            if isinstance(part, Tensor):
                yield part
