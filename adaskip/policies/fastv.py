"""FastV: behind an early layer, the vision tokens that the end of the prompt attends to least take part no more.

layer      0 1 | 2 3 4 5 ...        layer = 2, share = 0.5
patch 1    # # | # # # # ...        what the last prompt token attends to in layer 1 ranks the patches;
patch 2    # # | . . . . ...        half of them, those that it attends to least, leave every layer behind,
text       # # | # # # # ...        and their keys are gone there as well
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from adaskip.backbone.attention import AttentionCall
from adaskip.backbone.inspect import BackboneSpec
from adaskip.errors import ConfigError
from adaskip.plan import Target
from adaskip.policy import Policy

if TYPE_CHECKING:
    from adaskip.runtime.request import Request


class FastV(Policy):
    """Drop a share of the vision tokens behind one layer, by attention (arXiv 2403.06764); nothing is trained.

    Of a prompt that is read in chunks, the last token of each chunk ranks the patches of that chunk.

    Args:
        layer: the first layer that dropped tokens leave; the one before it ranks them.
        share: of each input's vision tokens that stay, rounded up.
        target: of scope ``token``, group ``vision``, unit ``block``, keys absent.

    Raises:
        ConfigError: a value outside its range, or another target.
    """

    kind: ClassVar[str] = "fastv"

    def __init__(self, layer: int = 2, share: float = 0.5, target: Target | None = None) -> None:
        super().__init__(target or Target(scope="token", group="vision"))
        self.layer, self.share = layer, share
        faults = []
        if isinstance(layer, bool) or not isinstance(layer, int) or layer < 1:
            faults.append(f"layer: expected a layer of at least 1, which has one before it, got {layer!r}")
        if isinstance(share, bool) or not (isinstance(share, int | float) and 0 < share <= 1):
            faults.append(f"share: expected a share in (0, 1], got {share!r}")
        own, wanted = self.target, {"scope": "token", "group": "vision", "unit": "block", "kv": "absent"}
        if wrong := [f"{name}={value!r}" for name, value in wanted.items() if getattr(own, name) != value]:
            faults.append(f"target: expected {', '.join(wrong)}; single vision tokens leave whole layers")
        if faults:
            raise ConfigError("FastV: " + "; ".join(faults))

    @property
    def reads(self) -> tuple[int, ...]:
        """Return the layer whose attention ranks the vision tokens."""
        return (self.layer - 1,)

    def build(self, spec: BackboneSpec, seed: int) -> None:
        """Check that the model has the layer.

        Raises:
            ConfigError: it does not.
        """
        if self.layer >= len(spec.layers):
            raise ConfigError(f"FastV: layer: expected 1 to {len(spec.layers) - 1}, got {self.layer}")

    def attend(self, layer: int, call: AttentionCall, request: Request) -> None:
        """Rank the vision tokens by what the last prompt token of each row attends to, mean over heads."""
        deciding = request.deciding
        if deciding is None or not bool(deciding.any()):
            return
        last = last_place(request.prompt)
        queries, which = last.unique(return_inverse=True)
        weights = call.weights(queries).mean(1)  # (b c k)
        seen = weights[torch.arange(len(last), device=last.device), which][:, -deciding.shape[1] :]
        request.memo["stays"] = strongest(seen, deciding, self.share)

    def decide(self, layer: int, states: Tensor, request: Request) -> Tensor:
        """Return bool (b t): every token in the first layers, then those that stay."""
        everything = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
        if layer < self.layer or "stays" not in request.memo:
            return everything
        stays: Tensor = request.memo["stays"]
        return stays.to(states.device)

    def to_dict(self) -> dict[str, Any]:
        """Return the layer, the share and the target."""
        return {"layer": self.layer, "share": self.share, "target": self.target.to_dict()}


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
