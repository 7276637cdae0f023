"""Let gradient checkpointing, if it is on, work in a training pass of a backbone that stays in ``eval()``.

transformers heeds ``gradient_checkpointing_enable()`` in layers in training mode alone. A frozen backbone has none: its
dropout would disturb the dense model that routers are compared with. So a layer is put into training mode until it has
decided to be run again, and no longer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

_ON, _RUN = "gradient_checkpointing", "_gradient_checkpointing_func"


@contextmanager
def recomputing(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Run these layers again in the backward pass, where ``gradient_checkpointing_enable()`` asked for it."""
    asleep = [layer for layer in layers if getattr(layer, _ON, False) and not layer.training]
    for layer in asleep:
        if not isinstance(inner := getattr(layer, _RUN), _Calm):  # another thread may have been here
            setattr(layer, _RUN, _Calm(layer, inner))
        layer.training = True
    try:
        yield
    finally:
        for layer in asleep:
            layer.training = False
            if isinstance(outer := getattr(layer, _RUN), _Calm):
                setattr(layer, _RUN, outer.inner)


class _Calm:
    """Checkpoint a layer that is in ``eval()`` while it runs; what it holds, such as dropout, runs again as it ran."""

    def __init__(self, layer: nn.Module, inner: Callable[..., Any]) -> None:
        self.layer, self.inner = layer, inner

    def __call__(self, call: Callable[..., Any], *args: Any) -> Any:
        self.layer.training = False
        modes = {module: module.training for module in self.layer.modules()}

        def run(*given: Any) -> Any:
            before = {module: module.training for module in modes}
            _set(modes)
            try:
                return call(*given)
            finally:
                _set(before)

        return self.inner(run, *args)


def _set(modes: dict[nn.Module, bool]) -> None:
    for module, mode in modes.items():
        module.training = mode
