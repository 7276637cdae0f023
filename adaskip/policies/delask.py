"""DeLask: where a deep layer takes back what the layer before it added, its result is drawn back to what entered it.

    token of a deep layer       update before   update here      cosine     what goes on
    the two agree               ->              ->                  .9      the layer's result
    the second takes back       ->              <-                 -.7      (1 - alpha) result + alpha what entered

It is about the quality of answers, not about compute: every layer is computed for every token, and nothing is saved.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from adaskip.backbone.inspect import BackboneSpec
from adaskip.errors import ConfigError
from adaskip.plan import Target
from adaskip.policy import Policy

if TYPE_CHECKING:
    from adaskip.runtime.request import Request


class DeLask(Policy):
    """Blend a token's result of a deep layer with what entered it, where it works against the layer before.

    The method of arXiv 2606.00819, whose coefficient and range of layers are not published: both are ours. Of two
    neighbouring layers the updates are compared that really took place, blended or not. It saves no compute.

    Args:
        alpha: share of what entered the layer in what goes on, in [0, 1]; with 0 the model is as it came.
        first: the first layer whose result may be blended, at least 1; None: the first of the deeper half.
        target: of scope ``prompt``, unit ``block``, keys absent. Its group and phase say which tokens are blended.

    Raises:
        ConfigError: a value outside its range, or another target.
    """

    kind: ClassVar[str] = "delask"

    def __init__(self, alpha: float = 0.5, first: int | None = None, target: Target | None = None) -> None:
        super().__init__(target)
        self.alpha, self.first = alpha, first
        self.layers = 0
        faults = []
        if isinstance(alpha, bool) or not (isinstance(alpha, int | float) and 0 <= alpha <= 1):
            faults.append(f"alpha: expected a share in [0, 1], got {alpha!r}")
        if first is not None and (isinstance(first, bool) or not isinstance(first, int) or first < 1):
            faults.append(f"first: expected a layer of at least 1, which has one before it, got {first!r}")
        wanted = {"scope": "prompt", "unit": "block", "kv": "absent"}
        if wrong := [f"{name}={value!r}" for name, value in wanted.items() if getattr(self.target, name) != value]:
            faults.append(f"target: expected {', '.join(wrong)}; no token leaves a layer")
        if faults:
            raise ConfigError("DeLask: " + "; ".join(faults))

    def build(self, spec: BackboneSpec, seed: int) -> None:
        """Note how many layers there are.

        Raises:
            ConfigError: the model does not have the first layer.
        """
        self.layers = len(spec.layers)
        if self.first is not None and self.first >= self.layers:
            raise ConfigError(f"DeLask: first: expected a layer 1 to {self.layers - 1}, got {self.first}")

    def known(self, layers: int) -> Tensor:
        """Return bool (l): every layer runs."""
        return torch.ones(layers, dtype=torch.bool)

    @property
    def amends(self) -> range:
        """Return the layers whose results may be blended."""
        return range(max(1, self.layers // 2) if self.first is None else self.first, self.layers)

    def amend(self, layer: int, earlier: Tensor, before: Tensor, after: Tensor, request: Request) -> Tensor:
        """Return the layer's result, blended where its update points against the update of the layer before."""
        update = before.float() - earlier.float()
        against = (update * (after.float() - before.float())).sum(-1, keepdim=True) < 0  # the sign of the cosine
        return torch.where(against, torch.lerp(after, before.to(after.dtype), self.alpha), after)

    def to_dict(self) -> dict[str, Any]:
        """Return the coefficient, the first layer and the target."""
        return {"alpha": self.alpha, "first": self.first, "target": self.target.to_dict()}
