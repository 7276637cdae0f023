"""One layer, or a sublayer of it, under a decision: soft mixing while training, real skipping otherwise.

Both executions are built from the same call of the untouched module on the same part of the batch (a `Segment`), so for
the same decisions they give the same logits.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from adaskip.plan import Flags, Target, Unit
from adaskip.runtime.cache import KeptLayer, Projected, SkipCache, SkipLayer
from adaskip.runtime.request import Request
from adaskip.runtime.segment import MASKS, WHOLE, Segment, cut, hide_keys, take

Call = Callable[..., Any]
Keep = Flags | Tensor
"""Who runs: which rows, or which tokens bool (b t)."""


class Executor:
    """Runs one patched module, a layer or a sublayer of it, for the part of the batch that runs it.

    Args:
        index: the decoder layer.
        unit: what the module is. What leaves a block goes on as it was; what leaves a sublayer gets nothing added.
        target: what the decisions speak of.
        outputs: what the module returns: a tensor (0), or a tuple of this many.
        cache_name: the argument by which it receives the cache.
    """

    def __init__(
        self, index: int, unit: Unit, target: Target, outputs: int, cache_name: str = "past_key_values"
    ) -> None:
        self.index, self.unit, self.kv, self.hides = index, unit, target.kv, target.hides
        self.outputs, self.cache_name = outputs, cache_name

    def execute(self, request: Request, call: Call, states: Tensor, named: dict[str, Any], decision: Any) -> Any:
        """What the module returns under a decision: gates (b) or (b t) while training, else who keeps."""
        if request.mode == "soft":
            return self.soft(request, call, states, named, decision)
        return self.skip(request, call, states, named, decision)

    def soft(self, request: Request, call: Call, states: Tensor, named: dict[str, Any], gate: Tensor) -> Any:
        """``lerp(left, run, gate)``: both branches are computed, so the gate's gradient is their exact difference."""
        by_token = gate.dim() == 2
        if by_token and self.unit != "mlp" and self.kv == "absent":
            masks = [name for name in MASKS if name in named] or [MASKS[0]]
            named = {**named, **{name: hide_keys(named.get(name), gate, states.dtype) for name in masks}}
        out = call(states, **named)
        left = self._left(states)
        weight = rearrange(gate, "b t -> b t 1") if by_token else rearrange(gate, "b -> b 1 1")
        if not by_token and request.routed is not None:
            # what these tokens do is no business of the others, unless their keys are gone for those
            weight = torch.where(rearrange(request.routed, "b t -> b t 1"), weight, 1.0)
            if self.hides:
                weight = rearrange(gate, "b -> b 1 1")
                left, _ = self._run_segment(request, call, states, named, _others(request), left)
        run = states_of(out)  # of another precision than the states where autocast runs a sublayer
        mixed = torch.lerp(left.to(run.dtype), run, weight.to(run.dtype))
        return (mixed, *out[1:]) if isinstance(out, tuple | list) else mixed

    def skip(self, request: Request, call: Call, states: Tensor, named: dict[str, Any], keep: Keep) -> Any:
        """Gather what runs, run it, scatter; the rest is not computed."""
        if isinstance(keep, Tensor):
            request.memo.clear()  # the last layer's parts were others
            run, left = self._tokens(request, keep)
        else:
            run, left = self._segments(request, keep, states.device)
        layer = self._layer(request)
        if run == (WHOLE,) and (layer is None or layer.follows_on(WHOLE, request.offset)):
            return call(states, **named)
        if isinstance(layer, KeptLayer):
            named = {**named, self.cache_name: _cache(request)}
            layer.open(*states.shape[:2])
            for segment in left:
                self._project(request, layer, call, states, named, segment)
        after, form = self._left(states), None
        for segment in run:
            after, form = self._run_segment(request, call, states, named, segment, after)
        if layer is not None and (run or left):
            layer.commit(request.offset, states.shape[1], states.shape[0], request.memo)
            if request.scratch is not None:
                request.scratch.layers[self.index] = KeptLayer()
        return self.wrap(after, request, form)

    def _layer(self, request: Request) -> SkipLayer | None:
        """Where this module's keys and values go; what is kept must be brought together even if nothing is cached."""
        cache = _cache(request)
        return None if cache is None or self.unit == "mlp" else cache.layers[self.index]

    def _segments(
        self, request: Request, flags: Flags, device: torch.device
    ) -> tuple[tuple[Segment, ...], tuple[Segment, ...]]:
        """What runs where these rows keep, and what only has its keys kept; the same objects for the same flags."""
        if all(flags) or not request.has_routed:
            return (WHOLE,), ()
        if flags not in request.memo:
            kept, skipped = _rows(request, flags, device) if any(flags) else (None, None)
            others = () if request.routed is None else (_others(request, skipped),)
            left = (_routed(request, skipped),) if self.kv == "kept" else ()
            request.memo[flags] = (others if kept is None else (kept, *others)), left
        parts: tuple[tuple[Segment, ...], tuple[Segment, ...]] = request.memo[flags]
        return parts

    def _tokens(self, request: Request, keep: Tensor) -> tuple[tuple[Segment, ...], tuple[Segment, ...]]:
        """The same where every token (b t) decides for itself."""
        idle = request.tokens.valid & ~keep
        if not bool(idle.any()):
            return (WHOLE,), ()
        return _gather(request.tokens.valid & keep), _gather(idle) if self.kv == "kept" else ()

    def wrap(self, states: Tensor, request: Request, form: int | None = None) -> Any:
        """States as the module returns them: as it just did (``form``), else as it does when nothing more is asked."""
        outputs = self.outputs if form is None else form
        if self.unit == "block" and request.weights is not None:
            outputs = request.weights.sources[self.index].outputs
        return (states, *[None] * (outputs - 1)) if outputs else states

    def _left(self, states: Tensor) -> Tensor:
        """What the module hands on for a token that leaves it."""
        return states if self.unit == "block" else torch.zeros_like(states)

    def _run_segment(
        self, request: Request, call: Call, states: Tensor, named: dict[str, Any], segment: Segment, into: Tensor
    ) -> tuple[Tensor, int | None]:
        """Gather the segment, run the module on it, scatter the result into a copy of ``into``; and what it returned.

        The latter as a number of values, 0 for a bare tensor, None if there was nothing to run. It is the request's
        and not kept here, for another thread may ask the same module for more.
        """
        if segment.tokens is not None and not segment.tokens.shape[1]:
            return into, None
        layer = self._layer(request)
        whole = segment.tokens is None and (layer is None or layer.follows_on(segment, request.offset))
        positions = segment.positions(request.offset, states.shape[1], len(states), states.device, request.memo)
        keys = None if whole else positions
        if layer is not None:
            layer.begin(segment)
            keys = None if whole else layer.seen(segment, positions, request.memo)
        if request.weights is not None and self.unit != "mlp":
            request.weights.part = segment, positions, keys
        out = call(
            take(states, segment, batch_axis=0), **cut(named, segment, len(states), positions, keys, request.memo)
        )
        return _scatter(states_of(out), segment, into), len(out) if isinstance(out, tuple | list) else 0

    def _project(
        self,
        request: Request,
        layer: KeptLayer,
        call: Call,
        states: Tensor,
        named: dict[str, Any],
        segment: Segment,
    ) -> None:
        """Call the module on what leaves it, and stop it where its attention hands keys and values to the cache."""
        if segment.tokens is not None and not segment.tokens.shape[1]:
            return
        positions = segment.positions(request.offset, states.shape[1], len(states), states.device, request.memo)
        layer.begin(segment, project=True)
        with suppress(Projected):
            call(
                take(states, segment, batch_axis=0),
                **cut(named, segment, len(states), positions, positions, request.memo),
            )


