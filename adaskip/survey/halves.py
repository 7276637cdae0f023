"""Measure the halves of layers: how far each turns its states, how far the last ones stray without it, its seconds.

    x ──▶ attention ──▶ y ──▶ MLP ──▶ z        a half turns a token by 1 - cos(x, y), or by 1 - cos(y, z)

A model hands out x and z; y is what the layer returns when its MLP is left out, whatever norms and factors stand around
its halves.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from adaskip.batch import Batch
from adaskip.runtime.attach import RoutedModel
from adaskip.runtime.timing import clock
from adaskip.survey.record import Recorded, record
from adaskip.theory.measures import cosine_distance


class _Seen(Exception):
    """Stop a pass whose rest nobody needs."""


def states_around(recorded: Recorded) -> list[Tensor]:
    """Return the states before the first site and after every one, s+1 of (b t d); costs as much as a dense pass.

    Args:
        recorded: a dense pass, with its states.
    """
    states = [recorded.entered[0]]
    for layer, after in enumerate(recorded.states[1:]):
        _, *rest = recorded.model.sites.of(layer)
        if rest:
            states.append(_state_after(recorded, layer, rest))
        states.append(after)
    return states


@torch.no_grad()
def site_turns(model: RoutedModel, batches: Sequence[Batch]) -> Tensor:
    """Return float64 (s): how far each site turns a prompt token of the group, 1 - cos, mean over tokens and inputs."""
    found = []
    for batch in batches:
        recorded = record(model, batch)
        tokens = recorded.group & batch.prompt_mask
        states = states_around(recorded)
        turns = [cosine_distance(a, b, tokens) for a, b in pairwise(states)]
        found.append(torch.stack(turns, 1)[tokens.any(1)].double().cpu())
    return torch.cat(found).mean(0)


@torch.no_grad()
def last_strays(model: RoutedModel, batches: Sequence[Batch]) -> Tensor:
    """Return float64 (s): 1 - cos of the last layer's state with and without each site, mean over predicting tokens.

    Costs a dense pass a batch and, for every site, the decoder's suffix from its layer on.
    """
    found, last = [], len(model.spec.layers) - 1
    for batch in batches:
        recorded = record(model, batch)
        predicts = nn.functional.pad(batch.supervised, (0, 1))  # the token before a supervised one predicts it
        columns = [
            cosine_distance(recorded.states[-1], _state_after(recorded, last, [site]), predicts)
            for site in range(len(model.sites))
        ]
        found.append(torch.stack(columns, 1).double().cpu())
    return torch.cat(found).mean(0)


@torch.no_grad()
def site_seconds(model: RoutedModel, batches: Sequence[Batch], rounds: int = 3) -> Tensor:
    """Return float64 (s): seconds that the modules of each half of a layer took in dense passes, all inputs together.

    They are of these inputs' lengths, on this machine: the longer the prompts, the more of a layer is its attention.
    The median over rounds, after one that counts for nothing. Comparable with one another alone.

    Args:
        model: attached with a unit whose sites are modules of their own.
        batches: on the model's device.
        rounds: of all batches.
    """
    taken = [0.0] * len(model.sites)
    started: dict[int, float] = {}

    def begin(site: int) -> Callable[..., None]:
        return lambda *_: started.__setitem__(site, clock())

    def end(site: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            taken[site] += clock() - started[site]

        return hook

    handles = []
    for site in range(len(model.sites)):
        for module in model.spec.sublayers[model.sites.layer(site)].modules(model.sites.part(site)):
            handles.append(module.register_forward_pre_hook(begin(site)))
            handles.append(module.register_forward_hook(end(site)))
    found = []
    try:
        for _ in range(rounds + 1):
            taken[:] = [0.0] * len(taken)
            for batch in batches:
                with model.dense():
                    model(**batch.arguments())
            found.append([*taken])
    finally:
        for handle in handles:
            handle.remove()
    return torch.tensor([statistics.median(column) for column in zip(*found[1:], strict=True)], dtype=torch.float64)


def _state_after(recorded: Recorded, layer: int, sites: Sequence[int]) -> Tensor:
    """Return the state (b t d) after a layer with some sites left out; nothing behind the layer runs."""
    found: list[Tensor] = []

    def watch(index: int, before: Tensor, after: Tensor) -> None:
        if index == layer:
            found.append(after)
            raise _Seen

    with suppress(_Seen), recorded.model.observe(watch):
        recorded.rerun(recorded.skipping(sites))
    return found[0]
