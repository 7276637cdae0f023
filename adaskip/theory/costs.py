"""Costs of a skip to the prediction: exact KL, s and u of each input over its predicted tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from adaskip.errors import DataError
from adaskip.theory import bounds


def predicted(logits: Tensor, supervised: Tensor) -> Tensor:
    """Return the logits that predict a supervised token, row by row: (b t v) -> (k v).

    Args:
        logits: (b t v); the logits at a token predict the next one.
        supervised: bool (b t-1), whether the next token is scored, as `adaskip.Batch.supervised` says.

    Raises:
        DataError: a mask of another type or shape, such as the labels themselves.
    """
    if supervised.dtype != torch.bool or supervised.shape != (logits.shape[0], logits.shape[1] - 1):
        raise DataError(
            f"predicted: expected supervised as bool ({logits.shape[0]}, {logits.shape[1] - 1}), the logits' rows and "
            f"one token less, got {supervised.dtype} {(*supervised.shape,)}; pass batch.supervised"
        )
    return logits[:, :-1][supervised]


def per_input(values: Tensor, supervised: Tensor, reduce: str) -> Tensor:
    """Reduce values of predicted tokens to one for each input, (k) -> (b).

    Args:
        values: (k) one for each True of ``supervised``, row by row.
        supervised: bool (b t-1).
        reduce: ``mean`` or ``max`` over each row's own.
    """
    empty = -torch.inf if reduce == "max" else 0.0
    spread = torch.full(supervised.shape, empty, dtype=values.dtype, device=values.device)
    spread = spread.masked_scatter(supervised, values)
    return spread.amax(1) if reduce == "max" else spread.sum(1) / supervised.sum(1)


def compare(dense: Tensor, routed: Tensor, supervised: Tensor) -> dict[str, Tensor]:
    """Return the exact ``kl`` (mean), ``s`` and ``u`` (largest) of each input over its predicted tokens, (b) each.

    Args:
        dense: (b t v) logits of the dense model.
        routed: (b t v) logits with something skipped.
        supervised: bool (b t-1), as in `predicted`.
    """
    return compare_predicted(predicted(dense, supervised), predicted(routed, supervised), supervised)


def compare_predicted(dense: Tensor, routed: Tensor, supervised: Tensor) -> dict[str, Tensor]:
    """Return the same from `predicted` logits (k v), which are all that has to be kept of a dense pass."""
    shift = bounds.logit_shift(dense, routed)
    return {
        "kl": per_input(bounds.kl_exact(dense, routed), supervised, "mean"),
        "s": per_input(shift.s, supervised, "max"),
        "u": per_input(shift.u, supervised, "max"),
    }
