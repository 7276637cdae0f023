"""Measure what plans cost: late entry and early exit [P], and any other set of layers left out for every input."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from adaskip.batch import Batch
from adaskip.plan import SkipPlan
from adaskip.runtime.attach import RoutedModel
from adaskip.survey.record import Recorded, record


@dataclass(frozen=True)
class PlanCosts:
    """Hold the costs of each plan to each input. Rows are inputs, columns plans."""

    kl: Tensor  # float64 (n p) exact KL(dense || plan), nats per predicted token
    hit: Tensor  # float64 (n p) 1 where the teacher-forced answer is right
    keep: Tensor  # float64 (n p) executed over dense decoder FLOPs

    def select(self, plans: slice) -> PlanCosts:
        """Return the columns of some plans."""
        return PlanCosts(**{f.name: getattr(self, f.name)[:, plans] for f in fields(self)})


def runs_of(path: Iterable[int], sites: int) -> Tensor:
    """Return bool (s): what runs where the sites of a path are left out.

    >>> runs_of((1,), 3).tolist()
    [True, False, True]
    """
    runs = torch.ones(sites, dtype=torch.bool)
    runs[[*path]] = False
    return runs


@torch.no_grad()
def plan_costs(
    model: RoutedModel,
    batches: Iterable[Batch],
    plans: list[Tensor],
    progress: Callable[[int], None] | None = None,
) -> PlanCosts:
    """Measure plans, bool (l) each: what they keep. Costs a dense pass a batch and, per plan, the suffix it changes."""
    costs: list[PlanCosts] = []
    for batch in batches:
        recorded = record(model, batch)
        columns = [run_plan(recorded, plan) for plan in plans]
        costs.append(PlanCosts(**{name: torch.stack([c[name] for c in columns], 1) for name in columns[0]}))
        if progress is not None:
            progress(sum(len(cost.kl) for cost in costs))
    return PlanCosts(**{f.name: torch.cat([getattr(cost, f.name) for cost in costs]) for f in fields(PlanCosts)})


def run_plan(recorded: Recorded, plan: Tensor) -> dict[str, Tensor]:
    """Run a recorded batch under one plan, bool (l): its ``kl``, ``hit`` and ``keep``, float64 (b) each, on the CPU."""
    logits = recorded.rerun(plan.to(recorded.keep.device)[:, None].expand_as(recorded.keep))
    columns = {
        "kl": recorded.compare(logits)["kl"],
        "hit": recorded.match(logits),
        "keep": recorded.model.routing.keep_rate,
    }
    return {name: values.double().cpu() for name, values in columns.items()}


def band_plans(layers: int) -> dict[str, list[Tensor]]:
    """Return every late entry and every early exit of a model, k = 0 .. layers.

    >>> [plan.tolist() for plan in band_plans(2)["late_entry"]]
    [[True, True], [False, True], [False, False]]
    """
    return {
        "late_entry": [SkipPlan.late_entry(k).keep(layers) for k in range(layers + 1)],
        "early_exit": [SkipPlan.early_exit(k).keep(layers) for k in range(layers + 1)],
    }
