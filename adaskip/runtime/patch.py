"""Change a Hugging Face model so that it follows a policy, and take every change back."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from adaskip.errors import BackboneError, DataError
from adaskip.runtime.arguments import check_options, name_arguments
from adaskip.runtime.cache import SkipCache
from adaskip.runtime.execute import Executor
from adaskip.runtime.forward import Runtime
from adaskip.runtime.handle import Handle
from adaskip.runtime.sight import Sight

MARK = "_adaskip"
"""The attribute by which a routed model knows its runtime."""
PATCHES = "_adaskip_patches"
"""The attribute by which it knows what was changed of it, in a copy too, which has no handle."""

_MIXED = ("adapter_names", "alora_offsets")
"""What PEFT hands its layers for each row of a batch, from outside the model's arguments."""


class RoutedForward:
    """Replace the forward of a module. An object, so that it is copied and pickled together with its module.

    Args:
        module: a decoder layer, or a sublayer of one.
        executor: what runs it under a decision.
        runtime: what all patched modules of one model share.
        whole: whether it is the layer itself.
    """

    def __init__(self, module: nn.Module, executor: Executor, runtime: Runtime, whole: bool) -> None:
        self.module, self.executor, self.whole = module, executor, whole
        self.runtime: Runtime | None = runtime
        self.inner = module.__dict__.get("forward")  # one that the module had before: a hook of accelerate, compiled
        module.forward = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module as its runtime says, or plainly once it is taken off."""
        call = self.inner or partial(type(self.module).forward, self.module)
        if self.runtime is None:
            return call(*args, **kwargs)
        if self.whole:
            return self.runtime.run(self.executor.index, self.module, call, args, kwargs)
        return self.runtime.run_sublayer(self.executor, self.module, call, args, kwargs)

    def take_off(self) -> None:
        """Give the module its own forward back."""
        self.runtime = None  # whoever wrapped this forward since goes on calling it
        if self.module.__dict__.get("forward") is not self:
            return
        del self.module.__dict__["forward"]
        if self.inner is not None:
            self.module.forward = self.inner


class RoutedGenerate:
    """Replace ``generate`` of a model, whoever calls it: the handle, a pipeline, a PEFT model around the backbone.

    It tells the routers where the prompt ends. A pass that reads the whole sequence without a cache cannot know.

    Args:
        model: the Hugging Face object.
        runtime: what its patched modules share.
    """

    def __init__(self, model: PreTrainedModel, runtime: Runtime) -> None:
        self.model = model
        self.runtime: Runtime | None = runtime
        self.inner = model.__dict__.get("generate")  # one that somebody had put there before
        model.generate = self  # type: ignore[assignment]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Generate along the routing of the prompt, or plainly once it is taken off.

        Raises:
            ConfigError: an option that would let routers see only a part of the prompt, or another prompt beside it.
        """
        call = self.inner or partial(type(self.model).generate, self.model)  # type: ignore[attr-defined]
        if self.runtime is None:
            return call(*args, **kwargs)
        options = name_arguments(type(self.model).generate, args, kwargs, "model.generate")  # type: ignore[attr-defined]
        dense = self.runtime.mode == "dense"
        if not dense:
            check_options(self.model, options)
        ids = options.get("input_ids", options.get("inputs"))
        prompt = ids if options.get("inputs_embeds") is None else options["inputs_embeds"]
        with (
            torch.no_grad(),
            self.runtime.state.using(
                mode="dense" if dense else "skip",
                prompt_mask=None,
                prompt_length=None if prompt is None else prompt.shape[1],
                prompt_ids=ids,
                tower=[],
            ),
        ):
            return call(**options)

    def take_off(self) -> None:
        """Give the model its own ``generate`` back."""
        self.runtime = None
        if self.model.__dict__.get("generate") is not self:
            return
        del self.model.__dict__["generate"]
        if self.inner is not None:
            self.model.generate = self.inner


