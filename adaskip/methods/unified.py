"""Unified Layer Skipping: evenly spaced layers by one number, the speed-up asked for."""

from __future__ import annotations

from typing import Literal

from adaskip.errors import ConfigError
from adaskip.methods.method import Method
from adaskip.methods.uniform import choose, spread

Mode = Literal["paper", "linspace"]


def kept_layers(layers: int, speedup: float, mode: Mode = "paper") -> list[int]:
    """Return the layers that run for a speed-up: ``n = int(layers / speedup)`` of them.

    Args:
        layers: how many there are.
        speedup: asked for, above 1.
        mode: ``paper``: the first and the last, and between them every ``int(layers / (n - 1))``-th while there are
            fewer than n. ``linspace``, ours: n as evenly spaced as whole numbers allow, for every n of at least 2.

    Raises:
        ConfigError: n is below 2, where the paper's formula divides by zero; or the paper's formula would keep a
            contiguous block, which it does below a speed-up of 2.

    >>> kept_layers(30, 5)
    [0, 6, 12, 18, 24, 29]
    >>> kept_layers(30, 10)
    [0, 15, 29]
    """
    count = int(layers / speedup) if speedup > 0 else 0
    if not 2 <= count <= layers:
        raise ConfigError(
            f"unified: expected a speed-up of 1 to {layers / 2:g} of {layers} layers, which keeps 2 or more, got "
            f"{speedup:g}"
        )
    if mode == "linspace":
        return spread(layers, count)
    interval = int(layers / (count - 1))
    if interval < 2:
        raise ConfigError(
            f"unified: speed-up {speedup:g} of {layers} layers: the paper's formula keeps the first {count - 1} and "
            'the last below a speed-up of 2; use mode="linspace"'
        )
    between = [layer for layer in range(1, layers - 1) if layer % interval == 0]
    return [0, *between[: count - 2], layers - 1]


METHOD = Method(
    "unified",
    "Unified Layer Skipping",
    "arXiv 2404.06954",
    choose,
    groups=("all",),
    ours="layers are spaced evenly at every budget, as its formula keeps a contiguous block above a half; published "
    "for generated tokens alone, with a backbone that is fine-tuned at that depth; here the prompt skips too, and the "
    "backbone is frozen",
)
