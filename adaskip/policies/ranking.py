"""Rank vision tokens by what the end of the prompt attends to, and let the weakest leave: once, or stage by stage.

layer      0 1 | 2 3 | 4 5          stages = (2, 4), share = 0.5
patch 1    # # | # # | # #          at the end of each stage the patches that are still there are ranked by what the
patch 2    # # | # # | . .          last prompt token attends to in the layer just run; half of them, those that it
patch 3    # # | . . | . .          attends to least, leave every layer behind, and their keys are gone there as well
text       # # | # # | # #
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from adaskip.backbone.attention import AttentionCall
from adaskip.backbone.inspect import BackboneSpec
from adaskip.errors import ConfigError
from adaskip.plan import Target
from adaskip.policy import Policy
from adaskip.runtime.segment import WHOLE

if TYPE_CHECKING:
    from adaskip.runtime.request import Request

_TARGET = {"scope": "token", "group": "vision", "unit": "block", "kv": "absent"}


class Ranking(Policy):
    """Drop a share of the vision tokens that are still there before each of some layers; a base class.

    Of a prompt that is read in chunks, the last token of each chunk ranks the patches of that chunk. A method names its
    layers in `stages`, and calls `check` in its constructor.

    Attributes:
        stages: the layers, ascending, that a further share of the tokens no longer enters; the one before each ranks.
        share: of the vision tokens that are still there, what stays at each stage, rounded up.
    """

    stages: tuple[int, ...]
    share: float

    def __init__(self, target: Target | None) -> None:
        super().__init__(target or Target(scope="token", group="vision"))

    def check(self, faults: list[str], name: str) -> None:
        """Refuse faults of a method's own, a share outside its range, kept under ``name``, and another target.

        Raises:
            ConfigError: all of them at once.
        """
        share = self.share
        if isinstance(share, bool) or not (isinstance(share, int | float) and 0 < share <= 1):
            faults.append(f"{name}: expected a share in (0, 1], got {share!r}")
        if wrong := [f"{key}={value!r}" for key, value in _TARGET.items() if getattr(self.target, key) != value]:
            faults.append(f"target: expected {', '.join(wrong)}; single vision tokens leave whole layers")
        if faults:
            raise ConfigError(f"{type(self).__name__}: " + "; ".join(faults))

    @property
    def reads(self) -> tuple[int, ...]:
        """Return the layers whose attention ranks the vision tokens."""
        return tuple(stage - 1 for stage in self.stages)

    def attend(self, layer: int, call: AttentionCall, request: Request) -> None:
        """Rank the vision tokens that are still there by what the last prompt token of each row attends to."""
        there = self._there(layer, request)
        if there is None or not bool(there.any()):
            return
        request.memo["stays", layer + 1] = strongest(attention_of_last(call, request), there, self.share)

    def decide(self, layer: int, states: Tensor, request: Request) -> Tensor:
        """Return bool (b t): every token in the first layers, then those that stay."""
        there = self._there(layer, request)
        if there is None or there is request.deciding:
            return torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
        return there.to(states.device)

    def _there(self, layer: int, request: Request) -> Tensor | None:
        """Return which vision tokens (b t) still enter a layer; None where there are none that could leave."""
        passed = [stage for stage in self.stages if stage <= layer and ("stays", stage) in request.memo]
        there: Tensor | None = request.memo["stays", passed[-1]] if passed else request.deciding
        return there


def check_stages(stages: Sequence[int], spec: BackboneSpec, where: str) -> None:
    """Refuse stages that a model does not have.

    Args:
        stages: the layers that tokens no longer enter.
        spec: of the model.
        where: what an error begins with.

    Raises:
        ConfigError: the model does not have one of them.
    """
    if wrong := [stage for stage in stages if stage >= len(spec.layers)]:
        raise ConfigError(f"{where}: expected 1 to {len(spec.layers) - 1}, got {', '.join(map(str, wrong))}")


def attention_of_last(call: AttentionCall, request: Request) -> Tensor:
    """Return what each row's last prompt token attends to, mean over heads, float32 (b t); 0 where a token did not run.

    Args:
        call: the attention of the tokens that run the layer, which are those of ``request.part``.
        request: what is known beside it.
    """
    part, (batch, length) = request.part or WHOLE, request.prompt.shape
    device = call.query.device
    prompt = request.prompt.to(device)
    rows = torch.arange(batch, device=device) if part.rows is None else part.rows
    tokens = torch.arange(length, device=device).expand(len(rows), -1) if part.tokens is None else part.tokens
    real, places = tokens >= 0, tokens.clamp(min=0)
    queries, which = last_place(prompt[rows].gather(1, places) & real).unique(return_inverse=True)
    weights = call.weights(queries).mean(1)  # (r c k), of which the last keys are those of the part itself
    seen = weights[torch.arange(len(rows), device=device), which][:, -tokens.shape[1] :]
    everywhere = torch.zeros(batch, length, device=device)
    everywhere[rows[:, None].expand_as(places)[real], places[real]] = seen[real]
    return everywhere


def last_place(prompt: Tensor) -> Tensor:
    """Return the place of each row's last prompt token, long (b), of bool (b t); the last place of a row without."""
    flipped = prompt.flip(1).long().argmax(1)
    return prompt.shape[1] - 1 - flipped


def strongest(scores: Tensor, among: Tensor, share: float) -> Tensor:
    """Return bool (b t): of the tokens ``among`` (b t) a share of each row, rounded up, with the largest scores.

    Of equal scores the first stay.

    >>> strongest(torch.tensor([[0.1, 0.4, 0.3, 0.9]]), torch.tensor([[True, True, True, False]]), 0.5).tolist()
    [[False, True, True, False]]
    """
    counts = torch.tensor([math.ceil(share * count - 1e-9) for count in among.sum(1).tolist()], device=scores.device)
    order = scores.masked_fill(~among, -torch.inf).argsort(dim=1, descending=True, stable=True)
    chosen: Tensor = order.argsort(dim=1) < counts[:, None]
    return chosen & among
