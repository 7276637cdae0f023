"""Link 8: a skip's spread to first order, from gradients or from a tangent."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from adaskip.theory.bounds.numerics import f64


def fisher_form(logits: Tensor, products: Tensor) -> Tensor:
    """s^2 = E_{Y ~ p} (grad_h log p(Y) . dh)^2: the Fisher form of a change dh of the states, in nats^2.

    Estimator [D, link 8] of Var_p(dz), exact when the logits are linear in h between H and H'. logits (..., vocab) and
    products (..., vocab), whose entry y is grad_h log p(y) . dh -> (...).

    >>> round(fisher_form(torch.zeros(2), torch.tensor([1.0, -1.0])).item(), 4)
    1.0
    """
    return (torch.softmax(f64(logits), -1) * f64(products) ** 2).sum(-1)


def first_order(readout: Callable[[Tensor], Tensor], states: Tensor, change: Tensor) -> tuple[Tensor, Tensor]:
    """(Z, J dh): logits and their derivative along a change of the states, by one forward-mode pass.

    Estimator [D, link 8]: dz ~ J dh, to first order in dh; `logit_shift(Z, Z + J dh)` prices it per input, without the
    noise of drawn labels. Its s^2 is `fisher_form` (identity). Both outputs in the readout's own dtype.

    Args:
        readout: states -> logits (..., vocab), the suffix of the network as a function.
        states: H_l.
        change: H'_l - H_l, of the same shape.

    >>> first_order(lambda h: 3 * h, torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.0]))[1].tolist()
    [1.5, 0.0]
    """
    logits, tangent, *_ = torch.func.jvp(readout, (states,), (change,))
    return logits, tangent
