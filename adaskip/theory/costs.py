"""What a skip does to the prediction: exact KL, s and u of each input over its predicted tokens; exact matches."""

from __future__ import annotations

import torch
from torch import Tensor

from adaskip.theory import bounds

IGNORED = -100


def per_input(values: Tensor, mask: Tensor, reduce: str) -> Tensor:
    """(k) values, one for each True of mask (b t), row by row -> (b): ``mean`` or ``max`` over each row's own."""
    empty = -torch.inf if reduce == "max" else 0.0
    spread = torch.full(mask.shape, empty, dtype=values.dtype, device=values.device).masked_scatter(mask, values)
    return spread.amax(1) if reduce == "max" else spread.sum(1) / mask.sum(1)


def compare(dense: Tensor, routed: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Exact KL (mean), s and u (largest) of each row over its predicted tokens.

    Args:
        dense: (b t v) logits of the dense model.
        routed: (b t v) logits with something skipped.
        labels: long (b t), -100 where nothing is predicted.
    """
    return compare_predicted(predicted(dense, labels), predicted(routed, labels), labels)


def predicted(logits: Tensor, labels: Tensor) -> Tensor:
    """(b t v) logits -> (k v): those that predict a supervised token, row by row."""
    return logits[:, :-1][labels[:, 1:] != IGNORED]


def compare_predicted(before: Tensor, after: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """The same from `predicted` logits (k v), which are all that has to be kept of a dense pass."""
    mask = labels[:, 1:] != IGNORED
    shift = bounds.logit_shift(before, after)
    found = {"kl": bounds.kl_exact(before, after), "s": shift.s, "u": shift.u}
    return {k: per_input(v, mask, "mean" if k == "kl" else "max") for k, v in found.items()}


def exact_match(logits: Tensor, labels: Tensor) -> Tensor:
    """bool (b): whether the argmax is right at every supervised position (teacher-forced)."""
    where = labels[:, 1:] != IGNORED
    return ((logits[:, :-1].argmax(-1) == labels[:, 1:]) | ~where).all(1)
