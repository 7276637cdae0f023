"""The learned policy: every layer's router looks at the prompt, or at each token, and gives a logit."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn

from adaskip.backbone.inspect import BackboneSpec
from adaskip.policies.learned.config import RouterConfig
from adaskip.policies.learned.features import mean_weights, pool
from adaskip.policies.learned.heads import build_heads
from adaskip.policy import Policy

if TYPE_CHECKING:
    from adaskip.runtime.request import Request


class Learned(Policy):
    """Decide by one router a layer, trained by `adaskip.RouterTuner` or fitted from bounds.

    Args:
        config: what they decide and how they are built; default `RouterConfig()`.
        **fields: those of `RouterConfig`, in its place: ``Learned(group="vision")``.
    """

    kind: ClassVar[str] = "learned"

    def __init__(self, config: RouterConfig | None = None, **fields: Any) -> None:
        config = RouterConfig.from_dict(fields) if config is None else replace(config, **fields)
        super().__init__(config)
        self.config = config
        self.threshold, self.held = config.threshold, config.held
        self.heads = nn.ModuleList()

    def build(self, spec: BackboneSpec, seed: int) -> None:
        """Make one head a layer: the same for the same seed, whatever else drew random numbers before."""
        # text and vision are pooled apart; under scope token a head sees one token, which is of one kind
        kinds = 2 if spec.vision_ids and self.target.scope == "prompt" else 1
        self.heads = build_heads(len(spec.layers), spec.width, kinds, self.config.hidden, self.config.keep_bias, seed)
        self.to(spec.device)

    def decide(self, layer: int, states: Tensor, request: Request) -> Tensor:
        """Return float32 logits (b), or (b t) under scope ``token``, from states that carry no gradient."""
        if request.deciding is not None:
            # a token that does not decide may hold anything, NaN included
            clean = states.detach().masked_fill(~rearrange(request.deciding, "b t -> b t 1"), 0.0).float()
            with torch.autocast(states.device.type, enabled=False):
                each: Tensor = self.heads[layer](rearrange(clean, "b t d -> (b t) 1 d"))
            return each.view(len(states), -1)
        if "weights" not in request.memo:  # the same for every layer of the request
            weights = mean_weights(request.tokens.kinds(request.prompt))
            request.memo["weights"] = weights, bool((weights == 0).all(1).any())
        with torch.autocast(states.device.type, enabled=False):
            logit: Tensor = self.heads[layer](pool(states.detach(), *request.memo["weights"]))
        return logit

    def to_dict(self) -> dict[str, Any]:
        """Return the fields of the `RouterConfig`, but for what may change after training."""
        values = self.config.to_dict()
        return {name: value for name, value in values.items() if name not in ("threshold", "held")}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Learned:
        """Make routers, untrained until their weights are loaded, from what `to_dict` gave.

        Raises:
            ConfigError: a value outside its set or range.
        """
        return cls(RouterConfig.from_dict(values))
