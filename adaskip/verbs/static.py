"""Seek the best static plan of a training run's budget, begin at it where asked to, and ship it where it is better."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from adaskip.batch import Batch
from adaskip.recipe import Recipe
from adaskip.runtime.attach import RoutedModel, build
from adaskip.sites import name_sites
from adaskip.stages import Stages
from adaskip.survey.greedy import Path
from adaskip.survey.plans import plan_costs
from adaskip.survey.static import ROUNDING, Contest, as_plan, find_static, layer_savings, start_logits
from adaskip.theory.tables import LayerMeasures
from adaskip.training.dear import find_dear
from adaskip.training.objective import Objective


@dataclass(frozen=True)
class Start:
    """Hold what is known before training: the plan to beat, and the objective to train for."""

    plan: Path | None  # None: none was sought, or none keeps so little
    objective: Objective


def prepare(
    recipe: Recipe,
    model: RoutedModel,
    measured: LayerMeasures,
    looked_at: list[Batch],
    validation: list[Batch],
    stages: Stages,
) -> Start:
    """Hold the layers that are too dear to skip, find the best static plan of the others, and start there if asked to.

    Args:
        recipe: of the run.
        model: with untrained routers.
        measured: the layers alone, on the inputs looked at.
        looked_at: the validation inputs that plans are priced on.
        validation: all of them: the mean keep rate over these counts.
        stages: hears what is under way.
    """
    section, device = recipe.static, model.spec.device
    if not section.width and recipe.conditions.hold_above is None:
        return Start(None, recipe.objective)
    saved = layer_savings(model, [batch.to(device) for batch in validation])
    _hold_dear(recipe, model, measured, saved, stages)
    if not section.width:
        return Start(None, recipe.objective)
    keep, inputs = recipe.objective.keep, [batch.to(device) for batch in looked_at]
    with stages(f"finding the best static plan of objective.keep={keep:g} on {len(measured)} inputs") as advance:
        plan = find_static(model, inputs, measured.kl, saved, keep, section.width, advance)
    if plan is None:
        stages.note(f"no static plan keeps as little as objective.keep={keep:g}: the routers are compared with none")
        return Start(None, recipe.objective)
    stages.note(f"the best static plan of objective.keep={keep:g} leaves out {name_sites(model.sites.labels(plan))}")
    if not section.start:
        return Start(plan, recipe.objective)
    begin_at(model, plan)
    return Start(plan, price_budget(recipe.objective, model, inputs, plan))


def _hold_dear(recipe: Recipe, model: RoutedModel, measured: LayerMeasures, saved: Tensor, stages: Stages) -> None:
    section, held = recipe.conditions, model.policy.held
    if section.hold_above is None or not section.nats:  # of no tolerance at all, no layer costs ten times as much
        return
    found = find_dear(
        measured.kl, section.nats, section.hold_above, saved, recipe.objective.keep, held, section.level,
        model.sites.label,
    )  # fmt: skip
    if found.sentence:
        stages.note(found.sentence)
    if found.costs:
        model.hold(model.sites.labels([*held, *found.costs]))


@torch.no_grad()
def begin_at(model: RoutedModel, plan: Path) -> None:
    """Let untrained routers follow a plan, softly: each gate keeps a slope by which its layer may be decided anew."""
    assert model.routers is not None
    for head, logit in zip(model.routers, start_logits(plan, model.policy.held, len(model.routers)), strict=True):
        head.outer.bias.fill_(float(logit) + model.policy.threshold)  # type: ignore[union-attr, operator]


def price_budget(objective: Objective, model: RoutedModel, inputs: Sequence[Batch], plan: Path) -> Objective:
    """Return the objective with a budget that pays what the plan pays for a unit of compute, from the first step on.

    Where a layer costs nats, a multiplier that grows by hundredths a step holds nothing for as long as routers train:
    the layers that the plan leaves out come back.
    """
    keep = torch.ones(len(model.sites), dtype=torch.bool)
    keep[list(plan)] = False
    costs = plan_costs(model, inputs, [keep])
    price = float(costs.kl.mean() / (1 - costs.keep.mean()).clamp(min=ROUNDING)) if plan else 0.0
    scale = max(1.0, price)
    rate, weight = scale * objective.budget_rate, scale * objective.budget_weight
    return replace(objective, warmup=0.0, budget_start=price, budget_rate=rate, budget_weight=weight)


def attach_plan(model: RoutedModel, plan: Path) -> RoutedModel:
    """Take the routers off and attach the plan in their place; it speaks of the same tokens and units."""
    settings = as_plan(plan, model.target)
    return build(model.detach(), settings, 0)


def describe(contest: Contest | None, exported: str) -> dict[str, Any]:
    """Return what ``summary.json`` says of the plan under ``static``."""
    if contest is None:
        return {}
    return {"static": contest.to_dict() | {"router": exported, "sentence": verdict(contest, exported)}}


def verdict(contest: Contest, exported: str) -> str:
    """Say by how much the routers win, or what ``router/`` holds where they do not."""
    if contest.winner == "routers":
        return contest.sentence
    if exported == "static":
        return f"{contest.sentence}: router/ holds the static plan, and router-learned/ the routers"
    return f"{contest.sentence}: router/ holds them all the same, as static.fallback is false"
