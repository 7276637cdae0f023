"""Skip-Vision: most vision tokens take part in attention alone, what they hold is summed up, and their keys go.

patch            1 2 3 4 5 6 7 8
class attention  9 1 8 2 1 3 2 1       ranks the patches: 1 and 3 are kept
the others         |   | | | | |       those most like all the others are merged: 4 into 2, 5 7 8 into 6
run the MLP      # # # . . # . .       2 and 6 now hold a summary of their groups
attention        # # # # # # # #
keys, later      # # #     #           an answer attends to those that ran the MLPs
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import normalize

from adaskip.backbone.inspect import BackboneSpec
from adaskip.backbone.tower import find_tower_layer, spread_attention
from adaskip.errors import ConfigError
from adaskip.plan import KEEP_ALL, Target
from adaskip.policies.ranking import strongest
from adaskip.policy import Policy
from adaskip.sites import Sites

if TYPE_CHECKING:
    from adaskip.runtime.request import Request

_TARGET = {"scope": "token", "group": "vision", "unit": "sublayers", "kv": "absent"}
KEPT, LEFT = 100 / 576, 156 / 576
"""The published shares of a picture's patches: those kept by rank, and those into which the others are merged."""


@dataclass(frozen=True)
class Groups:
    """Say what becomes of each vision token of a prompt."""

    kept: Tensor  # bool (b t): as they are
    left: Tensor  # bool (b t): each sums a group up
    merged: Tensor  # bool (b t): summed up
    into: Tensor  # long (b t): the place of the summary of what is left or merged; of any other token its own


