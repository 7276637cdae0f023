"""One forward pass under a routing: soft mixing while training, real skipping otherwise.

Both executions are built from the same call of the untouched layer on the same part of the batch (a `Segment`), so for
the same decisions they give the same logits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from adaskip.backbone import Backbone, Tokens, bind_arguments, read_tokens
from adaskip.errors import BackboneError, ConfigError, DataError
from adaskip.plan import RouterConfig, Routing, SkipPlan
from adaskip.routers import gates
from adaskip.routers.features import mean_weights, pool
from adaskip.runtime.cache import SkipCache
from adaskip.runtime.cost import CostModel, Ledger
from adaskip.runtime.segment import Segment, cut, take

Mode = Literal["dense", "soft", "skip"]
Observer = Callable[[int, Tensor, Tensor], None]


@dataclass
class Request:
    """Everything one forward pass knows beside the hidden states."""

    mode: Mode
    tokens: Tokens
    prompt: Tensor  # bool (b t): real tokens that stand before the first supervised or generated one
    cache: SkipCache | None = None
    fixed: Tensor | None = None  # bool (l b): decisions made beforehand
    keep: list[Tensor] = field(default_factory=list)  # bool (b) each
    logits: list[Tensor] = field(default_factory=list)  # float32 (b) each
    gates: list[Tensor] = field(default_factory=list)  # float32 (b) each
    memo: dict[Any, Any] = field(default_factory=dict)

    @property
    def offset(self) -> int:
        """Positions of the sequence before this chunk."""
        return self.cache.length if self.cache is not None else 0


class Runtime:
    """What the patched layers of one model share: who decides, how to execute, and the request under way.

    Args:
        backbone: the described model.
        config: what is decided.
        heads: one router per layer, or None when a plan decides.
        plan: a hand-written choice, or None.
    """

    def __init__(
        self, backbone: Backbone, config: RouterConfig, heads: nn.ModuleList | None, plan: SkipPlan | None
    ) -> None:
        self.backbone, self.config, self.heads = backbone, config, heads
        self.planned = None if plan is None else plan.keep(len(backbone.layers))
        self.group = config.group if plan is None else plan.group
        self.cost = CostModel.of(backbone)
        self.mode: Mode = "skip"
        self.temperature = 1.0
        self.noise: torch.Generator | None = None
        self.fixed: Tensor | None = None
        self.prompt_mask: Tensor | None = None
        self.prompt_length: int | None = None
        self.observer: Observer | None = None
        self.replay: list[Tensor] = []
        self.request: Request | None = None
        self.routing: Routing | None = None
        self.ledger: Ledger | None = None
        self.tuple_size = backbone.outputs

    def __getstate__(self) -> dict[str, Any]:
        """What a copy takes along: not the request under way, nor the last one's graph."""
        return {**self.__dict__, "request": None, "routing": None, "ledger": None}

    # -- a request opens and closes around the whole model's forward ------------------------------------------------

    def open(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Read the call's inputs; returns them as the model should see them."""
        if self.mode == "dense" and self.observer is None:
            nothing = torch.ones(0, 0, dtype=torch.bool)
            self.request = Request("dense", Tokens(nothing, None), nothing)
            return inputs
        tokens = read_tokens(self.backbone, inputs, need_vision=self.group == "vision")
        cache = None if self.mode == "dense" else self._cache(inputs)
        if cache is not None and cache.length == 0:
            cache.batch = tokens.valid.shape[0]
        started = cache is not None and cache.length > 0
        if self.group == "vision" and self.mode != "dense" and not started and not self._any_vision(tokens):
            raise DataError(
                "group 'vision': no row of this batch holds a vision token; pass images together with the text, "
                "or attach with RouterConfig(group='all')"
            )
        if started:
            assert cache is not None
            assert cache.routing is not None
            self.request = Request(self.mode, tokens, tokens.valid, cache, cache.routing.keep)
        else:
            fixed = self._fixed(tokens.valid.shape[0])
            self.request = Request(self.mode, tokens, self._prompt(tokens, inputs), cache, fixed)
        if self.mode == "soft":
            return {**inputs, "use_cache": False}
        return inputs if cache is None else {**inputs, "past_key_values": cache}

    def close(self, failed: bool = False) -> None:
        """Publish the routing of the request that ends here."""
        request = self.request
        if request is None:
            return
        if not torch.is_grad_enabled() or failed:
            self.request = None  # else kept: gradient checkpointing runs the layers again in the backward pass
        if failed or not request.keep:
            return
        cache = request.cache
        ledger = cache.ledger if cache is not None and cache.ledger is not None else Ledger(self.group)
        ledger.add(request.tokens.valid, request.tokens.vision)
        if cache is None or cache.routing is None:
            routing = Routing(
                keep=torch.stack(request.keep),
                group=self.group,
                logits=torch.stack(request.logits) if request.logits else None,
                gates=torch.stack(request.gates) if request.gates else None,
            )
        else:
            routing = cache.routing
        if cache is not None:
            cache.ledger, cache.routing = ledger, routing
            cache.length += request.tokens.valid.shape[1]
        self.routing, self.ledger = routing, ledger

    def _cache(self, inputs: dict[str, Any]) -> SkipCache | None:
        given = inputs.get("past_key_values")
        if isinstance(given, SkipCache):
            if self.mode == "soft" and given.length:
                raise DataError(
                    "training mode reads whole sequences; expected no cache, got one that already holds tokens"
                )
            return given if self.mode == "skip" else None
        if given is not None and (type(given).__name__ != "DynamicCache" or given.get_seq_length()):
            raise DataError(
                f"past_key_values: expected an adaskip cache or an empty DynamicCache, got {type(given).__name__} "
                f"holding {given.get_seq_length()} tokens; start from the prompt without a cache"
            )
        use = inputs.get("use_cache")
        wanted = given is not None or (use if use is not None else getattr(self.backbone.config, "use_cache", False))
        return SkipCache(len(self.backbone.layers)) if wanted and self.mode == "skip" else None

    def _fixed(self, batch: int) -> Tensor | None:
        """bool (l b): decisions made beforehand, for this request or by a plan; repeated for beams and samples."""
        if self.fixed is None:
            return None if self.planned is None else self.planned[:, None].expand(-1, batch)
        repeats, rest = divmod(batch, self.fixed.shape[1])
        if rest:
            raise ConfigError(f"routing: expected decisions for {batch} rows, got {self.fixed.shape[1]}")
        return self.fixed.repeat_interleave(repeats, 1)

    def _any_vision(self, tokens: Tokens) -> bool:
        return tokens.vision is not None and bool(tokens.vision.any())

    def _prompt(self, tokens: Tokens, inputs: dict[str, Any]) -> Tensor:
        if self.prompt_mask is not None:
            if self.prompt_mask.shape != tokens.valid.shape:
                raise DataError(
                    f"prompt_mask: expected shape {tuple(tokens.valid.shape)} like input_ids, "
                    f"got {tuple(self.prompt_mask.shape)}"
                )
            return self.prompt_mask.to(tokens.valid) & tokens.valid
        if self.prompt_length is not None:
            return tokens.valid & (torch.arange(tokens.valid.shape[1], device=tokens.valid.device) < self.prompt_length)
        labels = inputs.get("labels")
        if labels is None:
            return tokens.valid
        supervised = (labels != -100).cumsum(1) > 0
        return tokens.valid & ~supervised

    # -- one layer ---------------------------------------------------------------------------------------------------

    def run(self, index: int, layer: nn.Module, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The forward of a patched layer; ``call`` is the original one."""
        request = self.request
        if request is None:
            raise BackboneError(
                f"decoder layer {index} was called outside the model that adaskip was attached to; "
                f"call the whole {type(self.backbone.model).__name__}, or detach() first"
            )
        named = bind_arguments(layer, args, kwargs)
        first = next(iter(named)) if args else "hidden_states"
        states = named.pop(first)
        if index + 1 < len(self.replay):
            if request.fixed is not None:
                request.keep.append(request.fixed[index])
            after = self.replay[index + 1]
            return (after, *[None] * (self.tuple_size - 1)) if self.tuple_size else after
        if request.mode == "dense":
            out = call(states, **named)
            after = self._states(out)
        elif request.mode == "soft":
            out, after = self._soft(request, index, call, states, named)
        else:
            out, after = self._skip(request, index, call, states, named)
        if self.observer is not None:
            self.observer(index, states, after)
        return out

    def _soft(
        self, request: Request, index: int, call: Callable[..., Any], states: Tensor, named: dict[str, Any]
    ) -> tuple[Any, Tensor]:
        """``lerp(left, run, gate)``: both branches are computed, so the gate's gradient is their exact difference."""
        gate = self._gate(request, index, states)
        out = call(states, **named)
        left = states
        if self.group == "vision":
            left = self._run_segment(request, index, call, states, named, self._text(request), states)
        mixed = torch.lerp(left, self._states(out), rearrange(gate, "b -> b 1 1").to(states.dtype))
        return self._like(out, mixed), mixed

    def _skip(
        self, request: Request, index: int, call: Callable[..., Any], states: Tensor, named: dict[str, Any]
    ) -> tuple[Any, Tensor]:
        kept, skipped = self._decide(request, index, states)
        if self.group == "all":
            segments = [Segment(kept)] if kept is None or len(kept) else []
        elif kept is None or skipped is None or not self._chunk_has_vision(request):
            segments = [Segment()]
        else:
            segments = [Segment(kept), self._text(request, skipped)] if len(kept) else [self._text(request)]
        layer = request.cache.layers[index] if request.cache is not None else None
        if (
            len(segments) == 1
            and segments[0] == Segment()
            and (layer is None or layer.follows_on(segments[0], request.offset))
        ):
            out = call(states, **named)
            return out, self._states(out)
        after = states
        for segment in segments:
            after = self._run_segment(request, index, call, states, named, segment, after)
        if request.cache is not None:
            request.cache.commit(index, states.shape[1], states.shape[0])
        return ((after, *[None] * (self.tuple_size - 1)) if self.tuple_size else after), after

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
        result = self._states(out)
        if segment.tokens is None:
            return result if segment.rows is None else into.index_copy(0, segment.rows, result)
        if segment.rows is None and not segment.ragged:
            return into.scatter(1, rearrange(segment.tokens, "r n -> r n 1").expand_as(result), result)
        rows = segment.rows if segment.rows is not None else torch.arange(batch, device=states.device)
        if not segment.ragged:
            return into.index_put((rearrange(rows, "r -> r 1"), segment.tokens), result)
        real = segment.tokens >= 0
        where = (rearrange(rows, "r -> r 1").expand_as(real)[real], segment.tokens[real])
        return into.index_put(where, result[real])

    # -- decisions ---------------------------------------------------------------------------------------------------

    def _logit(self, request: Request, index: int, states: Tensor) -> Tensor:
        assert self.heads is not None
        if "weights" not in request.memo:
            request.memo["weights"] = mean_weights(request.tokens.kinds(request.prompt))
        with torch.autocast(states.device.type, enabled=False):
            return self.heads[index](pool(states.detach(), request.memo["weights"]))

    def _gate(self, request: Request, index: int, states: Tensor) -> Tensor:
        if request.fixed is not None:
            gate = request.fixed[index].to(states.device, torch.float32)
            keep = gate > 0.5
        else:
            logit = self._logit(request, index, states)
            gate = gates.straight_through(logit, self.config.threshold, self.temperature, self.noise)
            keep = gate.detach() > 0.5
            _put(request.logits, index, logit)
        _put(request.keep, index, keep)
        _put(request.gates, index, gate)
        return gate

    @torch.no_grad()
    def _decide(self, request: Request, index: int, states: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The rows that keep (None: all), and the rows that skip (None: none)."""
        if request.fixed is not None:
            keep = request.fixed[index]
        else:
            logit = self._logit(request, index, states)
            keep = gates.hard(logit, self.config.threshold)
            request.logits.append(logit)
        request.keep.append(keep)
        flags = tuple(keep.tolist())
        if flags not in request.memo:
            rows = torch.arange(len(flags), device=states.device)
            on = torch.tensor(flags, device=states.device)
            request.memo[flags] = (None if all(flags) else rows[on], None if all(flags) else rows[~on])
        return request.memo[flags]

    def _chunk_has_vision(self, request: Request) -> bool:
        if "vision" not in request.memo:
            request.memo["vision"] = self._any_vision(request.tokens)
        return request.memo["vision"]

    def _text(self, request: Request, rows: Tensor | None = None) -> Segment:
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

    # -- what a layer returns ----------------------------------------------------------------------------------------

    def _states(self, out: Any) -> Tensor:
        several = isinstance(out, tuple | list)
        self.tuple_size = len(out) if several else 0
        return out[0] if several else out

    def _like(self, out: Any, states: Tensor) -> Any:
        return (states, *out[1:]) if isinstance(out, tuple | list) else states


def _put(values: list[Tensor], index: int, value: Tensor) -> None:
    """Append, or replace when a layer is run again for its gradient."""
    if index < len(values):
        values[index] = value
    else:
        values.append(value)
