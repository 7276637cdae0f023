"""Measure what leaving out each single layer costs each input: one dense pass, one rerun of the suffix per layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import fields

import torch
from torch import Tensor

from adaskip.batch import Batch
from adaskip.runtime.attach import RoutedModel
from adaskip.survey.crossmodal import read_attention
from adaskip.theory import measures
from adaskip.theory.costs import compare
from adaskip.theory.tables import LayerMeasures


def _of_group(values: Tensor) -> Tensor:
    """Measures of each input, 0 where it has no token of the group: a skip that nothing makes changes nothing."""
    return values.nan_to_num(0.0, posinf=math.inf)


@torch.no_grad()
def measure(
    model: RoutedModel,
    batches: Iterable[Batch],
    layers: Iterable[int] | None = None,
    attention: bool = False,
    progress: Callable[[int], None] | None = None,
) -> LayerMeasures:
    """All per-layer quantities of the routed group on batches of prompts with answers.

    Costs one dense pass a batch and, per layer, the decoder's suffix from that layer on.

    Args:
        model: attached; its group says which tokens leave a layer.
        batches: as `Collator` makes them, on the model's device.
        layers: which layers to measure; default all.
        attention: also measure the text's attention mass on vision, in the same pass.
        progress: called with the number of inputs done after each batch.
    """
    n_layers = len(model.spec.layers)
    chosen = tuple(range(n_layers) if layers is None else layers)
    rows: list[dict[str, Tensor]] = []
    for batch in batches:
        states: list[Tensor] = []
        geometry: dict[str, list[Tensor]] = {"cosine": [], "rho": []}

        def watch(index: int, before: Tensor, after: Tensor) -> None:
            # what a layer returned, not what the next one got: some models add to the states in between
            states.extend([after] if states else [before, after])  # noqa: B023 - read within this very batch
            group = model.group_mask()
            geometry["cosine"].append(_of_group(measures.cosine_distance(before, after, group)))  # noqa: B023
            geometry["rho"].append(_of_group(measures.relative_change(before, after, group)))  # noqa: B023

        reading = read_attention(model, model.read_tokens(batch.inputs)) if attention else nullcontext()
        with model.dense(), model.observe(watch), reading as read:
            dense = model(**batch.arguments()).logits
        found: dict[str, list[Tensor]] = {"kl": [], "s": [], "u": []}
        for index in chosen:
            keep = torch.ones(n_layers, len(dense), dtype=torch.bool, device=dense.device)
            keep[index] = False
            with model.replay(states[: index + 1]):
                out = model(**batch.arguments(), routing=keep)
            for name, value in compare(dense, out.logits, batch.supervised).items():
                found[name].append(value)
        columns = {name: torch.stack(values, 1) for name, values in found.items()}
        columns |= {name: torch.stack([values[i] for i in chosen], 1) for name, values in geometry.items()}
        columns["mass"] = torch.zeros_like(columns["rho"]) if read is None else read.mass[:, list(chosen)]
        rows.append({name: value.float().cpu() for name, value in columns.items()})
        if progress is not None:
            progress(sum(len(row["kl"]) for row in rows))
    names = [f.name for f in fields(LayerMeasures) if f.name != "layers"]
    return LayerMeasures(chosen, **{name: torch.cat([row[name] for row in rows]) for name in names})
