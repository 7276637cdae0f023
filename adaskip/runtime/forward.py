"""Run requests through the patched layers of one model: open one, run or skip each layer, close it with its routing."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from adaskip.backbone.inspect import BackboneSpec, Tokens, bind_arguments, read_tokens
from adaskip.errors import BackboneError, ConfigError, DataError
from adaskip.plan import KEEP_ALL, KV, Flags, Group, Routing, Scope, host
from adaskip.policy import Policy
from adaskip.runtime import decide
from adaskip.runtime.attentions import Source, WeightRecord
from adaskip.runtime.cache import SkipCache
from adaskip.runtime.cost import CostModel, Ledger
from adaskip.runtime.execute import Executor, states_of
from adaskip.runtime.facts import Facts
from adaskip.runtime.forget import free
from adaskip.runtime.options import Mode, Options, State
from adaskip.runtime.request import (
    Request,
    check_unpacked,
    embedded_ids,
    read_answering,
    read_cache,
    read_prompt,
    read_routed,
)
from adaskip.runtime.rerun import Reruns
from adaskip.sites import Unit


class Runtime:
    """Hold what the patched layers of one model share: who decides, how to execute, and where requests are found.

    A request itself lies in `State`, by thread.

    Args:
        spec: what the model is made of.
        policy: who decides.
    """

    def __init__(self, spec: BackboneSpec, policy: Policy) -> None:
        self.spec, self.policy, self.target = spec, policy, policy.target
        self.sites = self.target.sites(len(spec.layers))
        # decisions that no input changes: they need no look at the device, and compile to one graph
        self.known = policy.known(len(spec.layers))
        self.known_flags: Flags = () if self.known is None else tuple(self.known.tolist())
        self.cost = CostModel.of(spec, self.unit, self.kv)
        self.facts = Facts(spec, self._untouched)
        names = [part.cache_names[0] for part in spec.sublayers] or [""] * len(spec.layers)
        self.layers = [Executor(i, i, "block", self.target, spec.outputs, name) for i, name in enumerate(names)]
        self.caches = "past_key_values" in inspect.signature(type(spec.model).forward).parameters
        self.state, self.reruns = State(), Reruns()

    @property
    def scope(self) -> Scope:
        """Return how often a router decides."""
        return self.target.scope

    @property
    def unit(self) -> Unit:
        """Return what is left out of a layer."""
        return self.target.unit

    @property
    def group(self) -> Group:
        """Return which positions of a row decisions speak of."""
        return self.target.group

    @property
    def kv(self) -> KV:
        """Return what becomes of the keys and values of what skips."""
        return self.target.kv

    @property
    def mode(self) -> Mode:
        """Return how the calling thread's next pass will run."""
        return self.state.options.mode

    @property
    def request(self) -> Request | None:
        """Return the calling thread's request under way."""
        return self.state.here.request

    @property
    def routing(self) -> Routing | None:
        """Return the decisions of the calling thread's last request."""
        return self.state.here.routing

    @property
    def ledger(self) -> Ledger | None:
        """Return the tokens that the calling thread's last request holds."""
        return self.state.here.ledger

    @property
    def hides_vision(self) -> bool:
        """Return whether the text's attention misses vision tokens that skip, so that what they gave it counts."""
        return self.group == "vision" and self.target.hides

    @property
    def cuts_keys(self) -> bool:
        """Return whether single tokens of a row leave an attention that others of it run, so that masks are cut."""
        return self.target.partial and self.unit != "mlp"

    def sublayers(self, index: int) -> list[tuple[nn.Module, Executor]]:
        """Return the modules inside a layer that are routed in its place, each with what runs it; none for blocks."""
        if self.unit == "block":
            return []
        own = self.spec.sublayers[index]
        return [
            (module, Executor(site, index, part, self.target, own.outputs[module], own.cache_names[1]))
            for site, part in zip(self.sites.of(index), self.sites.parts, strict=True)
            for module in own.modules(part)
        ]

    # -- a request opens and closes around the whole model's forward ------------------------------------------------

    def open(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Read the call's inputs, and return them as the model should see them."""
        # Taken once for the whole pass: nothing that is set meanwhile, here or in another thread, changes it midway.
        slot, options, policy = self.state.here, self.state.take(), self.policy
        mode, slot.soft = options.mode, None
        sources = self.facts.requested_sources(mode, inputs)
        past = inputs.get("past_key_values")
        if mode == "dense" and isinstance(past, SkipCache) and past.gaps:
            raise DataError(
                "past_key_values: expected the cache of a dense request, got one that a routed request left gaps in; "
                "start from the prompt without a cache"
            )
        # A dense pass that nobody watches asks nothing of its inputs; an empty request tells the layers that it is one.
        if mode == "dense" and options.observer is None:
            nothing = torch.ones(0, 0, dtype=torch.bool)
            slot.request = Request("dense", Tokens(nothing, None), nothing, options)
            return inputs
        if (self.scope == "token" or self.kv == "kept") and mode != "dense":
            self.facts.check_kernel()
        if self.cost.head != self.facts.head():
            self.cost = replace(self.cost, head=self.facts.head())
        # The order matters: the cache tells the tokens' offset, the tokens the prompt, the prompt who is to be decided.
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
        if started:  # masks and labels came with the first chunk; what still tells the prompt's end is generate
            assert cache is not None
            prompt = read_answering(tokens, cache.length, options.prompt_length)
        else:
            prompt = read_prompt(tokens, inputs, options.prompt_mask, options.prompt_length)
        request = Request(mode, tokens, prompt, options, cache)
        read_routed(request, options.target or self.target, started)
        if self.scope == "token":
            self._by_token(request)
        elif started:
            assert cache is not None
            assert cache.routing is not None
            request.fixed = cache.routing.keep  # generated tokens follow their prompt
            request.flags = cache.routing.flags or host(request.fixed)
        else:
            request.fixed, request.flags = self._fixed(options, tokens.valid.shape[0])
            if request.fixed is None and mode != "dense":
                check_unpacked(tokens, inputs)
        request.held = policy.held
        request.threshold = policy.threshold if options.threshold is None else options.threshold
        if request.fixed is None and mode != "dense":
            policy.start(request)
        if self.kv == "kept" and cache is None and mode == "skip":  # keys of what skips meet those of what runs there
            request.scratch = SkipCache(len(self.spec.layers), kept=True)
        if sources:
            inputs = self._record(request, sources, inputs)
        slot.request = request
        if mode == "soft":  # training reads whole sequences, and a checkpoint's rerun would write a cache twice
            return {**inputs, "use_cache": False}
        return inputs if cache is None else {**inputs, "past_key_values": cache}

    def _untouched(self) -> AbstractContextManager[None]:
        """Let the model run as it was inside, with nobody watching."""
        return self.state.using(mode="dense", observer=None, replay=())

    def _record(self, request: Request, sources: tuple[Source, ...], inputs: dict[str, Any]) -> dict[str, Any]:
        """Watch the attentions of the request that begins; its output must have names until they are put into it."""
        choice = inputs.get("return_dict")
        as_tuple = not (self.spec.model.config.return_dict if choice is None else choice)
        request.weights = WeightRecord(sources, *_sizes(request), as_tuple)
        own = {module for i, layer in enumerate(self.spec.layers) for module in (layer, *dict(self.sublayers(i)))}
        request.weights.watch(own, lambda: self.state.here.request is request)  # not another thread's
        return {**inputs, "return_dict": True}

    def complete(self, output: Any) -> Any:
        """Return the model's output as the caller gets it: with attention weights where they were asked for."""
        weights = None if self.request is None else self.request.weights
        return output if weights is None else weights.complete(output)

    def close(self, failed: bool = False, heads: int = 0) -> None:
        """Publish the routing of the request that ends here; its cache goes back to before if it ``failed``.

        Args:
            failed: the pass raised.
            heads: positions whose logits were computed.
        """
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
        ledger = cache.ledger if cache is not None and cache.ledger is not None else Ledger(self._routes_answers)
        ledger.add(request.tokens.valid, request.routed, request.answering)
        ledger.heads += heads
        if cache is None or cache.routing is None or request.deciding is not None:
            keep = torch.stack(request.keep) if request.fixed is None else request.fixed.to(request.tokens.valid.device)
            flags = request.flags
            if flags is None and cache is not None and request.deciding is None:
                flags = host(keep)  # every later token will follow them: read from the device once, here
            # drawn decisions have logits with a graph where the pass itself has none
            with torch.set_grad_enabled(request.options.noise is not None or torch.is_grad_enabled()):
                logits, gates = (torch.stack(x) if x else None for x in (request.logits, request.gates))
            routing = Routing(
                keep=keep,
                group=self.group,
                logits=logits,
                gates=gates,
                tokens=request.deciding,
                flags=flags,
            )
            if cache is not None and cache.routing is not None:
                routing = cache.routing.join(routing)
        else:
            routing = cache.routing
        if cache is not None:
            cache.ledger, cache.routing = ledger, routing
            free(self.policy, request)
            cache.length += request.tokens.valid.shape[1]
            cache.note()
        slot.routing, slot.ledger = routing, ledger

    def _cache(self, mode: Mode, inputs: dict[str, Any]) -> SkipCache | None:
        """Return the cache that this pass fills: the caller's, or a new one; None where it is to leave none."""
        cache, use = inputs.get("past_key_values"), inputs.get("use_cache")
        use = use if use is not None else getattr(self.facts.configs[1], "use_cache", False)
        if not self.caches or not read_cache(cache, mode, use):
            return None
        if isinstance(cache, SkipCache):
            return cache
        return SkipCache(len(self.spec.layers), self.kv == "kept", self.target.partial)

    @property
    def _routes_answers(self) -> bool:
        """Return whether decisions speak of generated tokens."""
        return self.group == "all" and self.target.phase != "prefill"

    def _by_token(self, request: Request) -> None:
        """Let the request's tokens decide for themselves, or as ``fixed`` says; tokens it does not reach all run."""
        request.deciding = request.tokens.valid if request.routed is None else request.routed
        if request.options.fixed is None and self.known is None:
            return
        batch, length = request.deciding.shape
        fixed, _ = self._fixed(request.options, batch)
        assert fixed is not None
        if fixed.dim() == 3:
            fixed = fixed[..., request.offset : request.offset + length]
            fixed = torch.nn.functional.pad(fixed, (0, length - fixed.shape[-1]), value=True)
        else:
            fixed = fixed[..., None].expand(-1, -1, length)
        request.fixed = fixed.to(request.deciding.device) & request.deciding

    def _fixed(self, options: Options, batch: int) -> tuple[Tensor | None, tuple[Flags, ...] | None]:
        """Return decisions made beforehand, bool (l b), and the same on the host; None where there are none.

        They are the call's, else the policy's for every input; a call's rows are repeated for beams and samples.
        """
        if options.fixed is None:
            if self.known is None:
                return None, None
            known, flags = self._sure(options)
            return known[:, None].expand(-1, batch), tuple((keeps,) * batch for keeps in flags)
        repeats, rest = divmod(batch, options.fixed.shape[1])
        if rest:
            raise ConfigError(f"routing: expected decisions for {batch} rows, got {options.fixed.shape[1]}")
        fixed = options.fixed.repeat_interleave(repeats, 1)
        return fixed, host(fixed) if self.scope == "prompt" else None

    def _sure(self, options: Options) -> tuple[Tensor, Flags]:
        """Return what the policy knows beforehand, bool (l), with the layers that run whatever it says."""
        assert self.known is not None
        threshold = self.policy.threshold if options.threshold is None else options.threshold
        must = range(len(self.known)) if threshold <= KEEP_ALL else self.policy.held
        if not must:
            return self.known, self.known_flags
        flags = tuple(keeps or layer in must for layer, keeps in enumerate(self.known_flags))
        return torch.tensor(flags, device=self.known.device), flags

    # -- one layer ---------------------------------------------------------------------------------------------------

    def run(self, index: int, layer: nn.Module, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run a patched layer, whose own forward is ``call``."""
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
        """Decide about a layer and run it; or decide, and leave it to its sublayers to follow."""
        replay, observer = request.options.replay, request.options.observer
        executor, call = self.layers[index], self._listen(request, index, layer, call)
        if request.mode != "dense":
            states = self.policy.enter(states, request) if index == 0 and self.policy.enters else states
            call = decide.watched(self.policy, request, index, layer, states, call)
        if index + 1 < len(replay):
            return executor.wrap(replay[index + 1], request)
        if request.mode != "dense":
            decide.settle(self.policy, request, self.sites.of(index), states)
        if request.mode == "dense" or self.unit != "block":
            out = call(states, **named)
        else:
            out = executor.execute(request, call, states, named, request.decisions[index])
        if observer is not None:
            observer(index, states, states_of(out))
        return out

    def run_sublayer(
        self, executor: Executor, module: nn.Module, call: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        """Run a patched sublayer, whose own forward is ``call``, inside its layer's."""
        slot = self.state.here
        named = bind_arguments(module, args, kwargs)
        request = slot.request
        if request is None and torch.is_grad_enabled():  # the layer's own forward runs again, without its routed one
            request = self.reruns.find(named, slot.soft)
        if request is None or request.mode == "dense":
            return call(*args, **kwargs)
        states = named.pop("hidden_states" if "hidden_states" in named else next(iter(named)))
        call = self._listen(request, executor.index, module, call)
        return executor.execute(request, call, states, named, request.decisions[executor.site])

    def _listen(self, request: Request, index: int, module: nn.Module, call: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap the call of a patched module, so that the weights of its attention are noted."""
        if request.weights is None:
            return call
        request.weights.part = None
        return request.weights.listen(index, module, call)


def _sizes(request: Request) -> tuple[int, int, int]:
    """Return the rows of a request, the positions before its chunk, and those of its chunk."""
    batch, length = request.tokens.valid.shape
    return batch, request.offset, length
