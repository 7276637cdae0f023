"""One layer under a decision: soft mixing while training, real skipping otherwise.

Both executions are built from the same call of the untouched layer on the same part of the batch (a `Segment`), so for
the same decisions they give the same logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from adaskip.plan import Flags, Group
from adaskip.runtime.request import Request
from adaskip.runtime.segment import WHOLE, Segment, cut, take


class Executor:
    """Runs layers for the part of the batch that runs them.

    Args:
        group: the positions that decisions speak of.
        outputs: what a layer returns: a tensor (0), or a tuple of this many.
    """

    def __init__(self, group: Group, outputs: int) -> None:
        self.group, self.outputs = group, outputs

    def soft(
        self,
        request: Request,
        index: int,
        call: Callable[..., Any],
        states: Tensor,
        named: dict[str, Any],
        gate: Tensor,
    ) -> Any:
        """``lerp(left, run, gate)``: both branches are computed, so the gate's gradient is their exact difference."""
        out = call(states, **named)
        left = states
        if self.group == "vision":
            left = self._run_segment(request, index, call, states, named, _text(request), states)
        mixed = torch.lerp(left, self.states(out), rearrange(gate, "b -> b 1 1").to(states.dtype))
        return (mixed, *out[1:]) if isinstance(out, tuple | list) else mixed

    def skip(
        self,
        request: Request,
        index: int,
        call: Callable[..., Any],
        states: Tensor,
        named: dict[str, Any],
        flags: Flags,
    ) -> Any:
        """Gather what runs, run it, scatter; the rest is not computed."""
        segments = self._segments(request, flags, states.device)
        layer = request.cache.layers[index] if request.cache is not None else None
        whole = len(segments) == 1 and segments[0].whole
        if whole and (layer is None or layer.follows_on(segments[0], request.offset)):
            return call(states, **named)
        after = states
        for segment in segments:
            after = self._run_segment(request, index, call, states, named, segment, after)
        if request.cache is not None and segments:
            request.cache.commit(index, states.shape[1], states.shape[0], request.memo)
        return self.wrap(after)

    def _segments(self, request: Request, flags: Flags, device: torch.device) -> tuple[Segment, ...]:
        """What runs a layer that these rows keep; the same objects for the same flags."""
        if all(flags) or (self.group == "vision" and not request.has_vision):
            return (WHOLE,)
        if flags not in request.memo:
            kept, skipped = _rows(request, flags, device) if any(flags) else (None, None)
            left = () if self.group == "all" else (_text(request, skipped),)
            request.memo[flags] = left if kept is None else (kept, *left)
        return request.memo[flags]

    def wrap(self, states: Tensor) -> Any:
        """States in the form in which a layer returns them."""
        return (states, *[None] * (self.outputs - 1)) if self.outputs else states

    def states(self, out: Any) -> Tensor:
        """The states among what a layer returned."""
        several = isinstance(out, tuple | list)
        self.outputs = len(out) if several else 0
        return out[0] if several else out

    def _run_segment(
        self,
        request: Request,
        index: int,
        call: Callable[..., Any],
        states: Tensor,
        named: dict[str, Any],
        segment: Segment,
        into: Tensor,
    ) -> Tensor:
        """Gather the segment, run the layer on it, scatter the result into a copy of ``into``."""
        batch, length = states.shape[:2]
        if segment.tokens is not None and not segment.tokens.shape[1]:
            return into
        cache = request.cache.layers[index] if request.cache is not None else None
        whole = segment.tokens is None and (cache is None or cache.follows_on(segment, request.offset))
        positions = segment.positions(request.offset, length, batch, states.device, request.memo)
        keys = None if whole else positions
        if cache is not None:
            cache.begin(segment)
            keys = None if whole else cache.seen(segment, positions, request.memo)
        out = call(take(states, segment, batch_axis=0), **cut(named, segment, batch, positions, keys, request.memo))
        return _scatter(self.states(out), segment, into)


def _scatter(result: Tensor, segment: Segment, into: Tensor) -> Tensor:
    """A copy of ``into`` with the segment's part replaced."""
    if segment.tokens is None:
        return result if segment.rows is None else into.index_copy(0, segment.rows, result)
    if segment.rows is None and not segment.ragged:
        return into.scatter(1, rearrange(segment.tokens, "r n -> r n 1").expand_as(result), result)
    rows = segment.rows if segment.rows is not None else torch.arange(len(into), device=into.device)
    if not segment.ragged:
        return into.index_put((rearrange(rows, "r -> r 1"), segment.tokens), result)
    real = segment.tokens >= 0
    where = (rearrange(rows, "r -> r 1").expand_as(real)[real], segment.tokens[real])
    return into.index_put(where, result[real])


def _rows(request: Request, flags: Flags, device: torch.device) -> tuple[Segment, Tensor]:
    """The rows that keep, as a segment, and the rows that skip; a cache remembers them from token to token."""
    known = request.cache.rows if request.cache is not None else request.memo.setdefault("rows", {})
    if flags not in known:
        keeps = torch.tensor(flags, device=device)
        known[flags] = Segment(keeps.nonzero().squeeze(1)), (~keeps).nonzero().squeeze(1)
    return known[flags]


def _text(request: Request, rows: Tensor | None = None) -> Segment:
    """The real text positions of the given rows."""
    key = ("text", None if rows is None else id(rows))
    if key not in request.memo:
        vision = request.tokens.vision
        text = request.tokens.valid if vision is None else request.tokens.valid & ~vision
        text = text if rows is None else text[rows]
        places = torch.where(text, torch.arange(text.shape[1], device=text.device), -1).sort(1).values
        counts = text.sum(1)
        places = places[:, text.shape[1] - int(counts.max()) :]
        request.memo[key] = Segment(rows, places, ragged=bool((counts != counts[0]).any()))
    return request.memo[key]