class Patches:
    """Hold everything that attach changed of one model.

    Weights are remembered by the module that owns them: offloading and quantising put other tensors in their place,
    adapters move the module. What somebody else has changed since stays as they left it.

    Args:
        model: the Hugging Face object; it is frozen and put in ``eval()``.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.names = {name for name, _ in model.named_parameters()}
        self.frozen = [
            (module, key)
            for module in model.modules()
            for key, weight in module.named_parameters(recurse=False)
            if weight.requires_grad
        ]
        self.calmed = [module for module in model.modules() if module.training]
        self.forwards: list[RoutedForward] = []
        self.generate: RoutedGenerate | None = None
        self.handles: list[Any] = []
        self.undo: list[Callable[[], None]] = []  # what else was put into the model, taken out again
        self.places: dict[nn.Module, tuple[nn.Module, str]] = {}
        model.requires_grad_(False).eval()

    def install(self, runtime: Runtime) -> None:
        """Let every decoder layer, or what of it is routed, follow the runtime."""
        for index, layer in enumerate(runtime.spec.layers):
            self.forwards.append(RoutedForward(layer, runtime.layers[index], runtime, whole=True))
            for module, executor in runtime.sublayers(index):
                self.forwards.append(RoutedForward(module, executor, runtime, whole=False))
        if hasattr(type(self.model), "generate"):
            self.generate = RoutedGenerate(self.model, runtime)
        setattr(self.model, MARK, runtime)
        setattr(self.model, PATCHES, self)
        self.places = {
            child: (parent, key) for parent in self.model.modules() for key, child in parent._modules.items() if child
        }
        self.handles = [
            self.model.register_forward_pre_hook(self._open, with_kwargs=True),
            self.model.register_forward_hook(_close, with_kwargs=True, always_call=True),
            *(Sight(runtime).install() if runtime.policy.sees else ()),
        ]

    def _open(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Open a request before the model's own forward, once all of its patches are still in place."""
        runtime: Runtime = getattr(model, MARK)
        for forward in self.forwards:
            self._check(forward)
        gathers = runtime.mode == "skip" and (runtime.known is None or runtime.target.partial)
        if gathers and "peft" in sys.modules and not _continues(kwargs):
            _check_unmixed(model)
        return (), runtime.open(name_arguments(type(model).forward, args, kwargs, "model"))

    def _check(self, forward: RoutedForward) -> None:
        """Refuse to run what somebody has taken out of the routing since attach; wrapping it is fine."""
        module = forward.module
        parent, key = self.places[module]
        # part of a sublayer's result would bypass the decision, if an adapter stood around it now
        moved = not forward.whole and parent._modules.get(key) is not module
        current = module.__dict__.get("forward")
        own = getattr(current, "__func__", None) is type(module).forward  # given back by whoever had wrapped it before
        if moved or own or current is None or current is forward.inner:
            change = f"was put into a {type(parent._modules.get(key)).__name__}" if moved else "got another forward"
            raise BackboneError(
                f"decoder layer {forward.executor.index}: its {type(module).__name__} {change} after adaskip was "
                "attached, and would not follow the routing; detach() and attach again"
            )

    def take_off(self) -> None:
        """Restore forwards, and what trained, unless somebody has decided anew what trains since attach."""
        while self.undo:
            self.undo.pop()()
        for forward in self.forwards:
            forward.take_off()
        if self.generate is not None:
            self.generate.take_off()
        for handle in self.handles:
            handle.remove()
        for mark in (MARK, PATCHES):
            self.model.__dict__.pop(mark, None)
        weights = dict(self.model.named_parameters())
        adapted = not self.names >= weights.keys()  # an adapter was put in, and decides what trains
        if not adapted and not any(weight.requires_grad for weight in weights.values()):
            for module, key in self.frozen:
                if (weight := module._parameters.get(key)) is not None:
                    weight.requires_grad_(True)
        if not adapted and not any(module.training for module in self.model.modules()):
            for module in self.calmed:
                module.training = True


def _close(model: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    """Close the request after the model's own forward, also one that raised: there is no output then."""
    output = getattr(model, MARK).complete(output)
    values = output if isinstance(output, tuple) else (getattr(output, "logits", None),)
    logits = next((x for x in values if isinstance(x, Tensor) and x.dim() == 3), None)  # (b t v); a loss has no axes
    getattr(model, MARK).close(failed=output is None, heads=0 if logits is None else logits.shape[1])
    return output


def _continues(kwargs: dict[str, Any]) -> bool:
    """Return whether this call goes on with a request, whose first call has been checked already."""
    return isinstance(kwargs.get("past_key_values"), SkipCache) and kwargs["past_key_values"].length > 0


def _check_unmixed(model: nn.Module) -> None:
    """Refuse rows that go through adapters of their own: a layer that some rows skip would give them to others.

    Raises:
        DataError: PEFT has been given something for each row.
    """
    option = ""
    for module in model.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            named = hook.keywords if isinstance(hook, partial) else {}
            if name := next((name for name in _MIXED if named.get(name) is not None), ""):
                option = name
                # PEFT takes its hooks back at the end of a call, but not of one that fails, as this one will
                module._forward_pre_hooks.pop(key)
                module._forward_pre_hooks_with_kwargs.pop(key, None)
    if option:
        raise DataError(
            f"{option}: expected one adapter for all rows, since rows that skip a layer would shift the others to the "
            "wrong adapters; choose one with set_adapter and call once for each, or ask inside model.dense()"
        )


def detach(model: Any) -> PreTrainedModel:
    """Take adaskip off a model and return the Hugging Face object, also where no `RoutedModel` is at hand.

    A copy of ``routed.backbone`` is such a model. Does what ``RoutedModel.detach()`` does.

    Args:
        model: the Hugging Face object, a PEFT model around it, or a `RoutedModel`.

    Raises:
        BackboneError: it carries no adaskip.
    """
    inner = model.backbone if isinstance(model, Handle) else unwrap(model)
    patches = getattr(inner, PATCHES, None)
    if patches is None:
        raise BackboneError(f"detach: {type(inner).__name__} carries no adaskip, so nothing can be taken off")
    patches.take_off()
    return inner


def unwrap(model: Any) -> PreTrainedModel:
    """Return the Hugging Face object inside a PEFT model, or the object itself.

    Raises:
        BackboneError: it is neither; names the Hugging Face object inside it, if there is one.
    """
    if isinstance(model, PreTrainedModel) or not isinstance(model, nn.Module):
        return model  # what is no module at all is refused when it is inspected
    path, inner = next(((p, m) for p, m in model.named_modules() if isinstance(m, PreTrainedModel)), ("", None))
    if inner is None:
        return model  # type: ignore[return-value]
    kind, name = type(model).__name__, type(inner).__name__
    peft = sys.modules.get("peft")
    if peft is None or not isinstance(model, (peft.PeftModel, peft.PeftMixedModel)):
        raise BackboneError(
            f"expected a transformers PreTrainedModel, got {kind} around {name}; "
            f"attach to the model inside: adaskip.attach(model.{path})"
        )
    configs = model.peft_config.values()
    if prompts := sorted({str(config.peft_type.value) for config in configs if config.is_prompt_learning}):
        raise BackboneError(
            f"{kind} around {name}: {', '.join(prompts)} puts tokens or keys of its own before the prompt, outside the "
            "model, which no router would see; expected adapters of the weights, such as LoRA"
        )
    return inner
