"""Decisions made to measure: which layers a skip rate leaves out, and real routers that decide just so."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from adaskip.bench.settings import Path
from adaskip.errors import AdaSkipError, ConfigError
from adaskip.policies.learned.features import mean_weights, pool
from adaskip.runtime.attach import RoutedModel

_LOGIT = 4.0


def spread_out(layers: int, rate: float, batch: int, path: Path) -> Tensor:
    """Return bool (l b): every row leaves out ``round(rate * layers)`` layers, evenly spread over the depth.

    ``uniform``: all rows the same ones; ``mixed``: each row others, the pattern moved on by one layer a row.

    >>> spread_out(4, 0.5, 2, "mixed").int().T.tolist()
    [[1, 0, 1, 0], [0, 1, 0, 1]]
    """
    skipped = round(rate * layers)
    row = torch.ones(layers, dtype=torch.bool)
    row[[(2 * i + 1) * layers // (2 * skipped) for i in range(skipped)]] = False
    return torch.stack([row.roll(i if path == "mixed" else 0) for i in range(batch)], 1)


def different(layers: int, rate: float, batch: int, count: int) -> Tensor:
    """Return bool (l b): ``count`` ways of leaving out ``round(rate * layers)`` layers, taken by the rows in turn.

    Where nothing is left out there is one way only. Drawn at random, the same at every call.

    >>> different(4, 0.5, 3, 2).int().T.tolist()
    [[0, 0, 1, 1], [0, 1, 0, 1], [0, 0, 1, 1]]
    """
    skipped, draw = round(rate * layers), torch.Generator().manual_seed(0)
    patterns: dict[tuple[int, ...], Tensor] = {}
    while len(patterns) < (count if skipped else 1):
        out = torch.randperm(layers, generator=draw)[:skipped].sort().values
        patterns.setdefault(tuple(out.tolist()), torch.ones(layers, dtype=torch.bool).index_fill(0, out, False))
    ways = [*patterns.values()]
    return torch.stack([ways[row % len(ways)] for row in range(batch)], 1)


@torch.no_grad()
def force(model: RoutedModel, inputs: dict[str, Tensor], keep: Tensor) -> None:
    """Give the routers last weights and a threshold of 0 with which they decide ``keep``, bool (l b), on these inputs.

    Where a layer's rows agree its bias decides; where they differ the weights are fitted to them by least squares. All
    of a router's work remains: pooling, norm, both linear maps, and the reading of its decision.

    Raises:
        AdaSkipError: some router decides otherwise (two rows that look the same to it).
    """
    if model.routers is None:
        raise ConfigError(
            f"bench: rows are made by forcing what learned routers decide, and {type(model.policy).__name__} has none; "
            "time model.generate yourself, or bench a run of learned routers"
        )
    spec = model.spec
    model.set_threshold(0.0)  # a run's own may be that of no certificate, at which every layer runs
    signs = torch.where(keep, _LOGIT, -_LOGIT).to(spec.device)
    seen: dict[int, Tensor] = {}
    if bool((keep != keep[:, :1]).any()):
        tokens = model.read_tokens(inputs)
        weights = mean_weights(tokens.kinds(tokens.valid))

        def observe(index: int, before: Tensor, after: Tensor) -> None:
            seen[index] = model.routers[index].features(pool(before, weights))  # type: ignore[index, operator]

        with model.observe(observe):
            model(**inputs, routing=keep, use_cache=False)
    for index, head in enumerate(model.routers):
        outer: Any = head.outer
        outer.weight.zero_()
        target = signs[index]
        if index in seen and bool((target != target[0]).any()):
            features = seen[index].double()
            features = features - features.mean(0)
            outer.weight.copy_((torch.linalg.pinv(features) @ (target - target.mean()).double())[None])
            outer.bias.zero_()
            logits = seen[index] @ outer.weight[0] + outer.bias
            outer.bias.sub_((logits - target).mean())
        else:
            outer.bias.fill_(float(target[0]))


def check_forced(decided: Tensor, keep: Tensor) -> None:
    """Raise AdaSkipError unless decisions (l b) are those that `force` was to make."""
    if not torch.equal(decided.cpu(), keep):
        layers = sorted({int(layer) for layer, _ in (decided.cpu() != keep).nonzero()})
        raise AdaSkipError(
            f"bench: the routers of layers {layers} did not decide as they were made to; "
            "two rows look the same to them. Use --path uniform, or another --seed"
        )
