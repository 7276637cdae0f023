"""Draw a path and estimate how its cost moves with the routers' logits: by slopes of soft gates, or by exact flips."""

from __future__ import annotations

import lightning
import torch
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)
from torch import Tensor

from adaskip.batch import IGNORED, Batch
from adaskip.errors import ConfigError, DataError
from adaskip.runtime.attach import RoutedModel
from adaskip.runtime.noise import Noise
from adaskip.survey.flips import PathCost, flip
from adaskip.survey.record import record
from adaskip.theory.costs import predicted
from adaskip.training.objective import Objective
from adaskip.training.sharding import ShardedBackbone

_LEAST = 1e-6
"""Slope below which a layer's chance to be flipped falls no further; any chance above 0 keeps the mean what it is."""


def draw_path(
    model: RoutedModel, batch: Batch, dense: Tensor, goal: Objective, noise: torch.Generator | Noise, temperature: float
) -> tuple[Tensor, Tensor]:
    """Draw a path a row, and return its KL to the dense model and its cross-entropy, means over rows.

    ``kl + goal.task_weight * task`` carries the objective's gradient; `model.runtime.routing` is left as the path's,
    with gates.

    Args:
        model: attached, with a policy that gives logits.
        batch: prompts with answers.
        dense: (b t v) logits of the dense model.
        goal: which gradient.
        noise: of all draws.
        temperature: of the gates.

    Raises:
        DataError: an input without an answer.
    """
    if goal.gradient == "flips":
        _check_answers(batch.supervised)
        return _by_flips(model, batch, dense, goal, noise, temperature)
    with model.explore(noise, temperature):
        out = model(**batch.arguments())
    return answer_costs(dense, out.logits, batch)


def answer_costs(dense: Tensor, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the KL of logits (b t v) to the dense ones over the answers, and their cross-entropy: means over rows.

    Raises:
        DataError: an input without an answer.
    """
    where = batch.supervised
    weights = _weights(where)[where]
    log_p, log_q = (x[:, :-1][where].float().log_softmax(-1) for x in (dense, logits))
    kl = weights @ (log_p.exp() * (log_p - log_q)).sum(-1)
    task = weights @ torch.nn.functional.nll_loss(log_q, batch.labels[:, 1:][where], reduction="none")
    return kl, task


def _by_flips(
    model: RoutedModel, batch: Batch, dense: Tensor, goal: Objective, noise: torch.Generator | Noise, temperature: float
) -> tuple[Tensor, Tensor]:
    """Rerun the path with single decisions flipped, a layer a row and part of the model.

        d E[cost] / d p_l = E[cost with l - cost without l],  p_l = sigmoid((logit_l - threshold) / temperature)

    A layer drawn with chance c stands for others with weight 1 / c. What a flip would change in the inputs of later
    routers, and so in their decisions, is left out.
    """
    with model.explore(noise, temperature, soft=False):
        path = record(model, batch, routed=True)
    routing = model.runtime.routing
    assert routing is not None
    if routing.gates is None:
        return dense.new_zeros(()), dense.new_zeros(())  # a policy of booleans, which the tuner refuses
    layers, chance = draw_layers(slope_of(model, temperature), goal.flips, noise)
    cost = PathCost(predicted(dense, batch.supervised), batch, goal.task_weight)
    change = flip(path, layers, cost) / chance
    slope = (routing.gates.gather(0, layers) * change.float()).sum(0).mean()
    kl, task = (of(path.logits).mean().float() for of in (cost.kl, cost.task))
    return kl + slope - slope.detach(), task


def slope_of(model: RoutedModel, temperature: float = 1.0) -> Tensor:
    """Return p_l (1 - p_l) of the last request, (l b): how far a logit moves a decision."""
    routing = model.runtime.routing
    assert routing is not None
    assert routing.logits is not None
    margin = (routing.logits.detach() - model.policy.threshold) / temperature
    return torch.sigmoid(margin) * torch.sigmoid(-margin)


def draw_layers(weight: Tensor, count: int, noise: torch.Generator | Noise) -> tuple[Tensor, Tensor]:
    """Draw a layer of each of ``count`` runs of neighbours, for every row apart, with chances that go by its weight.

        layers 0 1 2 3 | 4 5 6 7 | 8 9 10 11      count 3: one rerun from 0..3 on, one from 4..7 on, one from 8..11 on

    Args:
        weight: (l b), not below 0.
        count: at most as many as there are layers are drawn.
        noise: of the draws, on any device.

    Returns:
        long (n b) the layers, and (n b) the chance that each had.
    """
    layers, chances = [], []
    for part in torch.arange(len(weight), device=weight.device).tensor_split(min(count, len(weight))):
        chance = weight[part].clamp_min(_LEAST)
        chance = chance / chance.sum(0)
        cut = Noise.of(noise).uniform(weight.shape[1:])
        index = (chance.cumsum(0) < cut.to(weight)).sum(0).clamp(max=len(part) - 1)
        layers.append(part[index])
        chances.append(chance.gather(0, index[None])[0])
    return torch.stack(layers), torch.stack(chances)


def _weights(where: Tensor) -> Tensor:
    """Return float32 (b t): weights of the predicted tokens under which all inputs count the same; they sum to 1.

    Raises:
        DataError: an input without an answer.
    """
    _check_answers(where)
    return where.float() / where.sum(1, keepdim=True) / len(where)  # float32 whatever torch's default is


def _check_answers(where: Tensor) -> None:
    """Refuse an input without an answer."""
    if empty := (~where.any(1)).nonzero()[:, 0].tolist():
        raise DataError(
            f"training: rows {empty} of a batch have no answer to learn from: their labels are all {IGNORED}; "
            "leave such inputs out, or give them answers"
        )


def check_strategy(goal: Objective, trainer: lightning.Trainer) -> None:
    """Refuse strategies that share the model out in a way of their own, and any that does where ranks run other layers.

    Raises:
        ConfigError: the weights are sharded.
    """
    strategy = trainer.strategy
    if isinstance(strategy, FSDPStrategy | ModelParallelStrategy) and not isinstance(strategy, ShardedBackbone):
        raise ConfigError(
            f"RouterTuner: {type(strategy).__name__} would share out routers along with the frozen backbone; expected "
            "adaskip.training.sharding.ShardedBackbone(), FSDP2 of the backbone alone (in a recipe trainer.strategy: "
            "fsdp2), or ddp"
        )
    whole = isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy)
    if goal.gradient == "flips" and (not whole or isinstance(trainer.strategy, DeepSpeedStrategy)):
        raise ConfigError(
            "objective.gradient flips: expected every process to hold the whole model, got "
            f"{type(trainer.strategy).__name__}, under which all of them must run the same layers; use strategy ddp, "
            "or gradient straight-through"
        )
