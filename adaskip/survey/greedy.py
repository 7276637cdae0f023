"""Plan which layers go: one at a time, always the one that costs least for what it saves beside those that are gone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from adaskip.batch import Batch
from adaskip.runtime.attach import RoutedModel
from adaskip.survey.plans import plan_costs, runs_of

Path = tuple[int, ...]
"""The sites that a path leaves out, ascending: layers, or halves of them."""
Price = Callable[[Sequence[Path], Sequence[int]], Tensor]
"""What paths cost inputs, given by number: float64 (n p), nats per predicted token."""


def greedy_paths(
    price: Price,
    rows: Sequence[int],
    single: Tensor,
    skips: int,
    width: int,
    enough: Callable[[Path], bool] = lambda path: False,
    saves: Tensor | None = None,
    start: Path = (),
) -> list[tuple[Path, float]]:
    """Return paths of up to ``skips`` layers, each the one before with one more, and their mean costs to these inputs.

    Costs ``width`` paths on the inputs for every layer after the first.

    Args:
        price: what paths cost inputs.
        rows: the numbers of the inputs.
        single: (l) what leaving out each layer alone costs them; inf for one that must stay.
        skips: so many layers go, or as many as may.
        width: so many layers are tried each time, those that cost least when they were last tried.
        enough: whether a path leaves out enough, so that it is the last one.
        saves: (l) what leaving out each saves: an attention saves less than an MLP, and may cost less. None: all alike.
        start: what is gone already; the first path has one more.
    """
    marginal = single.double().clone()
    weight = torch.ones_like(marginal) if saves is None else saves.double().clamp(min=1e-12)
    weight = weight / weight.max()  # exactly 1 where all save the same
    marginal[list(start)] = torch.inf
    path, found = start, []
    before = float(price([start], rows).double().mean()) if start else 0.0
    while len(path) < skips and bool(marginal.isfinite().any()):
        options = (marginal / weight).argsort()[:width]
        options = options[marginal[options].isfinite()]
        if path:
            costs = price([tuple(sorted((*path, layer))) for layer in options.tolist()], rows).double().mean(0)
        else:
            costs = marginal[options]  # what they cost alone is known
        marginal[options] = costs - before
        best = int((marginal[options] / weight[options]).argmin())
        chosen = int(options[best])
        path, before = tuple(sorted((*path, chosen))), float(costs[best])
        marginal[chosen] = torch.inf
        found.append((path, before))
        if enough(path):
            break
    return found


def exact_prices(model: RoutedModel, batches: Callable[[Sequence[int]], Sequence[Batch]]) -> Price:
    """Return what paths cost exactly: the mean KL of the model under each from the dense one over an input's answer.

    Args:
        model: attached, of scope ``prompt``; whatever decides in it, only its execution is used.
        batches: makes batches, on the model's device, of inputs given by number, in that order.
    """
    sites = len(model.sites)

    def price(paths: Sequence[Path], rows: Sequence[int]) -> Tensor:
        return plan_costs(model, batches(rows), [runs_of(path, sites) for path in paths]).kl

    return price
