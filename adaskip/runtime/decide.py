"""Turn what a policy says into what a layer does: hard decisions at inference, straight-through gates in training."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from adaskip.backbone.attention import AttentionCall, intercept_attention
from adaskip.plan import KEEP_ALL, mean_over
from adaskip.policy import Policy
from adaskip.runtime import gates
from adaskip.runtime.execute import Keep, states_of
from adaskip.runtime.forget import hiding
from adaskip.runtime.request import Request
from adaskip.runtime.segment import take


def settle(policy: Policy, request: Request, sites: Iterable[int], states: Tensor) -> None:
    """Decide about the sites of one layer, all of them by the ``states`` that enter it, and note it in the request.

    The MLP's decision does not wait for what the attention does: both are known before the layer runs, so that a rerun
    needs nothing but the layer's states, and one look at them serves both.
    """
    with torch.set_grad_enabled(request.learns):  # which a reentrant checkpoint turns off
        for site in sites:
            request.decisions[site] = (gate if request.mode == "soft" else keep)(policy, request, site, states)


def gate(policy: Policy, request: Request, index: int, states: Tensor) -> Tensor:
    """Return float32 gates (b), scope token (b t), of a site in a soft pass: 0 or 1, with a slope where logits are."""
    if request.fixed is not None:
        gate = request.fixed[index].to(states.device, torch.float32)
    else:
        choice = policy.decide(index, states, request)  # a learned policy's logits, or another's own booleans
        if choice.dtype == torch.bool:
            gate = _certain(choice, request, index).float()
        else:
            noise = request.noise(index)
            gate = gates.straight_through(choice, request.threshold, request.options.temperature, noise)
            _put(request.logits, index, choice)
            if _must_run(request, index):
                gate = gate + (1.0 - gate).detach()  # runs, and its router goes on learning
    keep = gate.detach() > 0.5
    if request.deciding is None:
        _put(request.keep, index, keep)
        _put(request.gates, index, gate)
        return gate
    # scope token: what does not decide, such as padding, runs, and has no part in what is recorded
    _put(request.keep, index, keep & request.deciding)
    _put(request.gates, index, mean_over(request.deciding, gate))
    return torch.where(request.deciding, gate, 1.0)


@torch.no_grad()
def keep(policy: Policy, request: Request, index: int, states: Tensor) -> Keep:
    """Return which rows or tokens run a site; only a fresh decision about rows has to be read from the device.

    Where there is noise the decision is drawn, and the router's own probability keeps its graph.
    """
    if request.flags is not None:
        return request.flags[index]
    if request.fixed is not None and request.deciding is not None:
        return request.fixed[index] | ~request.deciding
    draws = request.options.noise is not None
    with torch.set_grad_enabled(draws):
        choice = policy.decide(index, states, request)
    if choice.dtype == torch.bool:
        result = _certain(choice, request, index)
    else:
        result = _draw(choice, request, index) if draws else gates.hard(choice, request.threshold)
        result = torch.ones_like(result) if _must_run(request, index) else result
        _put(request.logits, index, choice)
    if request.deciding is not None:
        _put(request.keep, index, result & request.deciding)
        return result | ~request.deciding
    _put(request.keep, index, result)
    return tuple(result.tolist())


def watched(
    policy: Policy, request: Request, index: int, layer: nn.Module, states: Tensor, call: Callable[..., Any]
) -> Callable[..., Any]:
    """Return the call of a layer which ``states`` enter, as the policy asks: its attention shown, its result changed.

    ``request.part`` says which tokens a call is of.
    """
    request.part = None
    if index in policy.reads and request.fixed is None:
        call = _showing(policy, request, index, layer, call)
    if policy.forgets:
        call = hiding(policy, request, layer, call)
    if policy.amends and request.has_routed:
        # kept by layer, for one that runs again for its gradient; else only what the next layer asks for
        request.entered[index] = states.detach()
        if not request.learns:
            request.entered.pop(index - 2, None)
        if index in policy.amends:
            call = _amending(policy, request, index, request.entered[index - 1], call)
    return call


def _showing(
    policy: Policy, request: Request, index: int, layer: nn.Module, call: Callable[..., Any]
) -> Callable[..., Any]:
    """Wrap the call of a layer whose attention the policy reads."""

    def visit(attention: AttentionCall) -> Any:
        policy.attend(index, attention, request)
        return attention.run()

    def shown(*args: Any, **kwargs: Any) -> Any:
        with intercept_attention([layer], visit):
            return call(*args, **kwargs)

    return shown


def _amending(
    policy: Policy, request: Request, index: int, earlier: Tensor, call: Callable[..., Any]
) -> Callable[..., Any]:
    """Wrap the call of a layer whose result the policy changes, for the tokens that decisions speak of."""

    def amended(states: Tensor, **named: Any) -> Any:
        out = call(states, **named)
        after = states_of(out)
        result = policy.amend(index, part_of(earlier).to(after.device), states, after, request)
        if request.routed is not None:
            spoken = part_of(rearrange(request.routed, "b t -> b t 1"))
            result = torch.where(spoken.to(after.device), result, after)
        return (result, *out[1:]) if isinstance(out, tuple | list) else result

    def part_of(value: Tensor) -> Tensor:
        return value if request.part is None else take(value, request.part, batch_axis=0)

    return amended


def _draw(logits: Tensor, request: Request, index: int) -> Tensor:
    """Return who runs a site by a draw, and note with what probability (b) each row would."""
    noise, temperature = request.noise(index), request.options.temperature
    assert noise is not None
    with torch.enable_grad():
        law = torch.sigmoid((logits - request.threshold) / temperature)
        if _must_run(request, index):
            law = law + (1.0 - law).detach()  # runs, and its router goes on learning
        _put(request.gates, index, law if request.deciding is None else mean_over(request.deciding, law))
    return gates.hard(gates.perturb(logits, noise, temperature), request.threshold)


def _certain(kept: Tensor, request: Request, index: int) -> Tensor:
    """Return a policy's own booleans, or True where the layer must run."""
    return torch.ones_like(kept) if _must_run(request, index) else kept


def _must_run(request: Request, index: int) -> bool:
    """Return whether a site runs whatever the policy says: it is held, or everything is to run."""
    return index in request.held or request.threshold <= KEEP_ALL


def _put(values: list[Tensor], index: int, value: Tensor) -> None:
    """Append, or replace when a layer is run again for its gradient."""
    if index < len(values):
        values[index] = value
    else:
        values.append(value)
