"""Leave out layers at even distances, and look at nothing; the first and the last stay."""

from __future__ import annotations

from collections.abc import Iterator

from adaskip.errors import ConfigError
from adaskip.methods.budget import first_that_holds
from adaskip.methods.evidence import Evidence
from adaskip.methods.method import Method
from adaskip.survey.greedy import Path


def spread(layers: int, kept: int) -> list[int]:
    """Return the layers that stay, as evenly spaced as whole numbers allow, the first and the last among them.

    Raises:
        ConfigError: fewer than two are to stay, or more than there are.

    >>> spread(30, 4)
    [0, 10, 19, 29]
    """
    if not 2 <= kept <= layers:
        raise ConfigError(f"uniform: expected 2 to {layers} layers to stay, the first and the last, got {kept}")
    return [round(place * (layers - 1) / (kept - 1)) for place in range(kept)]


def without(layers: int, kept: list[int]) -> Path:
    """Return the layers that go where these stay."""
    return tuple(sorted({*range(layers)} - {*kept}))


def paths(layers: int) -> Iterator[Path]:
    """Yield what goes, from nothing to all but two layers."""
    for kept in range(layers, 1, -1):
        yield without(layers, spread(layers, kept))


def choose(evidence: Evidence, keep: float, seed: int) -> Path:
    """Return the fewest evenly spaced layers that hold the budget."""
    return first_that_holds(evidence, paths(evidence.layers), keep)


METHOD = Method("uniform", "evenly spaced layers", "a control", choose)
