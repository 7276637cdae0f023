"""A few fixed paths, and a predictor of what each would cost a prompt: every prompt takes the best bargain.

    layer    0 1 2 | 3 4 5 6 7 ...                      entry = 3
    path A   # # # | # # # # #                          what a prompt shows before layer 3 says which
    path B   # # # | . # # . #                          of them it takes; nothing is decided later
    path C   # # # | . . # . .

Paths may leave out few layers or many. What a prompt takes is the one with the least predicted cost, in nats, plus a
price for the compute that it needs: a prompt that hardly needs its layers goes far, one that needs them all stays
dense, and the price sets the mean. Each path is a static subnetwork: prompts that go the same way can be decoded as one
batch, or served by a plain model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from adaskip.backbone.inspect import BackboneSpec
from adaskip.errors import ConfigError
from adaskip.plan import Target
from adaskip.policies.features import describe_prompt
from adaskip.policy import Policy
from adaskip.sites import Label, read_sites

if TYPE_CHECKING:
    from adaskip.runtime.request import Request


class PathBank(Policy):
    """Choose one of several paths for each prompt, by what each is predicted to cost it.

    Made by `adaskip.survey.bank.find_bank`. As it comes, without a fit, every prompt takes the first path.

    Args:
        paths: the layers that each path leaves out, or halves of them.
        entry: the choice falls before this layer; every earlier one runs on all paths.
        target: its scope is ``prompt``.
        price: nats per predicted token that all of the dense decoder's FLOPs are worth; 0: cost alone decides.
        nats: instead of a price, what a prompt may cost: it takes the lightest path whose predicted cost, times the
            certificate's factor ``kappa``, is no more, and the one predicted to cost least where none is.

    Raises:
        ConfigError: no path, one that leaves out a layer before the entry, scope ``token``, a price or nats below 0, or
            both.
    """

    kind: ClassVar[str] = "path_bank"
    needs: ClassVar[str] = "answers"
    keep: Tensor  # bool (k s)
    share: Tensor  # float32 (k), of the dense decoder's FLOPs that each path needs
    centre: Tensor  # float32 (f), of the features
    weight: Tensor  # float32 (f k)
    bias: Tensor  # float32 (k)
    kappa: Tensor  # float32 (), the certificate's factor

    def __init__(
        self,
        paths: Sequence[Sequence[Label]],
        entry: int = 3,
        target: Target | None = None,
        *,
        price: float = 0.0,
        nats: float | None = None,
    ) -> None:
        super().__init__(target)
        try:
            self.paths = tuple(self.target.read_labels(path) for path in paths)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"PathBank: paths: expected a list of layer numbers for each ({error})") from None
        self.entry, self.price, self.nats, self.sites = entry, price, nats, self.target.sites(0)
        faults = [] if self.paths else ["paths: expected at least one, got none"]
        if early := self.target.sites(entry).split(self.paths)[0]:
            faults.append(f"paths: layers {early} stand before entry={entry}, where every layer runs; lower the entry")
        if not (isinstance(price, int | float) and 0 <= price < float("inf")):
            faults.append(f"price: expected nats, 0 or more, got {price!r}")
        if nats is not None and (price or not (isinstance(nats, int | float) and nats >= 0)):
            faults.append(f"nats: expected 0 or more, and no price beside it, got nats={nats!r} and price={price!r}")
        if self.target.scope == "token":
            faults.append("target: expected scope 'prompt', got 'token'; a path is a whole prompt's")
        if faults:
            raise ConfigError("PathBank: " + "; ".join(faults))

    def build(self, spec: BackboneSpec, seed: int) -> None:
        """Make the predictor, which knows nothing yet: all costs are equal, and the first path is taken.

        Raises:
            ConfigError: a path names a layer that the model does not have, or the entry is not inside it.
        """
        layers, features = len(spec.layers), 2 * spec.width
        self.sites = self.target.sites(layers)
        _, wrong = self.sites.split(self.paths)
        if wrong or not 0 <= self.entry < layers:
            named = f"layers {wrong} of paths" if wrong else f"entry={self.entry}"
            raise ConfigError(f"PathBank: {named}: the model has {layers} layers, 0 to {layers - 1}")
        keep = torch.ones(len(self.paths), len(self.sites), dtype=torch.bool)
        for row, path in zip(keep, self.paths, strict=True):
            row[list(read_sites(self.target.unit, path))] = False
        self.register_buffer("keep", keep.to(spec.device), persistent=False)
        self.register_buffer("share", torch.ones(len(self.paths), device=spec.device))
        self.register_buffer("centre", torch.zeros(features, device=spec.device))
        self.register_buffer("weight", torch.zeros(features, len(self.paths), device=spec.device))
        self.register_buffer("bias", torch.zeros(len(self.paths), device=spec.device))
        self.register_buffer("kappa", torch.ones((), device=spec.device))

    def predict(self, features: Tensor) -> Tensor:
        """Return what each path will cost, nats per predicted token, float32 (b k), from `describe_prompt`'s (b f)."""
        return ((features - self.centre) @ self.weight + self.bias).exp()

    def choose(self, costs: Tensor) -> Tensor:
        """Return the path that each prompt takes, long (b), given what each path will cost it (b k)."""
        if self.nats is None:
            return (costs + self.price * self.share).argmin(1)
        allowed = self.kappa * costs <= self.nats
        lightest = self.share.expand_as(costs).masked_fill(~allowed, torch.inf).argmin(1)
        return torch.where(allowed.any(1), lightest, costs.argmin(1))

    def decide(self, layer: int, states: Tensor, request: Request) -> Tensor:
        """Return bool (b): what the chosen path says of this layer; the choice falls once a request."""
        if self.sites.layer(layer) < self.entry:
            return torch.ones(len(states), dtype=torch.bool, device=states.device)
        if "path" not in request.memo:
            request.memo["path"] = self.choose(self.predict(describe_prompt(states, request.prompt)))
        return self.keep[request.memo["path"], layer]

    def to_dict(self) -> dict[str, Any]:
        """Return the paths, the entry, the price or the nats, and the target."""
        return {
            "paths": [list(path) for path in self.paths],
            "entry": self.entry,
            "price": self.price,
            "nats": self.nats,
            "target": self.target.to_dict(),
        }
