"""Routers fitted on what each flip of a decision costs, without back-propagation through the backbone."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from adaskip.batch import Batch
from adaskip.runtime.attach import RoutedModel
from adaskip.survey.flips import Flips, survey_flips
from adaskip.training.objective import Fit, Objective
from adaskip.training.schedule import OneCycle


@dataclass(frozen=True)
class FitState:
    """Hold what the next round of a fit needs beside the routers' weights."""

    round: int = 0  # rounds done
    multiplier: float = 0.0  # of the budget


Draw = Callable[[int], Iterable[Batch]]


def fit_from_bounds(
    model: RoutedModel,
    draw: Draw,
    objective: Objective,
    fit: Fit,
    *,
    seed: int = 0,
    state: FitState | None = None,
    after: Callable[[FitState, dict[str, float]], None] | None = None,
) -> FitState:
    """Fit the routers of a model, round by round: survey the inputs along the present path, then fit to the costs.

    Each round minimises ``E[expected cost] + budget`` over cached features (`fit_round`). What a router sees and what a
    flip costs depend on which other layers are skipped, so every round surveys anew, along the path that the routers
    of the round before choose.

    Args:
        model: attached, with routers of scope ``prompt``.
        draw: the batches of a round (0, 1, ...), on the model's device.
        objective: gives ``keep``, ``task_weight``, ``budget_rate`` and ``budget_weight``.
        fit: the schedule.
        seed: of the order of inputs; a round's draws depend on (seed, round) alone, so that a fit resumes bitwise.
        state: where to go on; the routers must be those of that round.
        after: called with the new state and the round's figures after every round.
    """
    state = state or FitState()
    for index in range(state.round, fit.rounds):
        started = time.perf_counter()
        flips = survey_flips(model, draw(index), objective.task_weight)
        surveyed = time.perf_counter()
        target = 1.0 + (index + 1) / fit.rounds * (objective.keep - 1.0)
        figures, multiplier = fit_round(model, flips, target, objective, fit, seed=seed + index, start=state.multiplier)
        state = FitState(index + 1, multiplier)
        durations = {"survey_s": surveyed - started, "fit_s": time.perf_counter() - surveyed}
        if after is not None:
            after(state, {"target": target, "inputs": len(flips), **figures, **durations})
    return state


def fit_round(
    model: RoutedModel, flips: Flips, target: float, objective: Objective, fit: Fit, *, seed: int, start: float = 0.0
) -> tuple[dict[str, float], float]:
    """Fit the routers to surveyed costs under a compute budget; return the last batch's figures and the multiplier.

        minimise  E_x[expected_cost(g(x))] + multiplier * (E keep - target) + budget_weight * max(0, E keep - target)^2

    over the routers' probabilities g. The cost is multilinear in g, so its optima are decisions, not mixtures.
    """
    assert model.routers is not None
    routers = model.routers
    flips = flips.to(next(routers.parameters()).device)
    draws = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(routers.parameters(), lr=fit.learning_rate, weight_decay=0.01)
    schedule = OneCycle(optimizer, fit.learning_rate, fit.steps)
    held = torch.tensor([i in model.policy.held for i in range(len(routers))], device=flips.cost.device)
    multiplier, figures = start, {}
    with torch.enable_grad():
        for _ in range(fit.steps):
            batch = flips.take(torch.randint(len(flips), (min(fit.batch_size, len(flips)),), generator=draws))
            gates = torch.sigmoid(read_logits(routers, batch.pooled) - model.policy.threshold)
            gates = torch.where(held, gates + (1.0 - gates).detach(), gates)  # run, and their routers go on learning
            cost, keep = batch.expected_cost(gates).mean(), batch.keep_rate(gates).mean()
            gap = keep - target
            loss = cost + multiplier * gap + objective.budget_weight * gap.clamp(min=0) ** 2
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(routers.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            multiplier = max(0.0, multiplier + objective.budget_rate * gap.item())
            figures = {"cost": cost.item(), "keep": keep.item(), "multiplier": multiplier}
    return figures, multiplier


def read_logits(routers: nn.ModuleList, pooled: Tensor) -> Tensor:
    """Run every layer's router on its own features: (n l k d) -> (n l)."""
    return torch.stack([head(pooled[:, index]) for index, head in enumerate(routers)], 1)
