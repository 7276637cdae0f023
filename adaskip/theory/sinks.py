"""Sinks: tokens whose states are many times as long as the others', so that a norm or mean over tokens sees them alone.

In many language models the first token becomes one some layers in, and stays one to the end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

SINK = 10.0
"""A token is a sink where its state is so many times as long as the median token's."""
_OFTEN = 0.1
"""Share of the inputs in which a position must be a sink to be named."""


def norm_ratios(states: Tensor, mask: Tensor) -> Tensor:
    """Return the norm of each masked token's state over the median of the row's masked tokens; 0 outside the mask.

    (b t d), bool (b t) -> float64 (b t), always finite for finite states. Descriptive.

    >>> norm_ratios(torch.tensor([[[30.0], [1.0], [2.0], [9.0]]]), torch.tensor([[True, True, True, False]])).tolist()
    [[15.0, 0.5, 1.0, 0.0]]
    """
    norms = states.float().norm(dim=-1).double()
    median = norms.masked_fill(~mask, torch.nan).nanmedian(1, keepdim=True).values
    ratios: Tensor = norms / median.clamp_min(1e-12)
    return ratios.masked_fill(~mask, 0.0)


class Sinks:
    """Collect, layer by layer, where sinks are: the positions, counted from the first real token of a row.

    ``inputs`` counts the rows seen; ``positions[layer]`` counts those in which a position was one.
    """

    def __init__(self, layers: int) -> None:
        self.inputs = 0
        self.positions: list[Counter[int]] = [Counter() for _ in range(layers)]

    def count(self, ratios: Sequence[Tensor], valid: Tensor) -> None:
        """Count the sinks of a batch.

        Args:
            ratios: `norm_ratios` after each layer, l of (b t).
            valid: bool (b t), the real tokens.
        """
        self.inputs += len(valid)
        place = valid.long().cumsum(1) - 1
        for counter, ratio in zip(self.positions, ratios, strict=True):
            counter.update(place[ratio >= SINK].tolist())

    def at(self, layer: int) -> list[dict[str, Any]]:
        """Return the positions that often are sinks after a layer, with the share of inputs, the commonest first."""
        return [
            {"position": position, "share": times / self.inputs}
            for position, times in self.positions[layer].most_common(3)
            if times >= _OFTEN * self.inputs
        ]


def describe_sinks(largest: Sequence[float], positions: Sequence[Sequence[int]]) -> str:
    """Say in a sentence where sinks are, and which measures they blind.

    Args:
        largest: of each layer the largest ratio of a token, median over inputs.
        positions: of each layer the positions that often are sinks.

    >>> describe_sinks([1.5, 20.0, 30.0], [[], [0], [0]])[:77]
    'sinks after layers 1 to 2: a state up to 30 times as long as the median token'
    """
    layers = [layer for layer, ratio in enumerate(largest) if ratio >= SINK]
    if not layers:
        return f"no sinks: no layer's longest state is {SINK:g} times as long as its median token's"
    runs = [layer for layer in layers if layer - 1 not in layers]
    ends = [layer for layer in layers if layer + 1 not in layers]
    named = ", ".join(f"{a} to {b}" if a < b else f"{a}" for a, b in zip(runs, ends, strict=True))
    common = Counter(position for layer in layers for position in positions[layer])
    where = (
        f"position {', '.join(str(position) for position, _ in common.most_common(3))}"
        if common
        else "no fixed position"
    )
    return (
        f"sinks after layers {named}: a state up to {max(largest):.0f} times as long as the median token's, at "
        f"{where}; a norm or a mean over tokens (pooled probes, CKA) sees little else there, a mean of "
        "each token's cosine does, and rho leaves them out"
    )
