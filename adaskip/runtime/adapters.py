"""Adapters that heal what skipping breaks: low-rank updates of the layers that run, in routed passes alone.

    dense pass     x ──▶ W x                       bitwise the original model
    routed pass    x ──▶ W x + (alpha / rank) B A x

peft makes and names them. Every adapted module asks, each time it is called, how the calling thread's pass runs, so
that a dense pass in one thread and a routed one in another do not disturb each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from adaskip.backbone.weights import HEALING
from adaskip.errors import BackboneError, CheckpointError, ConfigError
from adaskip.runtime.lora import Lora

if TYPE_CHECKING:
    from adaskip.runtime.attach import RoutedModel

PREFIX = "adapters."
"""What names of adapters' weights begin with in files and checkpoints; no policy's weights have it."""
_BASE = "__base__"
"""What peft calls the module without any adapter."""


class Adapters:
    """Hold the adapters of one routed model.

    Args:
        model: attached; its backbone gets them.
        lora: what they are made of.
        seed: of their initial weights; an update is 0 until it is trained.

    Raises:
        ConfigError: peft is missing, the backbone has adapters of its own, or no module is called as asked.
    """

    def __init__(self, model: RoutedModel, lora: Lora, seed: int = 0) -> None:
        peft = _import_peft()
        self.lora, self.model = lora, model
        names = _find_targets(model, lora.targets)
        config = peft.LoraConfig(
            r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=sorted(names)
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            peft.LoraModel(model.backbone, config, HEALING)
        self.modules: dict[str, Any] = {name: model.backbone.get_submodule(name) for name in names}
        for module in self.modules.values():
            module.eval()
            module.register_forward_pre_hook(self._follow, with_kwargs=True)
        model.patches.undo.append(self.remove)  # which does nothing once they are off
        self._cost = model.runtime.cost
        model.runtime.cost = replace(self._cost, added=self._flops(names))

    def _follow(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Leave the adapter out where the calling thread's pass is dense, or of the frozen model on purpose."""
        request = self.model.runtime.request
        if request is None or (request.mode != "dense" and request.options.adapted):
            return None
        return args, {**kwargs, "adapter_names": [_BASE] * len(args[0])}

    def _flops(self, names: dict[str, int]) -> Tensor:
        """Return what the adapters at each site compute for a token, float64 (s)."""
        added = torch.zeros(len(self.model.sites), dtype=torch.float64)
        for name, layer in names.items():
            sizes = [self.modules[name].lora_A[HEALING].weight, self.modules[name].lora_B[HEALING].weight]
            added[self._site(layer, self.modules[name])] += 2 * sum(weight.numel() for weight in sizes)
        return added

    def _site(self, layer: int, module: nn.Module) -> int:
        """Return the site that a module leaves with: where no part of its layer has it, the layer's first."""
        first, *others = self.model.sites.of(layer)
        for site in others:
            parts = self.model.spec.sublayers[layer].modules(self.model.sites.part(site))
            if any(inner is module for part in parts for inner in part.modules()):
                return site
        return first

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield what is trained."""
        for module in self.modules.values():
            yield module.lora_A[HEALING].weight
            yield module.lora_B[HEALING].weight

    @contextmanager
    def dropping(self, seed: int) -> Iterator[None]:
        """Leave inputs out inside, as ``dropout`` says, drawn from this seed; other draws go on as if nothing was."""
        devices = {weight.device for weight in self.parameters() if weight.device.type == "cuda"}
        with torch.random.fork_rng(devices=sorted(devices, key=str)):
            torch.manual_seed(seed)
            for module in self.modules.values():
                module.lora_dropout.train()
            try:
                yield
            finally:
                for module in self.modules.values():
                    module.lora_dropout.eval()

    def state_dict(self) -> dict[str, Tensor]:
        """Return the weights, by the names that peft gives them in files, behind `PREFIX`."""
        return {
            f"{PREFIX}base_model.model.{name}.{part}.weight": getattr(module, part)[HEALING].weight.detach()
            for name, module in self.modules.items()
            for part in ("lora_A", "lora_B")
        }

    @torch.no_grad()
    def load_state_dict(self, weights: dict[str, Tensor]) -> None:
        """Take those weights of a checkpoint that `state_dict` gave.

        Raises:
            CheckpointError: weights of other modules or of another rank.
        """
        own, weights = self.state_dict(), {n: value for n, value in weights.items() if n.startswith(PREFIX)}
        wrong = sorted(own.keys() ^ weights.keys()) or [n for n in own if own[n].shape != weights[n].shape]
        if wrong:
            raise CheckpointError(
                f"adapters: expected {len(own)} weights of rank {self.lora.rank}, got {len(weights)}, which differ in "
                f"{wrong[0]}; they belong to another model or other settings"
            )
        for name, value in own.items():
            value.copy_(weights[name])

    @torch.no_grad()
    def merge(self) -> None:
        """Add the updates to the weights for good, which become tensors of their own, and take the adapters off.

        Raises:
            BackboneError: a weight is packed or quantised.
        """
        for name, module in self.modules.items():
            base = module.get_base_layer()
            if type(base.weight) is not nn.Parameter or not base.weight.is_floating_point():
                raise BackboneError(
                    f"adapters: {name}: expected a weight of floating-point numbers to merge into, got "
                    f"{type(base.weight).__name__} of {base.weight.dtype}; merge on the backbone as it was before it "
                    "was quantised"
                )
            merged = base.weight.float() + module.get_delta_weight(HEALING).float()
            base.weight = nn.Parameter(merged.to(base.weight.dtype), requires_grad=False)
        self.remove()

    def remove(self) -> None:
        """Give the backbone its own modules back, as they were; `RoutedModel.detach` does it too."""
        if self.model.adapters is not self:
            return
        for name, module in self.modules.items():
            parent, _, key = name.rpartition(".")
            setattr(self.model.backbone.get_submodule(parent), key, module.get_base_layer())
        self.model.backbone.__dict__.pop("peft_config", None)
        self.model.runtime.cost = self._cost
        self.model.adapters, self.modules = None, {}


def adapt(model: RoutedModel, lora: Lora | None = None, seed: int = 0) -> Adapters:
    """Put adapters on the layers of a routed model; they change nothing until they are trained.

    Inside `RoutedModel.dense` the model is bitwise the original. `RoutedModel.save_pretrained` saves them beside the
    policy, ``from_pretrained`` brings them back, `RoutedModel.detach` takes them off. Certificate and gauge are void.

    Args:
        model: attached, with any policy.
        lora: what they are made of; None: ``Lora()``.
        seed: of their initial weights.

    Raises:
        ConfigError: the model has adapters already, or the backbone has; peft is missing; no module is called as asked.
    """
    model._check_attached()
    if model.adapters is not None:
        raise ConfigError("adapt: this model has adapters already; model.adapters.remove() takes them off")
    if getattr(model.backbone, "peft_config", None):
        raise ConfigError(
            "adapt: the backbone has adapters of its own, which would be trained and saved as the policy's; merge them "
            "first (merge_and_unload), then attach again"
        )
    model.adapters = Adapters(model, Lora() if lora is None else lora, seed)
    model.certificate = model.gauge = None
    return model.adapters


def trained_adapters(model: RoutedModel) -> list[nn.Parameter]:
    """Return the weights of a model's adapters that ask for gradients; none where it has no adapters."""
    return [] if model.adapters is None else [weight for weight in model.adapters.parameters() if weight.requires_grad]


