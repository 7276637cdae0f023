"""Keys that go once the prompt is read: hidden from the answer within one pass, freed in a cache for those that follow.

    patch 2 is forgotten         prompt + answer in one pass         the cache, after a pass of the prompt
    queries  p1 p2 t  a  a       p1  #                                positions   0 1 2
    keys     p1 p2 t  a  a       p2  # #                              kept        0 . 2   -> keys (h 2 d), index 0 2
                                 t   # # #                            the answer attends to what is there
                                 a   # . # #
                                 a   # . # # #
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adaskip.backbone.attention import AttentionCall, intercept_attention
from adaskip.policy import Policy
from adaskip.runtime.request import Request
from adaskip.runtime.segment import WHOLE, Memo, take


@dataclass(frozen=True)
class Forgotten:
    """Hold which keys of a chunk go, and who no longer sees them."""

    keys: Tensor  # bool (b t)
    answers: Tensor  # bool (b t): real tokens behind the prompt
    any: bool  # whether a key goes
    both: bool  # whether some token behind the prompt is here to miss it


def forgotten(policy: Policy, request: Request) -> Forgotten:
    """Return what a request forgets, asked of the policy once, after its first layer has been decided."""
    if "forgotten" not in request.notes:
        keys = policy.forget(request)
        answers = request.tokens.valid & ~request.prompt
        lost = bool(keys.any())
        request.notes["forgotten"] = Forgotten(keys, answers, lost, lost and bool(answers.any()))
    found: Forgotten = request.notes["forgotten"]
    return found


def hiding(policy: Policy, request: Request, layer: nn.Module, call: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the call of a layer in which tokens behind the prompt do not see what the policy forgets."""

    def hidden(*args: Any, **kwargs: Any) -> Any:
        lost = forgotten(policy, request)
        if not lost.both:
            return call(*args, **kwargs)

        def visit(attention: AttentionCall) -> Any:
            keys = _own(lost.keys, request)  # the last ones that the attention is given, behind those of a cache
            past = keys.new_zeros(len(keys), attention.key.shape[2] - keys.shape[1])
            return attention.without(_own(lost.answers, request), torch.cat([past, keys], 1)).run()

        with intercept_attention([layer], visit):
            return call(*args, **kwargs)

    return hidden


def free(policy: Policy, request: Request) -> None:
    """Free the keys that the policy forgets of the chunk that has just been read, in every layer of its cache."""
    cache = request.cache
    if not policy.forgets or cache is None or cache.ledger is None:
        return
    lost = forgotten(policy, request)
    if not lost.any:
        return
    cache.ledger.forget(lost.keys)
    past = lost.keys.new_zeros(len(lost.keys), request.offset)
    memo: Memo = {}
    for layer in cache.layers:
        layer.forget(torch.cat([past, lost.keys], 1), memo)


def _own(marks: Tensor, request: Request) -> Tensor:
    """Return marks (b t) of the part of the chunk that runs the layer, bool (r n); filling is never marked."""
    part = request.part or WHOLE
    taken = take(marks[..., None], part, batch_axis=0)[..., 0]
    return taken if part.tokens is None else taken & (part.tokens >= 0)
