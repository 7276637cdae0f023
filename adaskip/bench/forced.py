"""Decisions made to measure: which layers a skip rate leaves out, and a policy that decides just so, at full price."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from adaskip.backbone.inspect import BackboneSpec, twin
from adaskip.bench.settings import Path
from adaskip.bench.subject import Subject
from adaskip.policy import Policy
from adaskip.runtime.attach import RoutedModel, attach

if TYPE_CHECKING:
    from adaskip.runtime.request import Request


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


class Forced(Policy):
    """Do all of another policy's work on one batch, and then decide what was said beforehand.

    Its seconds are the other's: it asks it about every layer, and hands on a value of the same kind that was there
    already, so that it adds nothing to compute, and the wait for a decision is the same too.

    Args:
        policy: whose work is to be timed; its held layers hold nothing here.
        keep: bool (l b), whether each row of the batch runs each layer.
    """

    def __init__(self, policy: Policy, keep: Tensor) -> None:
        super().__init__(policy.target)
        self.policy, self.choices = policy, keep

    def build(self, spec: BackboneSpec, seed: int) -> None:
        """Bring what it decides to the model's device beforehand."""
        self.choices = self.choices.to(spec.device)
        self.logits = torch.where(self.choices, 1.0, -1.0)

    def known(self, layers: int) -> Tensor | None:
        """Return the decisions, bool (l), where the other's are known before any input as well."""
        return None if self.policy.known(layers) is None else self.choices[:, 0].cpu()

    def start(self, request: Request) -> None:
        """Let the other policy look at the request."""
        self.policy.start(request)

    def decide(self, layer: int, states: Tensor, request: Request) -> Tensor:
        """Ask the other policy, and return what was said beforehand: bool or float32 (b), as it answers."""
        choice = self.policy.decide(layer, states, request)
        return (self.choices if choice.dtype == torch.bool else self.logits)[layer]


def force(subject: Subject, keep: Tensor) -> RoutedModel:
    """Return the subject's model under a policy that decides ``keep``, bool (l b), and works as its own does.

    It is for batches of those b rows, in that order.
    """
    return attach(twin(subject.spec), Forced(subject.routed.policy, keep))
