"""The spread that a skip gives the logits, estimated to first order from gradients (link 8 of docs/theory.md)."""

from __future__ import annotations

import torch
from torch import Tensor

from adaskip.theory.bounds.numerics import f64


def fisher_form(logits: Tensor, products: Tensor) -> Tensor:
    """Return s^2 = E_{Y ~ p} (grad_h log p(Y) . dh)^2: the Fisher form of a change dh of the states, in nats^2.

    Estimator [D, link 8] of Var_p(dz), exact when the logits are linear in h between H and H'. logits (..., vocab) and
    products (..., vocab), whose entry y is grad_h log p(y) . dh -> (...).

    >>> round(fisher_form(torch.zeros(2), torch.tensor([1.0, -1.0])).item(), 4)
    1.0
    """
    return (torch.softmax(f64(logits), -1) * f64(products) ** 2).sum(-1)
