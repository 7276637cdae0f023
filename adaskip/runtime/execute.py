"""Run one layer, or a sublayer of it, under a decision: soft mixing while training, real skipping otherwise.

    rows x tokens; row 1 skips       soft: all is computed           skip: a segment is gathered, run, scattered

    row 0  a a a a     gate 1        row 0  run      1 * run         row 0  a a a a  ->  call  ->  run
    row 1  b b b b     gate 0        row 1  run      0 * run + b     row 1  . . . .               b b b b
    row 2  c c c c     gate 1        row 2  run      1 * run         row 2  c c c c  ->  call  ->  run

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

from adaskip.plan import Flags, Target
from adaskip.runtime.cache import KeptLayer, Projected, SkipCache, SkipLayer
from adaskip.runtime.request import Request
from adaskip.runtime.segment import MASKS, WHOLE, Segment, fill_left, hide_keys, narrow, take
from adaskip.sites import Part

Call = Callable[..., Any]
Keep = Flags | Tensor
"""Who runs: which rows, or which tokens bool (b t)."""


class Executor:
    """Run one patched module, a layer or a sublayer of it, for the part of the batch that runs it.

    Args:
        site: whose decision the module follows.
        index: the decoder layer.
        part: what the module is. States that skip a block go on as they are; those that skip a sublayer get 0 added.
        target: what the decisions speak of.
        outputs: what the module returns: a tensor (0), or a tuple of this many.
        cache_name: the argument by which it receives the cache.
    """

    def __init__(
        self, site: int, index: int, part: Part, target: Target, outputs: int, cache_name: str = "past_key_values"
    ) -> None:
        self.site, self.index, self.part, self.kv = site, index, part, target.kv
        self.hides = target.hides and part != "mlp"  # an MLP hides nothing, whatever else of its layer may
        self.outputs, self.cache_name = outputs, cache_name

    def execute(self, request: Request, call: Call, states: Tensor, named: dict[str, Any], decision: Any) -> Any:
        """Run the module under a decision: gates (b) or (b t) while training, else which rows or tokens keep."""
        if request.mode == "soft":
            return self.soft(request, call, states, named, decision)
        return self.skip(request, call, states, named, decision)

    def soft(self, request: Request, call: Call, states: Tensor, named: dict[str, Any], gate: Tensor) -> Any:
        """Return ``lerp(bypass, run, gate)``: with both branches at hand, the gate's gradient is their difference."""
        by_token = gate.dim() == 2
        if by_token and self.part != "mlp" and self.kv == "absent":
            masks = [name for name in MASKS if name in named] or [MASKS[0]]
            named = {**named, **{name: hide_keys(named.get(name), gate, states.dtype) for name in masks}}
        out = call(states, **named)
        bypass = self._bypass(states)
        weight = rearrange(gate, "b t -> b t 1") if by_token else rearrange(gate, "b -> b 1 1")
        if not by_token and request.routed is not None:
            #   row 0   v v t t   v: routed, weighted by the gate;  t: not routed, so it runs with weight 1
            weight = torch.where(rearrange(request.routed, "b t -> b t 1"), weight, 1.0)
            if self.hides:
                # where v skips, its keys are gone for t, which then gets something else than `run` has: the bypass
                # branch runs t without v, and the gate mixes whole rows
                weight = rearrange(gate, "b -> b 1 1")
                bypass, _ = self._run_segment(request, call, states, named, _others(request), bypass)
        run = states_of(out)  # of another precision than the states where autocast runs a sublayer
        mixture = torch.lerp(bypass.to(run.dtype), run, weight.to(run.dtype))
        return (mixture, *out[1:]) if isinstance(out, tuple | list) else mixture

    def skip(self, request: Request, call: Call, states: Tensor, named: dict[str, Any], keep: Keep) -> Any:
        """Gather what runs, run it and scatter the result; the rest is not computed."""
        if isinstance(keep, Tensor):
            request.cut.clear()  # the last layer's parts were others
            run, skipped = self._tokens(request, keep)
        else:
            run, skipped = self._segments(request, keep, states.device)
        layer = self._layer(request)
        # nothing is missing here, now or before: the module runs as it came, masks and cache untouched
        if run == (WHOLE,) and (layer is None or layer.follows_on(WHOLE, request.offset)):
            return call(states, **named)
        if isinstance(layer, KeptLayer):
            named = {**named, self.cache_name: _cache(request)}
            layer.open(*states.shape[:2])
            # first the keys of what skips: what runs attends to them
            for segment in skipped:
                self._project(request, layer, call, states, named, segment)
        after, form = self._bypass(states), None
        for segment in run:
            after, form = self._run_segment(request, call, states, named, segment, after)
        if layer is not None and (run or skipped):
            layer.commit(request.offset, states.shape[1], states.shape[0], request.cut)
            if request.scratch is not None:  # nothing comes after this pass: the layer's keys are freed at once
                request.scratch.layers[self.index] = KeptLayer()
        return self.wrap(after, request, form)

    def _layer(self, request: Request) -> SkipLayer | None:
        """Return where this module's keys and values go; None in a pass without a cache, and for an MLP."""
        cache = _cache(request)
        return None if cache is None or self.part == "mlp" else cache.layers[self.index]

    def _segments(
        self, request: Request, flags: Flags, device: torch.device
    ) -> tuple[tuple[Segment, ...], tuple[Segment, ...]]:
        """Return what runs, and what only has its keys kept, where these rows keep.

        The same objects for the same flags, so that layers which agree share cut masks and positions.

            flags (1, 0, 1), row 1 = v v t t, group vision      kept     rows 0 2, all positions
                                                                others   row 1, its t: they run, without v
                                                                skipped  row 1, its v: only under kv kept
        """
        if all(flags) or not request.has_routed:
            return (WHOLE,), ()
        if flags not in request.cut:
            kept, rows = _rows(request, flags, device) if any(flags) else (None, None)
            others = () if request.routed is None else (_others(request, rows),)
            skipped = (_routed(request, rows),) if self.kv == "kept" else ()
            request.cut[flags] = (others if kept is None else (kept, *others)), skipped
        parts: tuple[tuple[Segment, ...], tuple[Segment, ...]] = request.cut[flags]
        return parts

    def _tokens(self, request: Request, keep: Tensor) -> tuple[tuple[Segment, ...], tuple[Segment, ...]]:
        """Return the same where every token (b t) decides for itself."""
        idle = request.tokens.valid & ~keep
        if not bool(idle.any()):
            return (WHOLE,), ()
        return _gather(request.tokens.valid & keep), _gather(idle) if self.kv == "kept" else ()

    def wrap(self, states: Tensor, request: Request, form: int | None = None) -> Any:
        """Return states as the module does: as it just did (``form``), else as it does when nothing more is asked."""
        outputs = self.outputs if form is None else form
        if self.part == "block" and request.weights is not None:
            outputs = request.weights.sources[self.index].outputs
        return (states, *[None] * (outputs - 1)) if outputs else states

    def _bypass(self, states: Tensor) -> Tensor:
        """Return what stands for the module's result where it is skipped."""
        return states if self.part == "block" else torch.zeros_like(states)

    def _run_segment(
        self, request: Request, call: Call, states: Tensor, named: dict[str, Any], segment: Segment, into: Tensor
    ) -> tuple[Tensor, int | None]:
        """Gather the segment, run the module on it, and scatter the result into a copy of ``into``.

        Returns:
            That copy, and the form of what the module returned: so many values, 0 for a bare tensor, None if there was
            nothing to run. It is not kept on this object, since another thread may ask the same module for more.
        """
        if segment.tokens is not None and not segment.tokens.shape[1]:
            return into, None
        layer = self._layer(request)
        whole = segment.tokens is None and (layer is None or layer.follows_on(segment, request.offset))
        positions = segment.positions(request.offset, states.shape[1], len(states), states.device, request.cut)
        keys = None if whole else positions  # None: every key in order, so that no mask need be cut
        if layer is not None:
            layer.begin(segment)
            keys = None if whole else layer.key_places(segment, positions, request.cut)
        request.part = segment
        if request.weights is not None and self.part != "mlp":
            request.weights.part = segment, positions, keys
        out = call(
            take(states, segment, batch_axis=0), **narrow(named, segment, len(states), positions, keys, request.cut)
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
        """Call the module on what skips it, and stop it where its attention hands keys and values to the cache."""
        if segment.tokens is not None and not segment.tokens.shape[1]:
            return
        positions = segment.positions(request.offset, states.shape[1], len(states), states.device, request.cut)
        layer.begin(segment, project=True)
        with suppress(Projected):
            call(
                take(states, segment, batch_axis=0),
                **narrow(named, segment, len(states), positions, positions, request.cut),
            )


def states_of(out: Any) -> Tensor:
    """Return the states among what a module returned."""
    states: Tensor = out[0] if isinstance(out, tuple | list) else out
    return states


def _cache(request: Request) -> SkipCache | None:
    """Return the request's cache, or the one that brings kept keys together in a pass without a cache."""
    return request.cache if request.cache is not None else request.scratch


def _scatter(result: Tensor, segment: Segment, into: Tensor) -> Tensor:
    """Return a copy of ``into`` with the segment's part replaced."""
    into = into.to(result.dtype)
    if segment.tokens is None:
        return result if segment.rows is None else into.index_copy(0, segment.rows, result)
    if segment.rows is None and not segment.ragged:
        return into.scatter(1, rearrange(segment.tokens, "r n -> r n 1").expand_as(result), result)
    rows = segment.rows if segment.rows is not None else torch.arange(len(into), device=into.device)
    if not segment.ragged:
        return into.index_put((rearrange(rows, "r -> r 1"), segment.tokens), result)
    real = segment.tokens >= 0  # the result of filling goes nowhere
    where = (rearrange(rows, "r -> r 1").expand_as(real)[real], segment.tokens[real])
    return into.index_put(where, result[real])


def _rows(request: Request, flags: Flags, device: torch.device) -> tuple[Segment, Tensor]:
    """Return the rows that keep, as a segment, and the rows that skip; a cache remembers them from token to token."""
    memory = request.cache.rows if request.cache is not None else request.cut.setdefault("rows", {})
    if flags not in memory:
        keeps = torch.tensor(flags, device=device)
        memory[flags] = Segment(keeps.nonzero().squeeze(1)), (~keeps).nonzero().squeeze(1)
    return memory[flags]


def _others(request: Request, rows: Tensor | None = None) -> Segment:
    """Return the real positions of the given rows that decisions do not speak of."""
    assert request.routed is not None
    return _marked(request, "others", request.tokens.valid & ~request.routed, rows)


def _routed(request: Request, rows: Tensor | None) -> Segment:
    """Return the positions of the given rows that decisions speak of."""
    return _marked(request, "routed", request.tokens.valid if request.routed is None else request.routed, rows)


def _gather(marked: Tensor) -> tuple[Segment, ...]:
    """Return the marked places (b t) as a segment of the rows that have any; none if no row has."""
    some = marked.any(1)
    if not bool(some.any()):
        return ()
    rows = None if bool(some.all()) else some.nonzero().squeeze(1)
    return (_places(marked, rows),)


def _marked(request: Request, kind: str, marked: Tensor, rows: Tensor | None) -> Segment:
    """Return the marked places as one segment object for all layers of a request that mean the same rows."""
    key = (kind, None if rows is None else id(rows))
    if key not in request.cut:
        request.cut[key] = _places(marked, rows)
    segment: Segment = request.cut[key]
    return segment


def _places(marked: Tensor, rows: Tensor | None) -> Segment:
    """Return the marked places of some rows as a segment."""
    marked = marked if rows is None else marked[rows]
    counts = marked.sum(1)
    return Segment(rows, fill_left(marked), ragged=bool((counts != counts[0]).any()))
