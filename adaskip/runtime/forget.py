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

    keys: Tensor  # bool (b t), some of them
    answers: Tensor | None  # bool (b t): real tokens behind the prompt; None where there are none


def forgotten(policy: Policy, request: Request) -> Forgotten | None:
    """Return what a request forgets, asked of the policy once, after its first layer has been decided."""
    if "forgotten" not in request.notes:
        keys, found = policy.forget(request), None
        if keys is not None and bool(keys.any()):
            answers = request.tokens.valid & ~request.prompt
            found = Forgotten(keys, answers if bool(answers.any()) else None)
        request.notes["forgotten"] = found
    lost: Forgotten | None = request.notes["forgotten"]
    return lost


def hiding(policy: Policy, request: Request, layer: nn.Module, call: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the call of a layer in which tokens behind the prompt do not see what the policy forgets."""

    def hidden(*args: Any, **kwargs: Any) -> Any:
        lost = forgotten(policy, request)
        if lost is None or lost.answers is None:
            return call(*args, **kwargs)
        gone, answers = lost.keys, lost.answers

        def visit(attention: AttentionCall) -> Any:
            keys = _own(gone, request)  # the last ones that the attention is given, behind those of a cache
            past = keys.new_zeros(len(keys), attention.key.shape[2] - keys.shape[1])
            return attention.without(_own(answers, request), torch.cat([past, keys], 1)).run()

        with intercept_attention([layer], visit):
            return call(*args, **kwargs)

    return hidden


def free(policy: Policy, request: Request) -> None:
    """Free the keys that the policy forgets of the chunk that has just been read, in every layer of its cache."""
    cache = request.cache
    if not policy.forgets or cache is None or cache.ledger is None:
        return
    lost = forgotten(policy, request)
    if lost is None:
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
