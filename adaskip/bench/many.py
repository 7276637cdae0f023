"""`generate_many` beside what it comes from: each path's layers cut out, and its prompts as one batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adaskip.backbone.inspect import twin
from adaskip.bench.cell import Cell, describe, peaks
from adaskip.bench.forced import different, force
from adaskip.bench.sides import Side, Sides
from adaskip.bench.subject import Subject
from adaskip.errors import ConfigError
from adaskip.generate.greedy import greedy_options
from adaskip.generate.paths import Answers
from adaskip.runtime.attach import RoutedModel
from adaskip.runtime.timing import cache_bytes


@dataclass(frozen=True)
class Many:
    """Measure `generate_many` over prompts that come as one batch; its seconds are those that it tells itself.

    Decoding so includes joining the caches of each group's prompts and what ``generate`` does around every token.
    """

    model: RoutedModel
    inputs: dict[str, Tensor]
    new: int

    def run(self, new: int) -> Answers:
        """Generate answers of just so many tokens; placeholders of pictures are never written."""
        placeholders = list(self.model.spec.vision_ids) or None
        return self.model.generate_many(
            [self.inputs],
            group_size=len(self.inputs["input_ids"]),
            min_new_tokens=new,
            suppress_tokens=placeholders,
            **greedy_options(new),
        )

    def prefill_seconds(self) -> float:
        """Take the seconds of routing and reading all prompts."""
        return self.run(1).prefill_s

    def decode_seconds(self) -> float:
        """Take the seconds of writing one token of every answer, group by group."""
        return self.run(self.new).decode_s / self.new


def many_cell(subject: Subject, batch: int, count: int, rate: float, new: int) -> Cell:
    """Make the cell of ``batch`` prompts that go ``count`` different paths, each leaving out the same share of layers.

    Raises:
        ConfigError: inputs that cannot be told apart prompt by prompt.
    """
    inputs = subject.batch(batch)
    keep = different(len(subject.spec.layers), rate, batch, count)
    many, dense = Many(force(subject, keep), inputs, new), Side(subject.spec.model, inputs, new)
    memory = peaks(subject, lambda: many.run(1), dense.prefill)
    dense.settle()
    one, more = many.run(1), many.run(1 + new)
    cut, control = (_groups(subject, inputs, keep, new) for _ in range(2))
    cut.settle()
    control.settle()
    held = {"prefill": {"kv_bytes": one.kv_bytes, "dense_kv_bytes": cache_bytes(dense.cache)}}
    dense.decode()
    held["decode"] = {"kv_bytes": more.kv_bytes, "dense_kv_bytes": cache_bytes(dense.cache)}
    dense.cache.crop(-new)
    before, after = _spent(one), _spent(more)
    return Cell(
        describe(subject, inputs, keep, "many", rate),
        {"dense": dense, "routed": many, "ideal": cut, "control": control},
        {"prefill": before, "decode": ((after[0] - before[0]) / new, (after[1] - before[1]) / new)},
        held,
        memory,
    )


def _groups(subject: Subject, inputs: dict[str, Tensor], keep: Tensor, new: int) -> Sides:
    """Make for every path a model of its layers alone, with those prompts as its batch."""
    parts = []
    for path in dict.fromkeys(map(tuple, keep.T.tolist())):
        column = torch.tensor(path)
        rows = (keep == column[:, None]).all(0).nonzero().flatten()
        parts.append(Side(twin(subject.spec, column.nonzero().flatten().tolist()), _rows(inputs, rows), new))
    return Sides(tuple(parts))


def _rows(inputs: dict[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    """Take some prompts of a batch; what has more entries than there are prompts has equally many for each."""
    batch = len(inputs["input_ids"])
    if uneven := [name for name, value in inputs.items() if len(value) % batch]:
        raise ConfigError(f"bench: --path many: expected equally many {', '.join(uneven)} for every prompt")
    rows = rows.to(inputs["input_ids"].device)
    return {name: value.unflatten(0, (batch, -1))[rows].flatten(0, 1) for name, value in inputs.items()}


def _spent(answers: Answers) -> tuple[float, float]:
    return sum(answer.executed for answer in answers.answers), sum(answer.dense for answer in answers.answers)
