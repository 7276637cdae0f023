"""Read what the text takes from vision at each layer: attention mass, how far it moves the text, its causal cost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from adaskip.backbone.attention import AttentionCall, intercept_attention, repeat_heads
from adaskip.backbone.inspect import Tokens
from adaskip.errors import BackboneError, DataError
from adaskip.runtime.attach import RoutedModel
from adaskip.theory.measures import output_change

_CHUNK = 2**24  # attention probabilities held at once


class AttentionReading:
    """Hold what `read_attention` collects: ``mass`` and ``moved``, (b l) after the pass; NaN without text."""

    def __init__(self, layers: int) -> None:
        self._columns: list[tuple[Tensor, Tensor] | None] = [None] * layers

    @property
    def mass(self) -> Tensor:
        """Return the share of the text's attention on vision, mean over heads and queries; `attention_mass`."""
        return self._stack(0)

    @property
    def moved(self) -> Tensor:
        """Return how far those keys move the text queries' attention output; `value_weighted_mass`."""
        return self._stack(1)

    def put(self, layer: int, mass: Tensor, moved: Tensor) -> None:
        """Keep one layer's rows, (b) each."""
        self._columns[layer] = (mass, moved)

    def _stack(self, which: int) -> Tensor:
        missing = [layer for layer, column in enumerate(self._columns) if column is None]
        if missing:
            raise BackboneError(
                f"attention of decoder layers {', '.join(map(str, missing))} was not seen: run the model once inside "
                "read_attention; if it ran, these layers do not use transformers' attention interface"
            )
        return torch.stack([column[which] for column in self._columns if column is not None], 1)


@contextmanager
def read_attention(model: RoutedModel, tokens: Tokens) -> Iterator[AttentionReading]:
    """Read, in one pass of the model inside, the text's attention on vision, layer by layer.

    Probabilities are recomputed for text queries only, a chunk of queries at a time, so SDPA stays SDPA and nothing
    the size of the whole attention is held. What is recomputed is compared with what the kernel returned.

    Raises:
        BackboneError: a layer's attention is not what was recomputed, or cannot be intercepted; says which layer.
    """
    vision = _vision(tokens)
    text = tokens.valid & ~vision
    reading = AttentionReading(len(model.spec.layers))

    def visit(call: AttentionCall) -> Any:
        out = call.run()
        reading.put(call.layer, *_read(call, out[0], text, vision))
        return out

    with intercept_attention(model.spec.layers, visit):
        yield reading


def _vision(tokens: Tokens) -> Tensor:
    if tokens.vision is None:
        raise DataError(
            "cross-modal measures: expected a model with vision tokens, got a text-only one; leave them out"
        )
    return tokens.vision


@torch.no_grad()
def _read(call: AttentionCall, output: Tensor, text: Tensor, vision: Tensor) -> tuple[Tensor, Tensor]:
    batch, heads = call.query.shape[:2]
    values = repeat_heads(call.value, heads).float()
    places = text.any(0).nonzero()[:, 0]  # positions that are text in some row: queries elsewhere are of no interest
    mass, moved = (torch.zeros(text.shape, device=text.device) for _ in range(2))
    step = max(1, _CHUNK // (batch * heads * values.shape[2]))
    on_vision = rearrange(vision.float(), "b k -> b 1 1 k")
    for start in range(0, len(places), step):
        chosen = places[start : start + step]
        weights = call.weights(chosen)
        # (b h q k) @ (b h k e): what the kernel must have returned if this is the attention that it computed
        here = weights @ values
        _check_same(call, here, rearrange(output[:, chosen], "b q h e -> b h q e").float(), text[:, chosen])
        removed = weights * on_vision
        mass[:, chosen] = removed.sum(-1).mean(1)
        moved[:, chosen] = output_change(removed, here, values)
    count = text.sum(1)
    return tuple(v.masked_fill(~text, 0.0).sum(1) / count for v in (mass, moved))  # type: ignore[return-value]


def _check_same(call: AttentionCall, ours: Tensor, theirs: Tensor, queries: Tensor) -> None:
    real = rearrange(queries, "b q -> b 1 q 1")
    gap = (ours - theirs).abs().masked_fill(~real, 0.0).max()
    size = theirs.abs().masked_fill(~real, 0.0).max()
    allowed = min(0.2, 32 * torch.finfo(call.query.dtype).eps ** 0.75)
    if gap <= allowed * size:
        return
    if not (theirs.isfinite() | ~real).all():
        raise DataError(f"attention of decoder layer {call.layer} is not finite; the backbone's states are not")
    raise BackboneError(
        f"decoder layer {call.layer} ({type(call.module).__name__}): its attention is not the softmax attention that "
        f"was recomputed from its queries and keys (largest difference {gap / size:.2g} of the largest output, "
        f"expected at most {allowed:.2g}); its attention mass cannot be read"
    )


@contextmanager
def remove_keys(model: RoutedModel, tokens: Tokens, layer: int) -> Iterator[None]:
    """Hide, inside and at one layer, the vision keys from the text; vision itself is updated as always.

    The causal counterpart of attention mass [D]: the KL that it costs is exact.
    """
    vision = _vision(tokens)
    text = tokens.valid & ~vision

    def visit(call: AttentionCall) -> Any:
        return (call.without(text, vision) if call.layer == layer else call).run()

    with intercept_attention(model.spec.layers, visit):
        yield
