"""Measure what routers see on calibration inputs, so that they read how far an input lies from the usual one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from adaskip.backbone.probe import in_this_thread
from adaskip.batch import Batch
from adaskip.policies.learned.heads import Standard
from adaskip.runtime.attach import RoutedModel

_SMALLEST = 1e-3
"""Share of the mean spread that a feature's own is at least: one that hardly varies must not drown the others."""


@torch.no_grad()
def standardise(model: RoutedModel, batches: Sequence[Batch]) -> None:
    """Centre and scale the features of routers with ``features="standardised"``, along the path they choose now.

    Args:
        model: attached; other routers stay as they are.
        batches: inputs on the model's device; two at least.
    """
    assert model.routers is not None
    for head, seen in zip(model.routers, see(model, batches), strict=True):
        if isinstance(head.norm, Standard) and len(seen) > 1:
            spread = seen.std(0)
            head.norm.centre.copy_(seen.mean(0))
            head.norm.scale.copy_(spread.clamp_min(_SMALLEST * float(spread.mean())).clamp_min(1e-12))


def see(model: RoutedModel, batches: Sequence[Batch]) -> list[Tensor]:
    """Return what each layer's router reads of every input: float32 (n k d) a layer."""
    assert model.routers is not None
    seen: list[list[Tensor]] = [[] for _ in model.routers]
    hooks = [
        head.register_forward_pre_hook(in_this_thread(lambda _, args, kept=kept: kept.append(args[0].float())))
        for head, kept in zip(model.routers, seen, strict=True)
    ]
    try:
        for batch in batches:
            model(**batch.arguments())
    finally:
        for hook in hooks:
            hook.remove()
    return [torch.cat(kept) for kept in seen]