def _import_peft() -> Any:
    try:
        import peft
    except ImportError:
        raise ConfigError("adapt: adapters need peft; type: pip install 'adaskip[peft]'") from None
    return peft


def _find_targets(model: RoutedModel, asked: tuple[str, ...]) -> dict[str, int]:
    """Return the full names of the modules to adapt, and the layer that each belongs to.

    A layer that a plan leaves out for every token stays as it is: what never runs learns nothing.

    Raises:
        ConfigError: no module is called as asked.
    """
    plan, target = model.runtime.known, model.target
    leaves = plan is not None and (target.unit, target.group, target.phase) == ("block", "all", "both")
    runs = plan.tolist() if plan is not None and leaves else [True] * len(model.spec.layers)
    layers = {
        id(part): index
        for index, layer in enumerate(model.spec.layers)
        for part in layer.modules()
        if runs[index] or index in model.policy.held
    }
    linear = {
        name: layers[id(part)]
        for name, part in model.backbone.named_modules()
        if id(part) in layers and isinstance(part, nn.Linear | Conv1D)
    }
    found = {name: layer for name, layer in linear.items() if not asked or name.split(".")[-1] in asked}
    missing = set(asked) - {name.split(".")[-1] for name in linear}
    if missing or not found:
        known = ", ".join(sorted({name.split(".")[-1] for name in linear})) or "none"
        raise ConfigError(
            f"Lora: targets: expected some of {known}, got {', '.join(sorted(missing)) or 'none of them'}"
        )
    return found
