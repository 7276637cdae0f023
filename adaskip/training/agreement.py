"""Measure how far a gradient of router training agrees with what flipping each decision really changes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from adaskip.batch import Batch
from adaskip.errors import DataError
from adaskip.runtime.attach import RoutedModel
from adaskip.survey.flips import PathCost, flip
from adaskip.survey.record import record
from adaskip.theory.costs import predicted
from adaskip.theory.measures import spearman
from adaskip.training.gradient import draw_layers, slope_of
from adaskip.training.objective import Objective, check_gradient


@dataclass(frozen=True)
class Slopes:
    """Hold, for m paths of n inputs, what running a layer costs beside leaving it out: exactly, and as estimated.

    Nats per predicted token, float64 (m n l) each.
    """

    exact: Tensor  # cost of the path with the layer, minus that of the path without
    soft: Tensor  # derivative of the path's cost by the layer's soft gate, which straight-through takes for it
    drawn: Tensor  # the exact one over its chance where the layer was drawn, else 0: what gradient flips takes for it

    @property
    def fresh(self) -> Tensor:
        """Return the mean exact change along the other paths of the same input: the truth, but for their number."""
        return (self.exact.sum(0) - self.exact) / (len(self.exact) - 1)


@dataclass(frozen=True)
class Agreement:
    """Hold how far an estimate and the truth agree, mean over paths; NaN where nothing is told apart."""

    over_layers: float  # Spearman's rho over the layers of one input, mean over inputs
    over_inputs: float  # over the inputs at one layer, mean over layers
    cosine: float  # between the means over inputs, which is what an optimiser sees of a batch
    wrong_sign: float  # share of inputs whose dearest layer the estimate would rather leave out

    @classmethod
    def of(cls, estimate: Tensor, truth: Tensor) -> Agreement:
        """Compare an estimate with the truth, (m n l) each."""
        layers, inputs, cosines, signs = [], [], [], []
        for a, b in zip(estimate, truth, strict=True):
            layers += [spearman(x, y) for x, y in zip(a, b, strict=True)]
            inputs += [spearman(x, y) for x, y in zip(a.T, b.T, strict=True)]
            cosines.append(float(torch.cosine_similarity(a.mean(0), b.mean(0), dim=0)))
            dearest = b.argmin(1, keepdim=True)  # running it saves most
            signs.append(float((a.gather(1, dearest) > 0).double().mean()))
        return cls(*(float(torch.tensor(v, dtype=torch.float64).nanmean()) for v in (layers, inputs, cosines, signs)))

    def to_dict(self) -> dict[str, float]:
        """Return the figures by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def measure_slopes(
    model: RoutedModel, batches: Iterable[Batch], goal: Objective, paths: int = 4, seed: int = 0
) -> Slopes:
    """Draw paths by the routers' own laws, and take each estimate and the truth along every one of them.

    Costs, for each path, a soft pass with its way back, and the suffix of every layer.

    Args:
        model: attached with routers of scope ``prompt``.
        batches: prompts with answers, on the model's device.
        goal: ``task_weight`` and ``flips`` of it count.
        paths: of each input, at least 2.
        seed: of paths and layers.

    Raises:
        ConfigError: routers that decide for every token.
        DataError: fewer than two paths.
    """
    check_gradient(Objective(gradient="flips"), model.target.scope)
    if paths < 2:
        raise DataError(f"measure_slopes: expected at least 2 paths of each input, one to compare with, got {paths}")
    parts = [
        torch.stack([_along(model, batch, goal, 1_000_003 * (seed + number) + path) for path in range(paths)])
        for number, batch in enumerate(batches)
    ]
    return Slopes(*torch.cat(parts, 3).transpose(2, 3).unbind(1))


def _along(model: RoutedModel, batch: Batch, goal: Objective, seed: int) -> Tensor:
    """Return exact, soft and drawn slopes along one path of each row, float64 (3 l b)."""
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad(), model.dense():
        dense = predicted(model(**batch.arguments()).logits, batch.supervised)
    cost = PathCost(dense, batch, goal.task_weight)
    with torch.enable_grad(), model.explore(torch.Generator().manual_seed(seed)):  # the same draws, so the same path
        soft = cost(predicted(model(**batch.arguments()).logits, batch.supervised))
        slopes = torch.autograd.grad(soft.sum(), model.gates())
    with model.explore(noise, soft=False):
        path = record(model, batch, routed=True)
    layers, chance = draw_layers(slope_of(model), goal.flips, noise)
    exact = flip(path, torch.arange(len(slopes), device=layers.device)[:, None].expand(-1, len(batch)), cost)
    drawn = torch.zeros_like(exact).scatter(0, layers, exact.gather(0, layers) / chance)
    return torch.stack([exact, torch.stack(slopes).to(exact), drawn]).cpu()
