"""See, or change, what each decoder layer's attention is given, whatever kernel computes it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from transformers.modeling_utils import AttentionInterface

from adaskip.errors import BackboneError

Visitor = Callable[["AttentionCall"], Any]


@dataclass(frozen=True)
class AttentionCall:
    """Hold what a decoder layer's attention kernel is about to be called with; ``run`` makes the call."""

    layer: int
    module: nn.Module
    kernel: Callable[..., Any]
    query: Tensor  # (b h q d)
    key: Tensor  # (b g k d), h a multiple of g
    value: Tensor  # (b g k e)
    mask: Tensor | None  # bool (True: seen) or additive, (b|1 h|1 q k); None: plain causal attention
    options: dict[str, Any]

    def run(self) -> Any:
        """Return what the model's own kernel returns: (b q h e) and the weights, or None for them."""
        return self.kernel(self.module, self.query, self.key, self.value, self.mask, **self.options)

    def additive_mask(self) -> Tensor:
        """Return (b|1 h|1 q k) in the query's dtype: 0 where a key is seen, the dtype's minimum where it is not."""
        hidden = torch.finfo(self.query.dtype).min
        mask = self.mask
        if mask is None:
            queries, keys = self.query.shape[2], self.key.shape[2]
            ones = torch.ones(queries, keys, dtype=torch.bool, device=self.query.device)
            mask = rearrange(ones.tril(keys - queries), "q k -> 1 1 q k")
        if mask.dtype != torch.bool:
            return mask.to(self.query.dtype)
        return torch.zeros(mask.shape, dtype=self.query.dtype, device=mask.device).masked_fill(~mask, hidden)

    def without(self, queries: Tensor, keys: Tensor) -> AttentionCall:
        """Return the same call in which the ``queries`` (b q) do not see the ``keys`` (b k), bool each."""
        pairs = rearrange(queries, "b q -> b 1 q 1") & rearrange(keys, "b k -> b 1 1 k")
        mask = self.additive_mask()
        return replace(self, mask=mask.masked_fill(pairs, torch.finfo(mask.dtype).min))

    def weights(self, chosen: Tensor) -> Tensor:
        """Recompute, in float32, the attention probabilities of some queries: long (c) positions -> (b h c k).

        Scale, soft cap, additive bias, masks and sinks are applied as transformers' own eager attention applies them;
        with sinks a row sums to less than 1.
        """
        query = self.query.index_select(2, chosen).float()
        key = repeat_heads(self.key, self.query.shape[1]).float()
        scale = self.options.get("scaling")
        scores = query @ key.mT * (self.query.shape[-1] ** -0.5 if scale is None else scale)
        if (cap := self.options.get("softcap")) is not None:
            scores = torch.tanh(scores / cap) * cap
        if (bias := self.options.get("position_bias")) is not None:
            scores = scores + bias.index_select(2, chosen).float()
        if self.mask is None:
            keys = torch.arange(scores.shape[-1], device=scores.device)
            # with a cache there are more keys than queries: the last query is level with the last key
            last = chosen + scores.shape[-1] - self.query.shape[2]
            scores = scores.masked_fill(keys > rearrange(last, "c -> c 1"), -torch.inf)
        elif self.mask.dtype == torch.bool:
            scores = scores.masked_fill(~self.mask.index_select(2, chosen), -torch.inf)
        else:
            scores = scores + self.mask.index_select(2, chosen).float()
        sinks = self.options.get("s_aux")
        if sinks is None:
            weights: Tensor = scores.softmax(-1)
            return weights
        extra = rearrange(sinks.float(), "h -> 1 h 1 1").expand(*scores.shape[:3], 1)
        return torch.cat([scores, extra], -1).softmax(-1)[..., :-1]


def repeat_heads(keys: Tensor, heads: int) -> Tensor:
    """Repeat grouped key or value heads, (b g k d), once for every query head: (b h k d)."""
    return keys.repeat_interleave(heads // keys.shape[1], 1)


class _Visits(threading.local):
    """Hold the visitors of the calling thread, the outermost first."""

    def __init__(self) -> None:
        self.stack: list[Callable[..., Any]] = []


_visits = _Visits()
_lock = threading.Lock()
_interceptions = 0
_original = AttentionInterface.get_interface


def _get_interface(
    self: AttentionInterface, attn_implementation: str, default: Callable[..., Any]
) -> Callable[..., Any]:
    kernel = _original(self, attn_implementation, default)
    for visit in _visits.stack:
        kernel = partial(visit, kernel)
    return kernel


@contextmanager
def _patched_interface() -> Iterator[None]:
    """Let transformers' attention interface, one for the whole process, ask the calling thread's visitors.

    The first thread that enters replaces the interface, and the last one to leave puts it back.
    """
    global _interceptions, _original
    with _lock:
        if _interceptions == 0:
            _original = AttentionInterface.get_interface
            AttentionInterface.get_interface = _get_interface  # type: ignore[method-assign]
        _interceptions += 1
    try:
        yield
    finally:
        with _lock:
            _interceptions -= 1
            if _interceptions == 0:
                AttentionInterface.get_interface = _original  # type: ignore[method-assign]


@contextmanager
def intercept_attention(layers: Sequence[nn.Module], visitor: Visitor) -> Iterator[None]:
    """Send every attention call of these decoder layers to ``visitor``; the layer gets what the visitor returns.

    Works wherever the model asks transformers' attention interface for its kernel (eager, SDPA, ...); a vision tower's
    attention is let through. The visitor sees the passes of its own thread only.

    Raises:
        BackboneError: on leaving, if no layer, or one more often than another, has asked the interface.
    """
    place = {module: index for index, layer in enumerate(layers) for module in layer.modules()}
    calls = [0] * len(layers)

    def visit(
        kernel: Callable[..., Any],
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **options: Any,
    ) -> Any:
        index = place.get(module)
        if index is None:
            return kernel(module, query, key, value, attention_mask, **options)
        calls[index] += 1
        if attention_mask is not None and attention_mask.dim() != 4:
            raise BackboneError(
                f"decoder layer {index}: expected an attention mask (batch, heads, queries, keys), got "
                f"{tuple(attention_mask.shape)}; load the model with attn_implementation='sdpa' or 'eager'"
            )
        return visitor(AttentionCall(index, module, kernel, query, key, value, attention_mask, options))

    with _patched_interface():
        _visits.stack.append(visit)
        try:
            yield
        finally:
            _visits.stack.remove(visit)
    # 0 is allowed beside one other number: a pass may leave layers out
    if len({count for count in calls if count}) != 1:
        raise BackboneError(
            "attention cannot be read: expected every decoder layer to ask transformers' attention interface for its "
            f"kernel once a pass, got these numbers of calls: {', '.join(map(str, calls))}; "
            "cross-modal measures, and policies that read attention, do not go with this model"
        )
