"""Uniform draws for the rows of a batch; where it is part of a larger one, those that the larger one would draw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Place:
    """Say where the rows and tokens of a batch lie in a larger one.

    larger batch     own rows 0 and 2, own tokens from column 1 on
    . . . .
    . a b c          rows (1, 3) of 4, columns 4, first 1
    . . . .
    . d e f
    """

    rows: tuple[int, ...]  # for each own row its number there
    of: int  # rows there
    columns: int  # tokens there
    first: int  # the column of the first own token


@dataclass(frozen=True, eq=False)
class Noise:
    """Draw from a source; with a place, what stands there in the draw of the larger batch."""

    source: torch.Generator
    place: Place | None = None

    @classmethod
    def of(cls, noise: torch.Generator | Noise) -> Noise:
        """Take a generator for one whose batch is whole."""
        return noise if isinstance(noise, Noise) else cls(noise)

    def uniform(self, shape: Sequence[int]) -> Tensor:
        """Return float32 of [0, 1), (b) or (b t), on the source's device: the same wherever the model lives."""
        place, whole = self.place, tuple(shape)
        if place is not None:
            whole = (place.of, *(place.columns for _ in whole[1:]))
        drawn = torch.rand(whole, generator=self.source, device=self.source.device, dtype=torch.float32)
        if place is None:
            return drawn
        own = drawn[list(place.rows)]
        return own if len(whole) == 1 else own[:, place.first : place.first + shape[1]]

    def get_state(self) -> Tensor:
        """Return where the source stands."""
        return self.source.get_state()

    def at(self, state: Tensor) -> Noise:
        """Return noise of its own that goes on from this state of the source."""
        source = torch.Generator(self.source.device)
        source.set_state(state)
        return replace(self, source=source)
