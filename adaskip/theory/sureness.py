"""How sure a model's predictions are, six numbers an input: what a change of its logits costs depends on it most."""

from __future__ import annotations

import torch
from torch import Tensor

from adaskip.theory.costs import per_input

SURENESS = 6
"""Numbers that `describe_sureness` gives an input."""
_AT_ONCE = 64
"""Predicted tokens whose probabilities are taken at once, so that no second copy of all logits is made."""
_SMALL = 1e-12


def describe_sureness(logits: Tensor, supervised: Tensor) -> Tensor:
    """Return float64 (b 6): mean and largest of log entropy, of log(1 - p_top) and of the lead of the top label.

    The lead is Z_top - Z_second; of it the mean and minus the smallest.

    Args:
        logits: (k v) at the predicted tokens, row by row.
        supervised: bool (b t-1).
    """
    entropy, rest, lead = token_sureness(logits).unbind(1)
    found = [per_input(values, supervised, kind) for values in (entropy, rest) for kind in ("mean", "max")]
    found = [values.clamp_min(_SMALL).log() for values in found]
    return torch.stack([*found, per_input(lead, supervised, "mean"), per_input(-lead, supervised, "max")], 1)


def token_sureness(logits: Tensor) -> Tensor:
    """Return float64 (k 3) for logits (k v): entropy, 1 - p_top, and the lead Z_top - Z_second."""
    columns = []
    for part in logits.split(_AT_ONCE):
        log_p = part.double().log_softmax(-1)
        top = log_p.topk(2, -1).values if log_p.shape[-1] > 1 else log_p.expand(-1, 2)
        entropy = torch.special.entr(log_p.exp()).sum(-1)
        columns.append(torch.stack([entropy, -torch.expm1(top[:, 0]), top[:, 0] - top[:, 1].clamp_min(-1e4)], 1))
    return torch.cat(columns) if columns else logits.new_zeros(0, 3, dtype=torch.float64)
