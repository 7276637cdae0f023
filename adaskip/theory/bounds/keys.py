"""What removing keys from an attention head does to its output (link 7 of docs/theory.md)."""

from __future__ import annotations

from torch import Tensor

from adaskip.errors import DataError
from adaskip.theory.bounds.numerics import f64


def key_removal(attention: Tensor, values: Tensor, removed: Tensor) -> Tensor:
    """Return o' - o = a (m_kept - m_removed), the change of a head's output when keys of mass a < 1 leave.

    The softmax is taken over the kept keys. Identity [D, link 7], per head and query.

    m are attention-weighted means of the values over the kept and over the removed keys. Mass alone says nothing: keys
    with the same mean value as the others can go, however large their mass. attention (..., k) >= 0 (any scale),
    values (..., k, d), removed (..., k) bool, broadcasting -> (..., d). NaN where no kept key has mass. Raises
    DataError if the keys differ in number.

    >>> import torch
    >>> key_removal(torch.tensor([0.25, 0.75]), torch.tensor([[4.0], [0.0]]), torch.tensor([True, False])).tolist()
    [-1.0]
    """
    if not attention.shape[-1] == values.shape[-2] == removed.shape[-1]:
        raise DataError(
            f"key_removal: expected attention (..., k), values (..., k, d) and removed (..., k) of one k, got "
            f"{(*attention.shape,)}, {(*values.shape,)} and {(*removed.shape,)}"
        )
    weight, values = f64(attention), f64(values)
    removed_weight, kept_weight = weight * removed, weight * ~removed
    mass = removed_weight.sum(-1, keepdim=True) / weight.sum(-1, keepdim=True)
    # where nothing is removed the mean over the removed keys is 0/0
    return mass * (_mean(kept_weight, values) - _mean(removed_weight, values).where(mass > 0, 0.0))


def _mean(weight: Tensor, values: Tensor) -> Tensor:
    share = weight / weight.sum(-1, keepdim=True)
    return (share.unsqueeze(-2) @ values).squeeze(-2)
