"""A plan for each class of tokens: what a token looks like before an early layer says which later layers it needs.

    layer            0 1 2 | 3 4 5 6 7 8 ...                 entry = 3
    system prompt    # # # | # # # . . . ...                 what a token's state shows before layer 3 puts it
    question         # # # | # # # # # . ...                 into a class; each class leaves out layers of its own,
    answer           # # # | # # . # # # ...                 and nothing is decided later

Prompt tokens are there to be read: once the later tokens have read what they need of them, their own layers serve
nobody. A generated token is there to predict the next. So both have classes of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from adaskip.backbone.inspect import BackboneSpec
from adaskip.errors import ConfigError
from adaskip.plan import Target
from adaskip.policy import Policy
from adaskip.sites import Label, read_sites

if TYPE_CHECKING:
    from adaskip.runtime.request import Request

SIDES = ("prompt", "answer")


class TokenPlan(Policy):
    """Leave out layers of each token by its class, the nearest of a few directions that states take.

    Made by `adaskip.survey.token_plan.find_token_plan`. As it comes, without directions, every token is of the first
    class of its side.

    Args:
        prompt: the layers that each class of prompt tokens leaves out, or halves of them.
        answer: the same of generated tokens.
        entry: classes are told apart before this layer; every earlier one runs.
        target: its scope is ``token``.

    Raises:
        ConfigError: no class on one side, a layer before the entry, or scope ``prompt``.
    """

    kind: ClassVar[str] = "token_plan"
    needs: ClassVar[str] = "answers"
    keep: Tensor  # bool (c s), the classes of prompt tokens first
    centres: Tensor  # float32 (c d), of length 1 each

    def __init__(
        self,
        prompt: Sequence[Sequence[Label]],
        answer: Sequence[Sequence[Label]],
        entry: int = 3,
        target: Target | None = None,
    ) -> None:
        super().__init__(target or Target(scope="token"))
        try:
            self.prompt, self.answer = (tuple(map(self.target.read_labels, side)) for side in (prompt, answer))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"TokenPlan: expected a list of layer numbers for each class ({error})") from None
        self.entry, self.sites = entry, self.target.sites(0)
        faults = [f"{name}: expected at least one class, got none" for name in SIDES if not getattr(self, name)]
        if early := self.target.sites(entry).split(self.skips)[0]:
            faults.append(f"layers {early} stand before entry={entry}, where every layer runs; lower the entry")
        if self.target.scope != "token":
            faults.append("target: expected scope 'token', got 'prompt'; every token is of a class of its own")
        if faults:
            raise ConfigError("TokenPlan: " + "; ".join(faults))

    @property
    def skips(self) -> tuple[tuple[Label, ...], ...]:
        """Return what each class leaves out, those of prompt tokens first."""
        return (*self.prompt, *self.answer)

    def build(self, spec: BackboneSpec, seed: int) -> None:
        """Make room for the directions, of which none is known yet.

        Raises:
            ConfigError: a class names a layer that the model does not have, or the entry is not inside it.
        """
        layers = len(spec.layers)
        self.sites = self.target.sites(layers)
        _, wrong = self.sites.split(self.skips)
        if wrong or not 0 <= self.entry < layers:
            named = f"layers {wrong}" if wrong else f"entry={self.entry}"
            raise ConfigError(f"TokenPlan: {named}: the model has {layers} layers, 0 to {layers - 1}")
        keep = torch.ones(len(self.skips), len(self.sites), dtype=torch.bool)
        for row, skip in zip(keep, self.skips, strict=True):
            row[list(read_sites(self.target.unit, skip))] = False
        self.register_buffer("keep", keep.to(spec.device), persistent=False)
        self.register_buffer("centres", torch.zeros(len(keep), spec.width, device=spec.device))

    def decide(self, layer: int, states: Tensor, request: Request) -> Tensor:
        """Return bool (b t): what each token's class says of this layer; classes are told apart once a request."""
        if self.sites.layer(layer) < self.entry:
            return torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
        if "class" not in request.memo:
            request.memo["class"] = classify(states, request.prompt, self.centres, len(self.prompt))
        return self.keep[request.memo["class"], layer]

    def to_dict(self) -> dict[str, Any]:
        """Return what the classes leave out, the entry, and the target."""
        sides = {name: [list(skip) for skip in getattr(self, name)] for name in SIDES}
        return {**sides, "entry": self.entry, "target": self.target.to_dict()}


def classify(states: Tensor, prompt: Tensor, centres: Tensor, prompts: int) -> Tensor:
    """Return the class of every token, long (b t): the centre of its side that its state points at most.

    Args:
        states: (b t d), any float type; what is padding may be anything, NaN included.
        prompt: bool (b t), which tokens are prompt.
        centres: float32 (c d), of length 1.
        prompts: so many of them, the first ones, are classes of prompt tokens.
    """
    near = states.float().nan_to_num() @ centres.T  # the length of a state does not change which is nearest
    other = torch.arange(len(centres), device=states.device) >= prompts
    return near.masked_fill(other == prompt[..., None], -torch.inf).argmax(-1)