class SkipVision(Policy):
    """Let vision tokens that others can stand for skip every MLP, sum them up, and free their keys (arXiv 2503.21817).

    Patches are ranked by what the class token of the vision tower attends to, summed over heads, in the layer whose
    states the model takes; a share of each input's is kept. Of the rest, those with the largest summed cosine
    similarity to the rest are merged, each into the most similar one of those that are left. A group's summary is the
    softmax-weighted sum of its members' states. What is merged runs every attention and no MLP, and its keys and values
    are freed when the prompt has been read; what is left and what is kept run all.

    Ours, where the published text leaves a gap or the runtime asks for it: similarity is that of the states that enter
    the decoder; all of an input's pictures are ranked together; the merge is one step, not a series of pairs; the
    summary takes the place of the token that is merged into; its weights, without training, are of the members' cosine
    similarity to that token over ``temperature``; pictures behind the prompt run whole. Absent: summary tokens with a
    position of their own, and a backbone that is trained with the MLPs left out; here it is frozen.

    Args:
        kept: share of an input's vision tokens that are kept by rank, rounded up.
        left: share of those into which the others are merged; with ``kept`` at most 1, the two together rounded up.
        temperature: of a summary's weights; the smaller, the nearer it is to the token whose place it takes.
        learns: whether a weight for each dimension of a member's direction is added to its similarity, from 0 on, and
            trained (`adaskip.RouterTuner`); else nothing is trained.
        target: of scope ``token``, group ``vision``, unit ``sublayers``, keys absent.

    Raises:
        ConfigError: a value outside its range, or another target.
    """

    kind: ClassVar[str] = "skip_vision"
    sees: ClassVar[bool] = True
    enters: ClassVar[bool] = True
    forgets: ClassVar[bool] = True

    def __init__(
        self,
        kept: float = KEPT,
        left: float = LEFT,
        temperature: float = 0.1,
        learns: bool = False,
        target: Target | None = None,
    ) -> None:
        super().__init__(target or Target(scope="token", group="vision", unit="sublayers"))
        self.kept, self.left, self.temperature, self.learns = kept, left, temperature, learns
        self.weight: nn.Parameter | None = None
        self.sites = Sites("sublayers", 0)
        faults = []
        for name, value in (("kept", kept), ("left", left)):
            if isinstance(value, bool) or not (isinstance(value, int | float) and 0 <= value <= 1):
                faults.append(f"{name}: expected a share in [0, 1], got {value!r}")
        if not faults and not 0 < kept + left <= 1 + 1e-9:
            faults.append(f"kept, left: expected shares that together are in (0, 1], got {kept!r} and {left!r}")
        if isinstance(temperature, bool) or not (isinstance(temperature, int | float) and temperature > 0):
            faults.append(f"temperature: expected a number above 0, got {temperature!r}")
        if not isinstance(learns, bool):
            faults.append(f"learns: expected True or False, got {learns!r}")
        if wrong := [f"{key}={value!r}" for key, value in _TARGET.items() if getattr(self.target, key) != value]:
            faults.append(f"target: expected {', '.join(wrong)}; single vision tokens leave MLPs alone")
        if faults:
            raise ConfigError("SkipVision: " + "; ".join(faults))

    def build(self, spec: BackboneSpec, seed: int) -> None:
        """Look for the vision tower, and make the weights where they are to be trained.

        Raises:
            BackboneError: the model has no vision tower with a class token.
        """
        find_tower_layer(spec.model, spec.layers, type(self).__name__)
        self.sites = self.target.sites(len(spec.layers))
        if self.learns:
            self.weight = nn.Parameter(torch.zeros(spec.width, device=spec.device))

    def enter(self, states: Tensor, request: Request) -> Tensor:
        """Return the states (b t d) with the summaries in place of what is left of the groups."""
        groups = self._groups(states, request)
        if groups is None:
            return states
        values = states.float()
        directions = normalize(values, dim=-1)
        into = rearrange(groups.into, "b t -> b t 1").expand_as(values)
        scores = (directions * directions.gather(1, into)).sum(-1) / self.temperature
        if self.weight is not None:
            scores = scores + directions @ self.weight.to(values.device)
        # a softmax over each group: one and the same number may be taken off all of its scores, here its summary's
        weights = (scores - scores.gather(1, groups.into)).exp() * (groups.left | groups.merged)
        weights = rearrange(weights, "b t -> b t 1")
        total = torch.zeros_like(values).scatter_add(1, into, weights * values)
        share = torch.zeros_like(weights).scatter_add(1, into[..., :1], weights)
        summary = (total / share.clamp(min=1e-12)).to(states.dtype)
        return torch.where(rearrange(groups.left, "b t -> b t 1"), summary, states)

    def decide(self, layer: int, states: Tensor, request: Request) -> Tensor:
        """Return bool (b t): every token runs an attention, and all but those that are merged an MLP."""
        groups: Groups | None = request.memo.get("groups")
        if groups is None or self.sites.part(layer) == "attention":
            return torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
        return ~groups.merged.to(states.device)

    def forget(self, request: Request) -> Tensor | None:
        """Return bool (b t): the tokens that are merged; where decisions are given, those that leave an MLP."""
        groups: Groups | None = request.memo.get("groups")
        return None if groups is None else groups.merged.to(request.prompt.device)

    @torch.no_grad()
    def _groups(self, states: Tensor, request: Request) -> Groups | None:
        """Return what becomes of the prompt's vision tokens; None where there are none, or everything is to run."""
        if "groups" not in request.memo:
            request.memo["groups"] = self._find(states, request)
        groups: Groups | None = request.memo["groups"]
        return groups

    def _find(self, states: Tensor, request: Request) -> Groups | None:
        vision = request.tokens.vision
        if vision is None or request.answering or request.threshold <= KEEP_ALL:
            return None
        there = (vision & request.prompt).to(states.device)
        if not bool(there.any()):
            return None
        attention = spread_attention(request.tower, vision.to(states.device))
        groups = group_tokens(attention, states, there, self.kept, self.left)
        if request.fixed is None:
            return groups
        # decisions made beforehand say who leaves; what is left sums up those of its group among them
        return Groups(groups.kept, groups.left, there & ~request.fixed.all(0).to(there.device), groups.into)

    def to_dict(self) -> dict[str, Any]:
        """Return the shares, the temperature, whether it learns, and the target."""
        names = ("kept", "left", "temperature", "learns")
        return {name: getattr(self, name) for name in names} | {"target": self.target.to_dict()}


def group_tokens(attention: Tensor, states: Tensor, there: Tensor, kept: float, left: float) -> Groups:
    """Return which tokens are kept by rank, which are left of the rest, and which are merged into which of these.

    Args:
        attention: float32 (b t), by which tokens are ranked.
        states: (b t d), whose directions say how similar tokens are.
        there: bool (b t), the tokens in question.
        kept: share that is kept, rounded up.
        left: share that is left; with ``kept`` rounded up. With none left of some rest, it is merged into nothing.
    """
    chosen = strongest(attention, there, kept) if kept else torch.zeros_like(there)
    rest = there & ~chosen
    directions = normalize(states.float(), dim=-1) * rearrange(rest, "b t -> b t 1")
    likeness = torch.einsum("btd,bd->bt", directions, directions.sum(1))
    # those least like the others stay, as many as the two shares leave room for
    staying = strongest(torch.where(chosen, torch.inf, -likeness), there, min(1.0, kept + left)) & ~chosen
    merged = rest & ~staying
    pairs = torch.einsum("btd,bsd->bts", directions, directions)
    best = pairs.masked_fill(~rearrange(staying, "b s -> b 1 s"), -torch.inf).argmax(-1)
    own = torch.arange(there.shape[1], device=there.device).expand_as(best)
    into = torch.where(merged & staying.any(1, keepdim=True), best, own)
    return Groups(chosen, staying, merged, into)
