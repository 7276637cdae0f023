"""What static plans cost, in nats and right answers: late entry and early exit [P], and any other set of layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from adaskip.batch import Batch, exact_match
from adaskip.plan import SkipPlan
from adaskip.runtime.attach import RoutedModel
from adaskip.theory.costs import compare


@dataclass(frozen=True)
class PlanCosts:
    """What each plan costs each input. Rows are inputs, columns plans."""

    kl: Tensor  # float64 (n p) exact KL(dense || plan), nats per predicted token
    hit: Tensor  # float64 (n p) 1 where the teacher-forced answer is right


@torch.no_grad()
def plan_costs(
    model: RoutedModel,
    batches: Iterable[Batch],
    plans: list[Tensor],
    progress: Callable[[int], None] | None = None,
) -> PlanCosts:
    """Exact cost of static plans, bool (l) each: what they keep. One dense pass a batch and one routed pass a plan."""
    costs: list[Tensor] = []
    hits: list[Tensor] = []
    for batch in batches:
        arguments, labels = batch.arguments(), batch.labels
        with model.dense():
            dense = model(**arguments).logits
        kl, hit = [], []
        for plan in plans:
            keep = plan.to(labels.device)[:, None].expand(-1, len(batch))
            out = model(**arguments, routing=keep).logits
            kl.append(compare(dense, out, batch.supervised)["kl"].double().cpu())
            hit.append(exact_match(out, labels).double().cpu())
        costs.append(torch.stack(kl, 1))
        hits.append(torch.stack(hit, 1))
        if progress is not None:
            progress(sum(len(c) for c in costs))
    return PlanCosts(torch.cat(costs), torch.cat(hits))


def band_plans(layers: int) -> dict[str, list[Tensor]]:
    """Every late entry and every early exit of a model, k = 0 .. layers.

    >>> [plan.tolist() for plan in band_plans(2)["late_entry"]]
    [[True, True], [False, True], [False, False]]
    """
    return {
        "late_entry": [SkipPlan.late_entry(k).keep(layers) for k in range(layers + 1)],
        "early_exit": [SkipPlan.early_exit(k).keep(layers) for k in range(layers + 1)],
    }
