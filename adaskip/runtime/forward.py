"""What the patched layers of one model share: who decides and how to execute. Requests lie in `State`, by thread."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from adaskip.backbone.inspect import BackboneSpec, Tokens, bind_arguments, read_tokens
from adaskip.errors import BackboneError, ConfigError, DataError
from adaskip.plan import Flags, RouterConfig, Routing, Scope, SkipPlan, Unit, host, mean_over
from adaskip.routers import gates
from adaskip.routers.features import mean_weights, pool
from adaskip.runtime.attentions import Source, WeightRecord
from adaskip.runtime.cache import SkipCache
from adaskip.runtime.cost import CostModel, Ledger
from adaskip.runtime.execute import Executor, Keep, states_of
from adaskip.runtime.facts import Facts
from adaskip.runtime.options import Mode, Options, State
from adaskip.runtime.request import Request, check_unpacked, embedded_ids, read_cache, read_prompt
from adaskip.runtime.rerun import Reruns


class Runtime:
    """What the patched layers of one model share: who decides, how to execute, and where requests are found.

    Args:
        spec: what the model is made of.
        config: what is decided.
        heads: one router per layer, or None when a plan decides.
        plan: a hand-written choice, or None.
    """

    def __init__(
        self, spec: BackboneSpec, config: RouterConfig, heads: nn.ModuleList | None, plan: SkipPlan | None
    ) -> None:
        self.spec, self.config, self.heads = spec, config, heads
        self.planned = None if plan is None else plan.keep(len(spec.layers))
        self.planned_flags: Flags = () if self.planned is None else tuple(self.planned.tolist())
        decides = config if plan is None else plan
        self.scope: Scope = config.scope if plan is None else "prompt"
        self.group, self.unit, self.kv = decides.group, decides.unit, decides.kv
        self.cost = CostModel.of(spec, self.unit, self.kv)
        self.facts = Facts(spec, self._untouched)
        self.layers = [self._executor(i, "block", spec.outputs) for i in range(len(spec.layers))]
        self.caches = "past_key_values" in inspect.signature(type(spec.model).forward).parameters
        self.state, self.reruns = State(), Reruns()

    @property
    def mode(self) -> Mode:
        """How the calling thread's next pass will run."""
        return self.state.options.mode

    @property
    def request(self) -> Request | None:
        """The calling thread's request under way."""
        return self.state.here.request

    @property
    def routing(self) -> Routing | None:
        """The decisions of the calling thread's last request."""
        return self.state.here.routing

    @property
    def ledger(self) -> Ledger | None:
        """What the calling thread's last request ran."""
        return self.state.here.ledger

    @property
    def hides_vision(self) -> bool:
        """Whether vision tokens that skip are gone for the text's attention, so that what it had of them counts."""
        return self.group == "vision" and self.kv == "absent" and self.unit != "mlp"

    @property
    def cuts_keys(self) -> bool:
        """Whether single tokens of a row leave an attention that others of it run, so that masks have to be cut."""
        return (self.group == "vision" or self.scope == "token") and self.unit != "mlp"

    def _executor(self, index: int, unit: Unit, outputs: int) -> Executor:
        names = self.spec.sublayers[index].cache_names if self.kv == "kept" else ("", "")
        return Executor(index, unit, self.group, self.kv, outputs, names[0 if unit == "block" else 1])

    def sublayers(self, index: int) -> list[tuple[nn.Module, Executor]]:
        """What of a layer is routed where not the layer itself is, with what runs it."""
        if self.unit == "block":
            return []
        parts = self.spec.sublayers[index]
        modules = (parts.attention,) if self.unit == "attention" else parts.mlp
        return [(module, self._executor(index, self.unit, parts.outputs[module])) for module in modules]

    # -- a request opens and closes around the whole model's forward ------------------------------------------------

    def open(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Read the call's inputs; returns them as the model should see them."""
        # Taken once for the whole pass: nothing that is set meanwhile, here or in another thread, changes it midway.
        slot, options, config = self.state.here, self.state.take(), self.config
        mode, slot.soft = options.mode, None
        sources = self.facts.requested_sources(mode, inputs)
        given = inputs.get("past_key_values")
        if mode == "dense" and isinstance(given, SkipCache) and given.length:
            raise DataError(
                "past_key_values: expected the cache of a dense request, got one that a routed request left gaps in; "
                "start from the prompt without a cache"
            )
        if mode == "dense" and options.observer is None:
            nothing = torch.ones(0, 0, dtype=torch.bool)
            slot.request = Request("dense", Tokens(nothing, None), nothing, options)
            return inputs
        if (self.scope == "token" or self.kv == "kept") and mode != "dense":
            self.facts.check_kernel()
        if self.cost.head != self.facts.head():
            self.cost = replace(self.cost, head=self.facts.head())
        cache = None if mode == "dense" else self._cache(mode, inputs)
        started = cache is not None and cache.routing is not None
        tokens = read_tokens(self.spec, inputs, None if started else embedded_ids(options, inputs))
        if cache is not None and started and cache.batch != tokens.valid.shape[0]:
            raise DataError(
                f"past_key_values: expected as many rows as the cache holds, {cache.batch}, got {tokens.valid.shape[0]}"
            )
        cuts = self.cuts_keys and mode != "dense"
        if cuts and not started and inputs.get("token_type_ids") is None and self.facts.reads_ahead():
            raise DataError(
                f"token_type_ids: without them {type(self.spec.model).__name__} reads its whole input both ways, "
                "so what runs cannot be cut out of it; pass everything that the processor returned"
            )
        if cache is not None and cache.length == 0:
            cache.batch = tokens.valid.shape[0]
        if self.scope == "token":
            request = self._by_token(options, tokens, cache)
        elif started:
            assert cache is not None
            assert cache.routing is not None
            decided = cache.routing
            flags = decided.flags or host(decided.keep)
            request = Request(mode, tokens, tokens.valid, options, cache, fixed=decided.keep, flags=flags)
        else:
            fixed, known = self._fixed(options, tokens.valid.shape[0])
            if fixed is None and mode != "dense":
                check_unpacked(tokens, inputs)
            prompt = read_prompt(tokens, inputs, options.prompt_mask, options.prompt_length)
            request = Request(mode, tokens, prompt, options, cache, fixed=fixed, flags=known)
        request.held = config.held
        request.threshold = config.threshold if options.threshold is None else options.threshold
        if self.kv == "kept" and cache is None and mode == "skip":
            request.scratch = SkipCache(len(self.spec.layers), kept=True)
        if sources:
            inputs = self._record(request, sources, inputs)
        slot.request = request
        if mode == "soft":
            return {**inputs, "use_cache": False}
        return inputs if cache is None else {**inputs, "past_key_values": cache}

    def _untouched(self) -> AbstractContextManager[None]:
        """Inside: the model as it was, and nobody watching."""
        return self.state.using(mode="dense", observer=None, replay=())

    def _record(self, request: Request, sources: tuple[Source, ...], inputs: dict[str, Any]) -> dict[str, Any]:
        """Watch the attentions of the request that begins; its output must have names for a while."""
        named = inputs.get("return_dict")
        as_tuple = not (self.spec.model.config.return_dict if named is None else named)
        request.weights = WeightRecord(sources, *_sizes(request), as_tuple)
        own = {module for i, layer in enumerate(self.spec.layers) for module in (layer, *dict(self.sublayers(i)))}
        request.weights.watch(own, lambda: self.state.here.request is request)  # not another thread's
        return {**inputs, "return_dict": True}

    def complete(self, output: Any) -> Any:
        """What the caller gets of the model's output."""
        weights = None if self.request is None else self.request.weights
        return output if weights is None else weights.complete(output)

    def close(self, failed: bool = False, heads: int = 0) -> None:
        """Publish the routing of the request that ends here, ``heads`` positions of which have got logits."""
        slot = self.state.here
        request, slot.request = slot.request, None
        if request is None:
            return
        if not failed and request.mode == "soft" and torch.is_grad_enabled():
            slot.soft = request  # for `gates`, and for layers that run again in the backward pass
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
        slot.routing, slot.ledger = routing, ledger

    def _cache(self, mode: Mode, inputs: dict[str, Any]) -> SkipCache | None:
        cache, use = inputs.get("past_key_values"), inputs.get("use_cache")
        use = use if use is not None else getattr(self.facts.configs[1], "use_cache", False)
        if not self.caches or not read_cache(cache, mode, use):
            return None
        if isinstance(cache, SkipCache):
            return cache
        return SkipCache(len(self.spec.layers), self.kv == "kept", self.scope == "token" or self.group == "vision")

    def _by_token(self, options: Options, tokens: Tokens, cache: SkipCache | None) -> Request:
        """A request whose tokens decide for themselves, or as ``fixed`` says; beyond what it says all run."""
        deciding = tokens.vision if self.group == "vision" and tokens.vision is not None else tokens.valid
        request = Request(options.mode, tokens, tokens.valid, options, cache, deciding=deciding)
        if options.fixed is None:
            return request
        batch, length = tokens.valid.shape
        fixed, _ = self._fixed(options, batch)
        assert fixed is not None
        if fixed.dim() == 3:
            fixed = fixed[..., request.offset : request.offset + length]
            fixed = torch.nn.functional.pad(fixed, (0, length - fixed.shape[-1]), value=True)
        else:
            fixed = fixed[..., None].expand(-1, -1, length)
        request.fixed = fixed.to(deciding.device) & deciding
        return request

    def _fixed(self, options: Options, batch: int) -> tuple[Tensor | None, tuple[Flags, ...] | None]:
        """bool (l b): decisions made beforehand, for this request or by a plan; repeated for beams and samples.

        And the same on the host: a plan's are known there, a routing's are read once.
        """
        if options.fixed is None:
            if self.planned is None:
                return None, None
            return self.planned[:, None].expand(-1, batch), tuple((keeps,) * batch for keeps in self.planned_flags)
        repeats, rest = divmod(batch, options.fixed.shape[1])
        if rest:
            raise ConfigError(f"routing: expected decisions for {batch} rows, got {options.fixed.shape[1]}")
        fixed = options.fixed.repeat_interleave(repeats, 1)
        return fixed, host(fixed) if self.scope == "prompt" else None

    # -- one layer ---------------------------------------------------------------------------------------------------

    def run(self, index: int, layer: nn.Module, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The forward of a patched layer; ``call`` is the original one."""
        slot = self.state.here
        named = bind_arguments(layer, args, kwargs)
        first = next(iter(named)) if args else "hidden_states"
        states = named.pop(first)
        request = slot.request
        if request is None:
            return self._run_again(index, layer, call, states, named)
        self.reruns.note(request, named)
        return self._run(request, index, layer, call, states, named)

    def _run_again(
        self, index: int, layer: nn.Module, call: Callable[..., Any], states: Tensor, named: dict[str, Any]
    ) -> Any:
        """Run a layer for its gradient, after its pass: its sublayers must see the request under way meanwhile."""
        slot = self.state.here
        request = self.reruns.find(named, slot.soft) if torch.is_grad_enabled() else None
        if request is None:
            raise BackboneError(
                f"decoder layer {index} was called outside the model that adaskip was attached to; "
                f"call the whole {type(self.spec.model).__name__}, or detach() first"
            )
        slot.request = request
        try:
            return self._run(request, index, layer, call, states, named)
        finally:
            slot.request = None

    def _run(
        self,
        request: Request,
        index: int,
        layer: nn.Module,
        call: Callable[..., Any],
        states: Tensor,
        named: dict[str, Any],
    ) -> Any:
        replay, observer = request.options.replay, request.options.observer
        executor, call = self.layers[index], self._listen(request, index, layer, call)
        if index + 1 < len(replay):
            return executor.wrap(replay[index + 1], request)
        if request.mode == "dense":
            out = call(states, **named)
        else:
            soft = request.mode == "soft"
            with torch.set_grad_enabled(request.learns):  # which a reentrant checkpoint turns off
                decision = self._gate(request, index, states) if soft else self._keep(request, index, states)
            if self.unit == "block":
                out = executor.execute(request, call, states, named, decision)
            else:
                request.decisions[index] = decision
                out = call(states, **named)
        if observer is not None:
            observer(index, states, states_of(out))
        return out

    def run_sublayer(
        self, executor: Executor, module: nn.Module, call: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        """The forward of a patched sublayer, inside its layer's."""
        slot = self.state.here
        named = bind_arguments(module, args, kwargs)
        request = slot.request
        if request is None and torch.is_grad_enabled():  # the layer's own forward runs again, without its routed one
            request = self.reruns.find(named, slot.soft)
        if request is None or request.mode == "dense":
            return call(*args, **kwargs)
        states = named.pop("hidden_states" if "hidden_states" in named else next(iter(named)))
        call = self._listen(request, executor.index, module, call)
        return executor.execute(request, call, states, named, request.decisions[executor.index])

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
            temperature, noise = request.options.temperature, request.noise(index)
            gate = gates.straight_through(logit, request.threshold, temperature, noise)
            if index in request.held:
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
        keep = gates.hard(logit, request.threshold)
        keep = torch.ones_like(keep) if index in request.held else keep
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
