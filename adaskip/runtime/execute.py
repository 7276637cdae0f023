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

from adaskip.plan import Group
from adaskip.runtime.request import Request
from adaskip.runtime.segment import Segment, cut, take


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
        keep: Tensor,
    ) -> Any:
        """Gather what runs, run it, scatter; the rest is not computed."""
        kept, skipped = _rows(request, keep, states.device)
        if self.group == "all":
            segments = [Segment(kept)] if kept is None or len(kept) else []
        elif kept is None or skipped is None or not request.has_vision:
            segments = [Segment()]
        else:
            segments = [Segment(kept), _text(request, skipped)] if len(kept) else [_text(request)]
        layer = request.cache.layers[index] if request.cache is not None else None
        if (
            len(segments) == 1
            and segments[0] == Segment()
            and (layer is None or layer.follows_on(segments[0], request.offset))
        ):
            return call(states, **named)
        after = states
        for segment in segments:
            after = self._run_segment(request, index, call, states, named, segment, after)
        if request.cache is not None:
            request.cache.commit(index, states.shape[1], states.shape[0])
        return self.wrap(after)

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
        positions = segment.positions(request.offset, length, batch, states.device)
        keys = cache.begin(segment, positions) if cache is not None else positions
        out = call(
            take(states, segment, batch_axis=0),
            **cut(named, segment, batch, positions, None if whole else keys),
        )
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


def _rows(request: Request, keep: Tensor, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    """The rows that keep (None: all), and the rows that skip (None: none)."""
    flags = tuple(keep.tolist())
    if flags not in request.memo:
        rows, on = torch.arange(len(flags), device=device), torch.tensor(flags, device=device)
        request.memo[flags] = (None, None) if all(flags) else (rows[on], rows[~on])
    return request.memo[flags]


def _text(request: Request, rows: Tensor | None = None) -> Segment:
    """The real text positions of the given rows."""
    key = "text" if rows is None else ("text", *rows.tolist())
    if key not in request.memo:
        vision = request.tokens.vision
        text = request.tokens.valid if vision is None else request.tokens.valid & ~vision
        text = text if rows is None else text[rows]
        places = torch.where(text, torch.arange(text.shape[1], device=text.device), -1).sort(1).values
        counts = text.sum(1)
        places = places[:, text.shape[1] - int(counts.max()) :]
        request.memo[key] = Segment(rows, places, ragged=bool((counts != counts[0]).any()))
    return request.memo[key]