def states_of(out: Any) -> Tensor:
    """The states among what a module returned."""
    states: Tensor = out[0] if isinstance(out, tuple | list) else out
    return states


def _cache(request: Request) -> SkipCache | None:
    return request.cache if request.cache is not None else request.scratch


def _scatter(result: Tensor, segment: Segment, into: Tensor) -> Tensor:
    """A copy of ``into`` with the segment's part replaced."""
    into = into.to(result.dtype)
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


def _others(request: Request, rows: Tensor | None = None) -> Segment:
    """The real positions of the given rows that decisions do not speak of."""
    assert request.routed is not None
    return _marked(request, "others", request.tokens.valid & ~request.routed, rows)


def _routed(request: Request, rows: Tensor | None) -> Segment:
    """The positions of the given rows that decisions speak of."""
    return _marked(request, "routed", request.tokens.valid if request.routed is None else request.routed, rows)


def _gather(marked: Tensor) -> tuple[Segment, ...]:
    """The marked places (b t) as a segment of the rows that have any; none if no row has."""
    some = marked.any(1)
    if not bool(some.any()):
        return ()
    rows = None if bool(some.all()) else some.nonzero().squeeze(1)
    return (_places(marked, rows),)


def _marked(request: Request, kind: str, marked: Tensor, rows: Tensor | None) -> Segment:
    key = (kind, None if rows is None else id(rows))
    if key not in request.memo:
        request.memo[key] = _places(marked, rows)
    segment: Segment = request.memo[key]
    return segment


def _places(marked: Tensor, rows: Tensor | None) -> Segment:
    marked = marked if rows is None else marked[rows]
    places = torch.where(marked, torch.arange(marked.shape[1], device=marked.device), -1).sort(1).values
    counts = marked.sum(1)
    places = places[:, marked.shape[1] - int(counts.max()) :]
    return Segment(rows, places, ragged=bool((counts != counts[0]).any()))
