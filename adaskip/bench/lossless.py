"""Lossless decoding beside the dense model's own `generate`, and beside a model of the layers that its drafts run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from adaskip.bench.cell import Cell, describe, peaks
from adaskip.bench.forced import force, spread_out
from adaskip.bench.sides import ideal
from adaskip.bench.subject import Subject
from adaskip.generate.greedy import greedy_options
from adaskip.runtime.timing import clock


class _Watch(BaseStreamer):
    """Note when the first token of an answer was there, and when the last one was."""

    def __init__(self) -> None:
        self.begin, self.heard = clock(), 0
        self.first = self.last = self.begin

    def put(self, value: Tensor) -> None:
        self.heard += 1
        if self.heard == 2:  # what comes first is the prompt
            self.first = clock()

    def end(self) -> None:
        self.last = clock()


@dataclass(frozen=True)
class Answering:
    """Generate answers of just so many tokens, by whatever ``generate`` is given."""

    generate: Callable[..., Any]
    inputs: dict[str, Tensor]
    new: int
    placeholders: list[int] | None  # of pictures, which are never written

    def run(self, new: int) -> _Watch:
        """Generate once, with a clock that listens."""
        watch = _Watch()
        options = greedy_options(new) | {"min_new_tokens": new, "suppress_tokens": self.placeholders}
        self.generate(**self.inputs, **options, streamer=watch)
        return watch

    def prefill_seconds(self) -> float:
        """Take the seconds up to the first token."""
        watch = self.run(1)
        return watch.first - watch.begin

    def decode_seconds(self) -> float:
        """Take the seconds of one token of every row behind the first."""
        watch = self.run(1 + self.new)
        return (watch.last - watch.first) / self.new


def lossless_cell(subject: Subject, batch: int, rate: float | None, new: int) -> Cell:
    """Make the cell of a batch that drafts along a path, or along what the policy decides where ``rate`` is None.

    Drafts have learned from one answer before they are timed. Beside the other facts stand ``acceptance`` and
    ``accepted_length`` of the last answer before the rounds.
    """
    inputs, routed = subject.batch(batch), subject.routed
    if rate is not None:
        routed = force(subject, spread_out(len(subject.spec.layers), rate, batch, "uniform"))
    placeholders = list(subject.spec.vision_ids) or None

    def draft(**options: Any) -> Any:
        return routed.generate(**options, lossless=True)

    lossless = Answering(draft, inputs, new, placeholders)
    plain: Any = subject.spec.model
    dense = Answering(plain.generate, inputs, new, placeholders)
    memory = peaks(subject, lambda: lossless.run(1), lambda: dense.run(1))
    prompt = routed.routing
    for _ in range(2):
        lossless.run(1 + new)
    answer, drafts = routed.routing, routed.lossless
    path = torch.tensor(drafts.path)[:, None].expand(-1, batch)
    cut, control = (ideal(subject, inputs, path, new) for _ in range(2))
    cut.settle()
    control.settle()
    assert prompt.dense is not None
    assert prompt.kv_bytes is not None
    assert answer.kv_bytes is not None
    read, before, after = float(prompt.dense.sum()), int(prompt.kv_bytes.sum()), int(answer.kv_bytes.sum())
    return Cell(
        describe(subject, inputs, path, "lossless", rate)
        | {"acceptance": drafts.acceptance, "accepted_length": drafts.accepted_length},
        {"dense": dense, "routed": lossless, "ideal": cut, "control": control},
        {"prefill": (read, read), "decode": (drafts.executed / new, drafts.dense / new)},
        {
            "prefill": {"kv_bytes": before, "dense_kv_bytes": before},
            "decode": {"kv_bytes": after, "dense_kv_bytes": after},
        },
        memory,
    )
