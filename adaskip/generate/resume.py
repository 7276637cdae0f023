"""Fill a cache that ``generate`` goes on from, and try on ten plain tokens whether the model's own can."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from adaskip.backbone.probe import in_this_thread, plain_tokens
from adaskip.errors import BackboneError
from adaskip.generate.greedy import greedy_options
from adaskip.generate.join import Part, join
from adaskip.runtime.cache import SkipCache

if TYPE_CHECKING:
    from adaskip.runtime.attach import RoutedModel
    from adaskip.runtime.forward import Runtime

_STEPS = 3
"""Tokens that are generated: some models fail only at the second one behind the cache."""

_PADDING = 2

_GAPS: WeakKeyDictionary[Runtime, dict[tuple[Any, ...], tuple[float, float]]] = WeakKeyDictionary()
"""Results of a model's trials, so that it is tried once in each precision and with each attention."""


def try_resuming(model: RoutedModel) -> bool:
    """Generate a little at once, and again from a cache of all tokens but the last, without and with padding.

    Returns:
        Whether padding on the left changes nothing. In some models it moves the places of the tokens behind it, or
        away from those of their keys.

    Raises:
        BackboneError: the model keeps no cache, or the logits without padding differ, so answers that go on from a
            cache would not be the model's.
    """
    config = model.backbone.config.get_text_config(decoder=True)
    key = config._attn_implementation, model.backbone.dtype, model.device
    gaps = _GAPS.setdefault(model.runtime, {})
    if key not in gaps:
        gaps[key] = _try(model)
    close = 1e-3 if model.backbone.dtype == torch.float32 else 0.1
    plain, padded = gaps[key]
    if not plain <= close:
        raise BackboneError(
            f"generate_many: {type(model.backbone).__name__}: transformers' generate goes on from a filled cache "
            f"otherwise than from the prompt (logits of plain tokens differ by {plain:.2g} of their norm), so answers "
            "would not be those of generate; call generate"
        )
    return padded <= close


@torch.no_grad()
def _try(model: RoutedModel) -> tuple[float, float]:
    """Return how far logits are from those of one go, relatively: resumed, and resumed behind padding."""
    ids = plain_tokens(model.backbone)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    parameters = inspect.signature(type(model.backbone).forward).parameters
    for name in ("mm_token_type_ids", *(("token_type_ids",) if model.spec.reads_ahead else ())):
        if name in parameters:
            inputs[name] = torch.zeros_like(ids)
    runs = torch.ones(len(model.sites), len(ids), dtype=torch.bool)
    whole = _generate(model, inputs, routing=runs)
    resumed = _generate(model, inputs, past_key_values=fill_cache(model, inputs, runs)[0])
    # as a group is made: beside longer prompts, keys that were computed without padding get some before them
    longer = {name: torch.cat([value[:, :_PADDING], value], 1) for name, value in inputs.items()}
    (short_cache, short_places), (long_cache, long_places) = (fill_cache(model, one, runs) for one in (inputs, longer))
    pairs = {name: (inputs[name], longer[name]) for name in inputs}
    if short_places is not None and long_places is not None:
        pairs["position_ids"] = short_places, long_places
    # both are (... b t): the shorter rows are padded, and stand above the longer ones
    group = {name: torch.cat([nn.functional.pad(a, (_PADDING, 0)), b], -2) for name, (a, b) in pairs.items()}
    rows = torch.arange(len(ids))
    cache = join([Part(short_cache, rows, 0), Part(long_cache, rows, 0)])
    padded = _generate(model, group, past_key_values=cache)
    return _gap(whole, resumed), _gap(whole, (padded[0][: len(ids)], [logits[: len(ids)] for logits in padded[1]]))


def fill_cache(model: RoutedModel, inputs: dict[str, Any], keep: Tensor | None) -> tuple[SkipCache, Tensor | None]:
    """Read prompts as `generate` would, and stop before the first token.

    Returns:
        The cache of all tokens but the last, and the places of the tokens, long (... b t), where the mask alone does
        not say them.

    Raises:
        BackboneError: the model keeps no cache.
    """
    call: dict[str, Any] = {}

    # generate returns tokens only. This hook runs after the routing's, which has put a SkipCache among the arguments.
    def look(backbone: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        call.update(named)

    handle = model.backbone.register_forward_pre_hook(in_this_thread(look), with_kwargs=True)
    try:
        model.generate(**inputs, routing=keep, use_cache=True, **greedy_options(1))
    finally:
        handle.remove()
    cache = call.get("past_key_values")
    if not isinstance(cache, SkipCache) or cache.routing is None:
        raise BackboneError(
            f"generate_many: {type(model.backbone).__name__} keeps no cache that could go on with others; call generate"
        )
    cache.crop(-1)
    places = call.get("position_ids")
    if inputs.get("position_ids") is not None:
        places = inputs["position_ids"]
    elif places is not None and places.dim() < 3:
        return cache, None  # of the mask alone: generate makes them anew, and some models then change what is passed
    if places is not None and places.shape[-2] != cache.batch:
        places = places.expand(*places.shape[:-2], cache.batch, -1)
    return cache, places


def _gap(whole: tuple[Tensor, list[Tensor]], other: tuple[Tensor, list[Tensor]]) -> float:
    """Return the largest relative difference of logits, as long as both have taken the same tokens."""
    gap = 0.0
    for step in range(_STEPS):
        if step and not torch.equal(whole[0][:, step - _STEPS - 1], other[0][:, step - _STEPS - 1]):
            break  # two tokens of like logits: from here on the answers are of different texts
        gap = max(gap, float((whole[1][step] - other[1][step]).norm() / whole[1][step].norm()))
    return gap


def _generate(model: RoutedModel, inputs: dict[str, Any], **options: Any) -> tuple[Tensor, list[Tensor]]:
    """Generate a few tokens greedily; return the sequences and the logits (b v) of each step."""
    # raw logits: a model's own penalties and the like have no part in this; and no answer ends early
    out = model.generate(
        **inputs,
        **options,
        do_sample=False,
        num_beams=1,
        max_new_tokens=_STEPS,
        min_new_tokens=_STEPS,
        use_cache=True,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return out.sequences, [logits.float() for logits in out.logits]
