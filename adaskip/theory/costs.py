"""Costs of a skip to the prediction: exact KL, s and u of each input over its predicted tokens."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from adaskip.errors import DataError
from adaskip.theory import bounds

WIDE = 4096
"""Vocabularies up to here are compared in float64: that costs little there, and keeps every digit."""
_AT_ONCE = 16
"""Predicted tokens of a wide vocabulary that are compared at once, so that what lies between stays in the caches."""


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


class Reference:
    """Hold the dense side of many comparisons, so that it is computed once.

    Over a wide vocabulary the arithmetic is float32, its sums float64, a few tokens at a time: much quicker than
    `compare_predicted`, and nothing of a comparison stays. Relative errors then are below 1e-5 for a KL of a tenth
    of a nat, and 1e-3 for one of 1e-7.

    Args:
        logits: (k v) of the dense model, as `predicted` picks them.
    """

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits

    @cached_property
    def _wide(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return float32 logits, log p and p, (k v), and where tokens are outside the vocabulary, if any are."""
        logits = self.logits.float()
        log_p = logits.log_softmax(-1)
        absent = logits == -torch.inf
        return logits, log_p, log_p.exp(), absent if bool(absent.any()) else None

    def compare(self, routed: Tensor, supervised: Tensor) -> dict[str, Tensor]:
        """Return what `compare_predicted` does, for routed logits (k v)."""
        if self.logits.shape[-1] <= WIDE or routed.shape != self.logits.shape:
            return compare_predicted(self.logits, routed, supervised)
        parts = [self._part(routed[start : start + _AT_ONCE], start) for start in range(0, len(routed), _AT_ONCE)]
        kl, s, u = (torch.cat(values) for values in zip(*parts, strict=True)) if parts else routed.new_zeros(3, 0)
        return {
            "kl": per_input(kl, supervised, "mean"),
            "s": per_input(s, supervised, "max"),
            "u": per_input(u, supervised, "max"),
        }

    def _part(self, routed: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
        """Compare the tokens from ``start`` on: KL, s and u of each, float64."""
        rows = slice(start, start + len(routed))
        logits, log_p, p = (values[rows] for values in self._wide[:3])
        routed = routed.float()
        shift, ratio = routed - logits, routed.log_softmax(-1) - log_p
        if (absent := self._wide[3]) is not None:
            outside = absent[rows] & (routed == -torch.inf)
            shift, ratio = shift.masked_fill(outside, 0.0), ratio.masked_fill(outside, 0.0)
        # from the likeliest entry, as `bounds.numerics.centred_shift` does, and for its reason
        shift = shift - shift.gather(-1, p.argmax(-1, keepdim=True))
        shift = shift - (p * shift).sum(-1, keepdim=True, dtype=torch.float64).float()
        # E_p[e^w - 1 - w], no term of which is negative; near 0 by its series, where the difference would cancel
        near = ratio**2 * (1 / 2 + ratio * (1 / 6 + ratio / 24))
        terms = p * torch.where(ratio.abs() < 1e-2, near, torch.expm1(ratio) - ratio)
        kl, variance = (values.sum(-1, dtype=torch.float64) for values in (terms, p * shift**2))
        return kl, variance.sqrt(), shift.amax(-1).double()
