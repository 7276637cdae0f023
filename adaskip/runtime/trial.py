"""Try on ten plain tokens whether a model's layers give single tokens alone what they give them in their place."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from adaskip.backbone.probe import ROWS, SUFFIX, TOKENS, dense_pass
from adaskip.errors import BackboneError
from adaskip.plan import Target
from adaskip.runtime.options import Mode

if TYPE_CHECKING:
    from adaskip.runtime.attach import RoutedModel


def try_tokens(routed: RoutedModel) -> None:
    """Run an attached model soft and skipping under decisions drawn for single tokens.

    Raises:
        BackboneError: the two differ, so its attention needs more than the places of queries and keys; says what.
    """
    runtime, name = routed.runtime, type(routed.backbone).__name__
    where = f"scope {runtime.scope!r}, kv {runtime.kv!r}"
    for index, layer in enumerate(routed.spec.layers):
        for path, buffer in layer.named_buffers():
            if buffer.dim() >= 2 and buffer.shape[-1] == buffer.shape[-2] > 1:
                raise BackboneError(
                    f"{name}: {where}: decoder layer {index} holds an attention mask of its own ({path}), which cannot "
                    "be cut to single tokens; use scope='prompt' with kv='absent'"
                )
    draw = torch.Generator().manual_seed(0)
    keep = torch.rand(len(routed.sites), ROWS, TOKENS, generator=draw) > 0.5
    try:
        soft, skipped = _logits(routed, keep, "soft"), _logits(routed, keep, "skip")
        same = bool((soft - skipped).norm() <= (1e-3 if routed.backbone.dtype == torch.float32 else 0.1) * soft.norm())
    except BackboneError:  # it takes no mask that hides single keys
        same = False
    if not same:
        raise BackboneError(
            f"{name}: {where}: single tokens do not get alone what they get in place (its attention counts keys "
            "instead of being told their positions, or is handed its states several times); "
            "use scope='prompt' with kv='absent'"
        )


def _logits(routed: RoutedModel, keep: Tensor, mode: Mode) -> Tensor:
    types = SUFFIX if routed.spec.reads_ahead else {}
    runtime = routed.runtime
    before = runtime.target
    runtime.target = Target(scope="token", unit=before.unit, kv=before.kv)  # while attaching, nobody else has it yet
    try:
        with runtime.state.using(fixed=keep, mode=mode), runtime.state.aside():
            logits: Tensor = dense_pass(routed.backbone, use_cache=False, **types).logits
            return logits.float()
    finally:
        runtime.target = before
