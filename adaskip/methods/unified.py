"""Unified Layer Skipping: layers at even distances by a published formula, which looks at nothing but the budget."""

from __future__ import annotations

from collections.abc import Iterator

from adaskip.errors import ConfigError
from adaskip.methods.budget import first_that_holds
from adaskip.methods.evidence import Evidence
from adaskip.methods.method import Method
from adaskip.methods.uniform import spread, without
from adaskip.survey.greedy import Path


def kept_layers(layers: int, kept: int) -> list[int]:
    """Return the layers that stay: the first, every ``int(layers / (kept - 1))``-th while there is room, the last.

    Args:
        layers: how many there are.
        kept: how many stay, ``int(layers / speedup)`` in the paper.

    Raises:
        ConfigError: fewer than two are to stay, where the formula divides by zero; or so many that it keeps a
            contiguous block.

    >>> kept_layers(30, 6), kept_layers(30, 3)
    ([0, 6, 12, 18, 24, 29], [0, 15, 29])
    """
    if not 2 <= kept <= layers:
        raise ConfigError(f"unified: expected 2 to {layers} layers to stay, the first and the last, got {kept}")
    distance = int(layers / (kept - 1))
    if distance < 2:
        raise ConfigError(f"unified: the formula keeps the first {kept - 1} of {layers} layers and the last, no gaps")
    between = [layer for layer in range(1, layers - 1) if layer % distance == 0]
    return [0, *between[: kept - 2], layers - 1]


def paths(layers: int) -> Iterator[Path]:
    """Yield what goes, from nothing to all but two layers: by the formula as soon as it leaves gaps, before evenly."""
    for kept in range(layers, 1, -1):
        gaps = int(layers / (kept - 1)) >= 2
        yield without(layers, kept_layers(layers, kept) if gaps else spread(layers, kept))


def choose(evidence: Evidence, keep: float, seed: int) -> Path:
    """Return the fewest layers that hold the budget."""
    return first_that_holds(evidence, paths(evidence.layers), keep)


METHOD = Method(
    "unified",
    "Unified Layer Skipping",
    "arXiv 2404.06954",
    choose,
    groups=("all",),
    ours="above a half, where its formula leaves no gaps, layers are spaced evenly; published for generated tokens "
    "alone (`router.phase=decode`) with a backbone that is fine-tuned at that depth (`adaskip heal`), here by default "
    "the prompt skips too, and the backbone is frozen",
)
