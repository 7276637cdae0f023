"""Routed models of every architecture, rows to run them on, and what a routing must leave the same."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from adaskip.backbone.inspect import inspect_backbone
from adaskip.policies.learned.config import RouterConfig
from adaskip.runtime.attach import RoutedModel, attach
from adaskip.sites import Part, Sites, Unit
from tests import families
from tests.families import IMAGE, LAYERS, Toy

LENGTHS = [5, 9, 3, 9, 7]
GREEDY = {"do_sample": False, "suppress_tokens": [*range(2, 16)]}  # a random model would write placeholders of pictures


def routed(name: str, group: str, attention: str = "sdpa") -> tuple[Toy, RoutedModel]:
    """A small model whose routers really decide, differently for each row."""
    toy = families.make(name, attention)
    return toy, decide(attach(toy.model, RouterConfig(group=group)))


def decide(model: RoutedModel) -> RoutedModel:
    """Give routers weights that make them differ."""
    torch.default_generator.manual_seed(1)
    for head in model.routers:
        for weight, spread in ((head.outer.weight, 3.0), (head.outer.bias, 0.3)):
            weight.data.copy_(nn.init.normal_(torch.empty(weight.shape), std=spread))  # the same on every device
    return model


def some_keep(batch: int, unit: Unit = "block") -> Tensor:
    """bool (s b): mixed, with a site nobody runs, first, and one that everybody runs."""
    keep = torch.rand(len(Sites(unit, LAYERS)), batch, generator=torch.Generator().manual_seed(3)) > 0.5
    keep[0], keep[2] = False, True
    return keep


def real(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return logits[batch["attention_mask"].bool()]


def text_tokens(batch: dict[str, Tensor]) -> Tensor:
    """bool (b t): real tokens that stand for no picture."""
    return (batch["input_ids"] != IMAGE) & batch["attention_mask"].bool()


def caches(toy: Toy) -> bool:
    return "past_key_values" in inspect.signature(type(toy.model).forward).parameters


@torch.no_grad()
def slot_bytes(toy: Toy) -> list[int]:
    """Bytes that one token takes in each layer of a plain cache."""
    row = toy.batch([4])
    cache = toy.model(**row, use_cache=True).past_key_values
    cache = getattr(cache, "self_attention_cache", cache)
    sizes = [x.keys.numel() * x.keys.element_size() + x.values.numel() * x.values.element_size() for x in cache.layers]
    return [size // layer.keys.shape[-2] for size, layer in zip(sizes, cache.layers, strict=True)]


@contextmanager
def count_tokens(layer: nn.Module) -> Iterator[dict[nn.Module, list[int]]]:
    """Tokens that go through each leaf module of a layer, in the order in which they are first called."""
    seen: dict[nn.Module, list[int]] = {}

    def hook(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        seen.setdefault(module, []).append(args[0].shape[0] * args[0].shape[1])

    leaves = [module for module in layer.modules() if not list(module.children())]
    handles = [module.register_forward_hook(hook) for module in leaves]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def same_both_ways(model: RoutedModel, batch: dict[str, Tensor], **more: Any) -> Tensor:
    """Skipping equals the soft mix and cached equals uncached; returns the logits."""
    with torch.no_grad():
        skipped = model(**batch, **more).logits
        with model.soft():
            soft = model(**batch, **more).logits
    assert skipped.isfinite().all()
    assert (real(soft, batch) - real(skipped, batch)).abs().max() <= 1e-4
    options = {"max_new_tokens": 4, **GREEDY}
    assert torch.equal(
        model.generate(**batch, **more, **options), model.generate(**batch, **more, **options, use_cache=False)
    )
    return skipped


@contextmanager
def masked(model: RoutedModel, keep: Tensor, batch: dict[str, Tensor], unit: Unit, group: str) -> Iterator[None]:
    """The reference: every module is computed for every token, and what was to be left out is overwritten."""
    outside = torch.ones_like(batch["input_ids"]).bool() if group == "all" else batch["input_ids"] == IMAGE

    def overwrite(site: int, part: Part) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
            states = out[0] if isinstance(out, tuple) else out
            before = args[0] if args else kwargs["hidden_states"]
            kept = keep[site] if keep.dim() == 3 else keep[site][:, None]
            gone = (outside & ~kept)[..., None]
            states = torch.where(gone, before if part == "block" else torch.zeros_like(states), states)
            return (states, *out[1:]) if isinstance(out, tuple) else states

        return hook

    parts = inspect_backbone(model.backbone, unit, "kept").sublayers if unit != "block" else ()
    handles, sites = [], Sites(unit, len(model.spec.layers))
    for index, layer in enumerate(model.spec.layers):
        modules: dict[str, tuple[nn.Module, ...]] = {"block": (layer,)}
        if parts:
            modules |= {"attention": (parts[index].attention,), "mlp": parts[index].mlp}
        for site in sites.of(index):
            for module in modules[sites.part(site)]:
                handles.append(module.register_forward_hook(overwrite(site, sites.part(site)), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def watched(model: RoutedModel, unit: Unit) -> Iterator[dict[int, Tensor]]:
    """Which tokens leave each site, bool (b t) by site, as its modules show from outside."""
    left: dict[int, Tensor] = {}

    def watch(site: int, part: Part) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            states = out[0] if isinstance(out, tuple) else out
            before = args[0] if args else kwargs["hidden_states"]
            left[site] = (states == (before if part == "block" else 0.0)).all(-1)

        return hook

    handles, sites = [], Sites(unit, len(model.spec.layers))
    for index, layer in enumerate(model.spec.layers):
        for site in sites.of(index):
            part = sites.part(site)
            module = layer
            if part != "block":
                own = model.spec.sublayers[index]
                module = own.attention if part == "attention" else own.mlp[-1]
            handles.append(module.register_forward_hook(watch(site, part), with_kwargs=True))
    try:
        yield left
    finally:
        for handle in handles:
            handle.remove()


def check_saving(model: RoutedModel, batch: dict[str, Tensor], keep: Tensor) -> None:
    """The FLOPs that the routing claims to have saved are those that torch no longer counts."""
    with FlopCounterMode(display=False) as dense, model.dense():
        model.backbone(**batch, use_cache=False)
    with FlopCounterMode(display=False) as routed:
        model(**batch, routing=keep, use_cache=False)
    saved = float((model.routing.dense - model.routing.executed).sum())
    assert saved == dense.get_total_flops() - routed.get_total_flops() > 0
