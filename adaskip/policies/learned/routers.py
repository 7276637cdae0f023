"""The learned policy: every layer's router looks at the prompt, or at each token, and gives a logit."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn

from adaskip.backbone.inspect import BackboneSpec
from adaskip.errors import ConfigError
from adaskip.policies.features import directions, mean_weights, pool, without_first
from adaskip.policies.learned.config import RouterConfig
from adaskip.policies.learned.heads import build_heads
from adaskip.policy import Policy
from adaskip.sites import Sites, read_sites

if TYPE_CHECKING:
    from adaskip.runtime.request import Request


class Learned(Policy):
    """Decide by one router a site, trained by `adaskip.RouterTuner` or fitted from bounds.

    Of unit ``sublayers`` a layer has two, one for its attention and one for its MLP: each is trained, held and started
    by itself, as every other is, and what they look at is read once for both.

    Args:
        config: what they decide and how they are built; default `RouterConfig()`.
        **fields: those of `RouterConfig`, in its place: ``Learned(group="vision")``.
    """

    kind: ClassVar[str] = "learned"
    needs: ClassVar[str] = "labels"

    def __init__(self, config: RouterConfig | None = None, **fields: Any) -> None:
        config = RouterConfig.from_dict(fields) if config is None else replace(config, **fields)
        super().__init__(config)
        self.config = config
        self.threshold, self.held = config.threshold, read_sites(config.unit, config.held)
        self.heads = nn.ModuleList()
        self.sites: Sites = config.sites(0)

    def build(self, spec: BackboneSpec, seed: int) -> None:
        """Make one head a site: the same for the same seed, whatever else drew random numbers before.

        Raises:
            ConfigError: the model does not have the layer ``entry``.
        """
        config, layers = self.config, len(spec.layers)
        if config.entry is not None and config.entry >= layers:
            raise ConfigError(f"RouterConfig: entry: expected a layer 0 to {layers - 1}, got {config.entry}")
        kinds = 1  # under scope token a head sees one token
        if self.target.scope == "prompt":
            kinds += bool(spec.vision_ids)  # text and vision are pooled apart
            kinds += config.features != "mean"  # the last token, beside them
        standard = config.features == "standardised"
        self.sites = self.target.sites(layers)
        self.heads = build_heads(len(self.sites), spec.width, kinds, config.hidden, config.keep_bias, seed, standard)
        self.to(spec.device)

    def decide(self, layer: int, states: Tensor, request: Request) -> Tensor:
        """Return float32 logits (b), or (b t) under scope ``token``, from states that carry no gradient."""
        with torch.autocast(states.device.type, enabled=False):
            logits: Tensor = self.heads[layer](self._seen(self.sites.layer(layer), states, request))
        return logits if request.deciding is None else logits.view(len(states), -1)

    def _seen(self, layer: int, states: Tensor, request: Request) -> Tensor:
        """Return what the heads of a layer read, made once for all of them, and from the entry on once for all."""
        entry, memo = self.config.entry, request.memo
        if entry is not None and layer > entry:
            seen: Tensor = memo["entry"]
            return seen
        if memo.get("layer") != layer:
            memo["layer"], memo["seen"] = layer, self._see(states.detach(), request)
        if layer == entry:
            memo["entry"] = memo["seen"]
        return memo["seen"]  # type: ignore[no-any-return]

    def _see(self, states: Tensor, request: Request) -> Tensor:
        """Return what a head reads of states (b t d): float32 (b k d), or (b*t 1 d) under scope ``token``."""
        if request.deciding is not None:
            # a token that does not decide may hold anything, NaN included
            clean = states.masked_fill(~rearrange(request.deciding, "b t -> b t 1"), 0.0).float()
            return rearrange(clean, "b t d -> (b t) 1 d")
        mean = self.config.features == "mean"
        if "weights" not in request.memo:  # the same for every layer of the request
            masks = request.tokens.kinds(request.prompt)
            weights = mean_weights(masks if mean else without_first(masks, request.prompt & request.tokens.valid))
            request.memo["weights"] = weights, bool((weights == 0).all(1).any())
        return pool(states if mean else directions(states), *request.memo["weights"])

    def to_dict(self) -> dict[str, Any]:
        """Return the fields of the `RouterConfig`, but for what may change after training."""
        values = self.config.to_dict()
        return {name: value for name, value in values.items() if name not in ("threshold", "held")}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Learned:
        """Make routers, untrained until their weights are loaded, from what `to_dict` gave.

        Files from before there were ``features`` hold routers that read the mean.

        Raises:
            ConfigError: a value outside its set or range.
        """
        return cls(RouterConfig.from_dict({"features": "mean"} | values if isinstance(values, dict) else values))
