"""What the patched layers of one model share: who decides, how to execute, and the request under way."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from adaskip.backbone import Backbone, Tokens, bind_arguments, read_tokens
from adaskip.errors import BackboneError, ConfigError, DataError
from adaskip.plan import Flags, RouterConfig, Routing, Scope, SkipPlan, Unit, host, mean_over
from adaskip.routers import gates
from adaskip.routers.features import mean_weights, pool
from adaskip.runtime.attentions import Source, WeightRecord, asks
from adaskip.runtime.cache import SkipCache
from adaskip.runtime.cost import CostModel, Ledger
from adaskip.runtime.execute import Executor, Keep
from adaskip.runtime.facts import Facts
from adaskip.runtime.request import Mode, Request, check_unpacked, read_cache, read_prompt

Observer = Callable[[int, Tensor, Tensor], None]


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
        self.planned_flags: Flags = () if self.planned is None else tuple(self.planned.tolist())
        decides = config if plan is None else plan
        self.scope: Scope = config.scope if plan is None else "prompt"
        self.group, self.unit, self.kv = decides.group, decides.unit, decides.kv
        self.cost = CostModel.of(backbone, self.unit, self.kv)
        self.facts = Facts(backbone, self._untouched)
        self.layers = [self._executor(i, "block", backbone.outputs) for i in range(len(backbone.layers))]
        self.caches = "past_key_values" in inspect.signature(type(backbone.model).forward).parameters
        self.mode: Mode = "skip"
        self.temperature = 1.0
        self.noise: torch.Generator | None = None
        self.fixed: Tensor | None = None
        self.prompt_mask: Tensor | None = None
        self.prompt_length: int | None = None
        self.prompt_ids: Tensor | None = None
        self.observer: Observer | None = None
        self.replay: list[Tensor] = []
        self.request: Request | None = None
        self.routing: Routing | None = None
        self.ledger: Ledger | None = None

    @property
    def hides_vision(self) -> bool:
        """Whether vision tokens that skip are gone for the text's attention, so that what it had of them counts."""
        return self.group == "vision" and self.kv == "absent" and self.unit != "mlp"

    @property
    def cuts_keys(self) -> bool:
        """Whether single tokens of a row leave an attention that others of it run, so that masks have to be cut."""
        return (self.group == "vision" or self.scope == "token") and self.unit != "mlp" and self.mode != "dense"

    def _executor(self, index: int, unit: Unit, outputs: int) -> Executor:
        names = {"block": 0, "attention": 1}
        named = self.backbone.sublayers[index].cache_names[names[unit]] if self.kv == "kept" else ""
        return Executor(index, unit, self.group, self.kv, outputs, named)

    def sublayers(self, index: int) -> list[tuple[nn.Module, Executor]]:
        """What of a layer is routed where not the layer itself is, with what runs it."""
        if self.unit == "block":
            return []
        parts = self.backbone.sublayers[index]
        modules = (parts.attention,) if self.unit == "attention" else parts.mlp
        return [(module, self._executor(index, self.unit, parts.outputs[module])) for module in modules]

    def __getstate__(self) -> dict[str, Any]:
        """What a copy takes along: not the request under way, nor the last one's graph."""
        return {**self.__dict__, "request": None, "routing": None, "ledger": None}

    # -- a request opens and closes around the whole model's forward ------------------------------------------------

    def open(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Read the call's inputs; returns them as the model should see them."""
        sources = self._weight_sources(inputs)
        given = inputs.get("past_key_values")
        if self.mode == "dense" and isinstance(given, SkipCache) and given.length:
            raise DataError(
                "past_key_values: expected the cache of a dense request, got one that a routed request left gaps in; "
                "start from the prompt without a cache"
            )
        if self.mode == "dense" and self.observer is None:
            nothing = torch.ones(0, 0, dtype=torch.bool)
            self.request = Request("dense", Tokens(nothing, None), nothing)
            return inputs
        if (self.scope == "token" or self.kv == "kept") and self.mode != "dense":
            self.facts.check_kernel()
        if self.cost.head != self.facts.head():
            self.cost = replace(self.cost, head=self.facts.head())
        cache = None if self.mode == "dense" else self._cache(inputs)
        started = cache is not None and cache.routing is not None
        tokens = read_tokens(self.backbone, inputs, None if started else self._embedded_ids(inputs))
        if cache is not None and started and cache.batch != tokens.valid.shape[0]:
            raise DataError(
                f"past_key_values: expected as many rows as the cache holds, {cache.batch}, got {tokens.valid.shape[0]}"
            )
        if self.cuts_keys and not started and inputs.get("token_type_ids") is None and self.facts.reads_ahead():
            raise DataError(
                f"token_type_ids: without them {type(self.backbone.model).__name__} reads its whole input both ways, "
                "so what runs cannot be cut out of it; pass everything that the processor returned"
            )
        if cache is not None and cache.length == 0:
            cache.batch = tokens.valid.shape[0]
        if self.scope == "token":
            self.request = self._by_token(tokens, cache)
        elif started:
            assert cache is not None
            assert cache.routing is not None
            decided = cache.routing
            flags = decided.flags or host(decided.keep)
            self.request = Request(self.mode, tokens, tokens.valid, cache, fixed=decided.keep, flags=flags)
        else:
            fixed, known = self._fixed(tokens.valid.shape[0])
            if fixed is None and self.mode != "dense":
                check_unpacked(tokens, inputs)
            prompt = read_prompt(tokens, inputs, self.prompt_mask, self.prompt_length)
            self.request = Request(self.mode, tokens, prompt, cache, fixed=fixed, flags=known)
        if self.kv == "kept" and cache is None and self.mode == "skip":
            self.request.scratch = SkipCache(len(self.backbone.layers), kept=True)
        if sources:
            inputs = self._record(sources, inputs)
        if self.mode == "soft":
            return {**inputs, "use_cache": False}
        return inputs if cache is None else {**inputs, "past_key_values": cache}

    def _weight_sources(self, inputs: dict[str, Any]) -> tuple[Source, ...]:
        """Where the layers' attention weights come from, if the caller asks for them and the kernel gives any."""
        if self.mode == "dense":
            return ()
        if asks(inputs, "output_router_logits", self.facts.configs):
            raise ConfigError(
                "output_router_logits: transformers collects one entry for every call of experts, which is not one a "
                "layer where layers are skipped; leave it out, or ask inside model.dense()"
            )
        if not asks(inputs, "output_attentions", self.facts.configs):
            return ()
        if self.mode == "soft":
            raise ConfigError(
                "output_attentions: in training mode both branches of every layer are computed and mixed, so there is "
                "no one attention to return; leave it out, or call the model in eval()"
            )
        return self.facts.weight_sources()

    @contextmanager
    def _untouched(self) -> Iterator[None]:
        """Inside: the model as it was, and nobody watching."""
        before = self.mode, self.observer, self.replay
        self.mode, self.observer, self.replay = "dense", None, []
        try:
            yield
        finally:
            self.mode, self.observer, self.replay = before

    def _record(self, sources: tuple[Source, ...], inputs: dict[str, Any]) -> dict[str, Any]:
        """Watch the attentions of the request that begins; its output must have names for a while."""
        request = self.request
        assert request is not None
        named = inputs.get("return_dict")
        as_tuple = not (self.backbone.model.config.return_dict if named is None else named)
        request.weights = WeightRecord(sources, *_sizes(request), as_tuple)
        own = {module for i, layer in enumerate(self.backbone.layers) for module in (layer, *dict(self.sublayers(i)))}
        request.weights.watch(own, lambda: self.request is request)
        return {**inputs, "return_dict": True}

    def complete(self, output: Any) -> Any:
        """What the caller gets of the model's output."""
        weights = None if self.request is None else self.request.weights
        return output if weights is None else weights.complete(output)

    def close(self, failed: bool = False, heads: int = 0) -> None:
        """Publish the routing of the request that ends here, ``heads`` positions of which have got logits."""
        request = self.request
        if request is None:
            return
        if failed or request.mode != "soft" or not torch.is_grad_enabled():
            self.request = None  # else kept: gradient checkpointing runs the layers again in the backward pass
        if failed and request.cache is not None:
            request.cache.undo()
        if failed or request.mode == "dense" or (request.fixed is None and not request.keep):
            return
        cache = request.cache
        ledger = cache.ledger if cache is not None and cache.ledger is not None else Ledger(self.group)
        ledger.add(request.tokens.valid, request.tokens.vision)
        ledger.heads += heads
        if cache is None or cache.routing is None or request.deciding is not None:
            keep = torch.stack(request.keep) if request.fixed is None else request.fixed
            known = request.flags
            if known is None and cache is not None and request.deciding is None:
                known = host(keep)
            routing = Routing(
                keep=keep,
                group=self.group,
                logits=torch.stack(request.logits) if request.logits else None,
                gates=torch.stack(request.gates) if request.gates else None,
                tokens=request.deciding,
                flags=known,
            )
            if cache is not None and cache.routing is not None:
                routing = cache.routing.join(routing)
        else:
            routing = cache.routing
        if cache is not None:
            cache.ledger, cache.routing = ledger, routing
            cache.length += request.tokens.valid.shape[1]
            cache.note()
        self.routing, self.ledger = routing, ledger

    def _cache(self, inputs: dict[str, Any]) -> SkipCache | None:
        cache, use = inputs.get("past_key_values"), inputs.get("use_cache")
        use = use if use is not None else getattr(self.facts.configs[1], "use_cache", False)
        if not self.caches or not read_cache(cache, self.mode, use):
            return None
        if isinstance(cache, SkipCache):
            return cache
        return SkipCache(len(self.backbone.layers), self.kv == "kept", self.scope == "token" or self.group == "vision")

    def _embedded_ids(self, inputs: dict[str, Any]) -> Tensor | None:
        """long (b t): the ids given to ``generate`` beside the ``inputs_embeds`` of its prompt; None without them."""
        ids, states = self.prompt_ids, inputs.get("inputs_embeds")
        if ids is None or states is None or ids.shape[1:] != states.shape[1:2] or len(states) % len(ids):
            return None
        return ids.repeat_interleave(len(states) // len(ids), 0)  # rows are repeated for beams and samples

    def _by_token(self, tokens: Tokens, cache: SkipCache | None) -> Request:
        """A request whose tokens decide for themselves, or as ``fixed`` says; beyond what it says all run."""
        deciding = tokens.vision if self.group == "vision" and tokens.vision is not None else tokens.valid
        request = Request(self.mode, tokens, tokens.valid, cache, deciding=deciding)
        if self.fixed is None:
            return request
        batch, length = tokens.valid.shape
        fixed, _ = self._fixed(batch)
        assert fixed is not None
        if fixed.dim() == 3:
            fixed = fixed[..., request.offset : request.offset + length]
            fixed = torch.nn.functional.pad(fixed, (0, length - fixed.shape[-1]), value=True)
        else:
            fixed = fixed[..., None].expand(-1, -1, length)
        request.fixed = fixed.to(deciding.device) & deciding
        return request

    def _fixed(self, batch: int) -> tuple[Tensor | None, tuple[Flags, ...] | None]:
        """bool (l b): decisions made beforehand, for this request or by a plan; repeated for beams and samples.

        And the same on the host: a plan's are known there, a routing's are read once.
        """
        if self.fixed is None:
            if self.planned is None:
                return None, None
            return self.planned[:, None].expand(-1, batch), tuple((keeps,) * batch for keeps in self.planned_flags)
        repeats, rest = divmod(batch, self.fixed.shape[1])
        if rest:
            raise ConfigError(f"routing: expected decisions for {batch} rows, got {self.fixed.shape[1]}")
        fixed = self.fixed.repeat_interleave(repeats, 1)
        return fixed, host(fixed) if self.scope == "prompt" else None

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
        executor = self.layers[index]
        call = self._listen(request, index, layer, call)
        if index + 1 < len(self.replay):
            return executor.wrap(self.replay[index + 1], request)
        if request.mode == "dense":
            out = call(states, **named)
        else:
            soft = request.mode == "soft"
            decision = self._gate(request, index, states) if soft else self._keep(request, index, states)
            if self.unit == "block":
                out = executor.execute(request, call, states, named, decision)
            else:
                request.decision = decision
                out = call(states, **named)
        if self.observer is not None:
            self.observer(index, states, executor.states(out))
        return out

    def run_sublayer(
        self, executor: Executor, module: nn.Module, call: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        """The forward of a patched sublayer, inside its layer's."""
        request = self.request
        if request is None or request.mode == "dense":
            return call(*args, **kwargs)
        named = bind_arguments(module, args, kwargs)
        states = named.pop("hidden_states" if "hidden_states" in named else next(iter(named)))
        call = self._listen(request, executor.index, module, call)
        return executor.execute(request, call, states, named, request.decision)

    def _listen(self, request: Request, index: int, module: nn.Module, call: Callable[..., Any]) -> Callable[..., Any]:
        """The call of a patched module, heard by whoever puts the attention's weights together."""
        if request.weights is None:
            return call
        request.weights.part = None
        return request.weights.listen(index, module, call)

    # -- decisions ---------------------------------------------------------------------------------------------------

    def _logit(self, request: Request, index: int, states: Tensor) -> Tensor:
        assert self.heads is not None
        if request.deciding is not None:
            seen = states.detach().masked_fill(~rearrange(request.deciding, "b t -> b t 1"), 0.0).float()
            with torch.autocast(states.device.type, enabled=False):
                logits = self.heads[index](rearrange(seen, "b t d -> (b t) 1 d"))
            each: Tensor = rearrange(logits, "(b t) -> b t", b=len(states))
            return each
        if "weights" not in request.memo:
            weights = mean_weights(request.tokens.kinds(request.prompt))
            request.memo["weights"] = weights, bool((weights == 0).all(1).any())
        with torch.autocast(states.device.type, enabled=False):
            logit: Tensor = self.heads[index](pool(states.detach(), *request.memo["weights"]))
        return logit

    def _gate(self, request: Request, index: int, states: Tensor) -> Tensor:
        if request.fixed is not None:
            gate = request.fixed[index].to(states.device, torch.float32)
            keep = gate > 0.5
        else:
            logit = self._logit(request, index, states)
            gate = gates.straight_through(logit, self.config.threshold, self.temperature, self.noise)
            if index in self.config.held:
                gate = gate + (1.0 - gate).detach()  # runs, and its router goes on learning
            keep = gate.detach() > 0.5
            _put(request.logits, index, logit)
        _put(request.keep, index, keep if request.deciding is None else keep & request.deciding)
        _put(request.gates, index, gate if request.deciding is None else mean_over(request.deciding, gate))
        return gate if request.deciding is None else torch.where(request.deciding, gate, 1.0)

    @torch.no_grad()
    def _keep(self, request: Request, index: int, states: Tensor) -> Keep:
        """Which rows or tokens run; only a router's fresh decision about rows has to be read from the device."""
        if request.flags is not None:
            return request.flags[index]
        if request.fixed is not None and request.deciding is not None:
            return request.fixed[index] | ~request.deciding
        logit = self._logit(request, index, states)
        keep = gates.hard(logit, self.config.threshold)
        keep = torch.ones_like(keep) if index in self.config.held else keep
        _put(request.logits, index, logit)
        if request.deciding is not None:
            _put(request.keep, index, keep & request.deciding)
            return keep | ~request.deciding
        _put(request.keep, index, keep)
        return tuple(keep.tolist())


def _sizes(request: Request) -> tuple[int, int, int]:
    """Rows of a request, positions before its chunk, and positions of its chunk."""
    batch, length = request.tokens.valid.shape
    return batch, request.offset, length


def _put(values: list[Tensor], index: int, value: Tensor) -> None:
    """Append, or replace when a layer is run again for its gradient."""
    if index < len(values):
        values[index] = value
    else:
        values.append(value)
