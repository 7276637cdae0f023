"""One cell of a comparison: what one policy at one budget does to every input, and what it saves; a file of its own."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adaskip.batch import Batch
from adaskip.errors import CheckpointError
from adaskip.plan import KV
from adaskip.runfiles import write_json
from adaskip.runtime.attach import RoutedModel
from adaskip.runtime.timing import timed
from adaskip.sites import Label, Unit
from adaskip.survey.record import match_predicted, record
from adaskip.theory.costs import Reference, per_input
from adaskip.verbs.sample import Figures, Sample

CELLS = "cells"
"""Folder of a comparison that holds them."""
ROOM = 2**31
"""Bytes of dense logits that are kept between cells."""
ROUNDS = 5
"""Times that seconds are taken of either side, in turn."""


@dataclass(frozen=True)
class Cell:
    """Hold one policy at one budget and seed; lists hold one number an input, in the order of the data."""

    policy: str
    budget: float
    seed: int
    plan: (
        list[Label] | None
    )  # the layers, or halves of them, that it leaves out for every input; None: it decides by the input
    keep: list[float]  # executed over dense decoder FLOPs
    kl: list[float]  # exact KL(dense || policy), nats per predicted token, teacher-forced
    hit: list[float]  # 1 where the whole answer is right
    dense_hit: list[float]
    same: list[float]  # share of predicted tokens with the dense model's argmax
    kind: list[str]
    runs: list[float]  # share of inputs (or of their tokens) that ran each layer
    seconds: dict[str, float]  # prefill, generate, and the dense model's beside them: medians over rounds, one batch
    origin: str = ""  # a mark of the saved policy that it is of; empty: a method's
    generated: Figures = field(default_factory=dict)  # of answers written freely to a sample; empty: none were
    unit: Unit = "block"  # what of a layer it leaves out
    kv: KV = "absent"  # whether keys of vision tokens that leave are kept
    recipe: str = ""  # a mark of what its run was trained by, but for budget and seed; empty: a method's

    @property
    def name(self) -> str:
        """Return the name of its file, without a suffix."""
        return cell_name(self.policy, self.budget, self.seed)

    def write(self, folder: Path) -> None:
        """Write the cell into a folder, whole or not at all."""
        write_json(folder / f"{self.name}.json", asdict(self))

    @classmethod
    def read(cls, file: Path) -> Cell:
        """Read a cell.

        Raises:
            CheckpointError: the file is damaged.
        """
        try:
            stored = json.loads(file.read_text(encoding="utf-8"))
            needed = [f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING]
            known = [f.name for f in fields(cls) if f.name in stored or f.name in needed]
            return cls(**{name: stored[name] for name in known})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{file}: expected a cell of a comparison, cannot be read ({error!r}); remove it to measure it anew"
            ) from error


def cell_name(policy: str, budget: float, seed: int) -> str:
    """Return what the file of a cell is called, without a suffix."""
    return f"{policy}-{budget:g}-seed{seed}"


class DenseLogits:
    """Predict every batch densely once for all cells, as far as memory allows.

    Args:
        batches: prompts with answers.
        room: bytes that logits may take; those of further batches are computed for every cell.
    """

    def __init__(self, batches: Sequence[Batch], room: int = ROOM) -> None:
        self.batches, self.room = batches, room
        self._known: dict[int, Tensor] = {}

    def __call__(self, place: int, model: RoutedModel) -> Tensor:
        """Return the dense logits (k v) at the predicted tokens of a batch, from any routed model of the backbone."""
        if place in self._known:
            return self._known[place]
        logits = record(model, self.batches[place], states=False).logits
        if (size := logits.numel() * logits.element_size()) <= self.room:
            self.room -= size
            self._known[place] = logits
        return logits


@torch.no_grad()
def measure_cell(
    model: RoutedModel,
    dense: DenseLogits,
    prompts: Batch,
    sample: Sample,
    *,
    policy: str,
    budget: float,
    seed: int,
    new_tokens: int,
    origin: str = "",
    recipe: str = "",
    advance: Callable[[int], None] = lambda done: None,
) -> Cell:
    """Run every input densely and as the model's policy decides.

    Args:
        model: attached, on its device.
        dense: of the prompts with answers, on the model's device.
        prompts: a batch of prompts alone, whose reading and answering is timed.
        sample: of prompts that are answered freely.
        policy: what it is called.
        budget: what it was asked to keep.
        seed: of its draws or its training.
        new_tokens: that are generated where seconds are taken.
        origin: a mark of the saved policy that is measured; empty: a method's.
        recipe: a mark of what its run was trained by, but for budget and seed; empty: a method's.
        advance: called with the number of inputs done.
    """
    columns: dict[str, list[Tensor]] = {name: [] for name in ("keep", "kl", "hit", "dense_hit", "same")}
    kinds: list[str] = []
    runs = torch.zeros(len(model.sites), dtype=torch.float64)
    for place, batch in enumerate(dense.batches):
        expected = dense(place, model)
        logits = record(model, batch, routed=True, states=False).logits
        agrees = (logits.argmax(-1) == expected.argmax(-1)).double()
        found = {
            "keep": model.routing.keep_rate,
            "kl": Reference(expected).compare(logits, batch.supervised)["kl"],
            "hit": match_predicted(logits, batch),
            "dense_hit": match_predicted(expected, batch),
            "same": per_input(agrees, batch.supervised, "mean"),
        }
        for name, values in found.items():
            columns[name].append(values.double().cpu())
        runs += model.routing.share.double().sum(1).cpu()
        kinds += [str(kind or "all") for kind in batch.kind]
        advance(len(kinds))
    numbers = {name: torch.cat(values).tolist() for name, values in columns.items()}
    known = model.policy.known(len(model.spec.layers))
    plan = None if known is None else [*model.sites.labels((~known).nonzero().flatten().tolist())]
    shares = (runs / max(1, len(kinds))).tolist()
    seconds = _seconds(model, prompts, new_tokens)
    return Cell(
        policy, budget, seed, plan, **numbers, kind=kinds, runs=shares, seconds=seconds, origin=origin,
        generated=sample(model), unit=model.target.unit,
        kv=model.target.kv if model.target.group == "vision" else "absent", recipe=recipe,
    )  # fmt: skip


def _seconds(model: RoutedModel, prompts: Batch, new_tokens: int) -> dict[str, float]:
    """Return median seconds of reading prompts, and of reading and answering them, routed and dense in turn."""

    def prefill() -> Any:
        return model(**prompts.inputs, use_cache=True)

    def generate() -> Any:
        return model.generate(**prompts.inputs, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False)

    def dense(call: Callable[[], Any]) -> Callable[[], Any]:
        def inside() -> Any:
            with model.dense():
                return call()

        return inside

    calls = {
        "prefill": prefill,
        "dense_prefill": dense(prefill),
        "generate": generate,
        "dense_generate": dense(generate),
    }
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for place in range(ROUNDS + 1):
        # every other round backwards, so that a machine that slows down slows all alike
        for name in reversed(calls) if place % 2 else calls:
            _, seconds = timed(calls[name])
            if place:  # the first round pays for allocation
                taken[name].append(seconds)
    return {name: statistics.median(values) for name, values in taken.items()}
