"""Search the best plan that is the same for every input: greedy layer removal, late entry, early exit."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from adaskip.batch import Batch
from adaskip.errors import ConfigError
from adaskip.plan import SkipPlan
from adaskip.runtime.attach import RoutedModel
from adaskip.survey.plans import run_plan
from adaskip.survey.record import record


@dataclass(frozen=True)
class Scored:
    """Hold a plan, and the model's quality and cost under it on some inputs."""

    plan: SkipPlan
    accuracy: float  # share of inputs whose every answer token is right (teacher-forced)
    kl: float  # mean exact KL(dense || plan), nats per predicted token
    keep: float  # mean executed over dense decoder FLOPs


class Search:
    """Score plans on validation data; the dense logits are computed once.

    Args:
        model: attached, with routers or without; only its execution is used.
        batches: prompts with answers, on the model's device.
    """

    def __init__(self, model: RoutedModel, batches: list[Batch]) -> None:
        self.sites, self.layers = model.sites, len(model.spec.layers)
        self.target: dict[str, Any] = {"group": model.target.group, "unit": model.target.unit}
        # without the states, which would fill the memory: every batch stays at hand for the whole search
        self.recorded = [record(model, batch, states=False) for batch in batches]

    @torch.no_grad()
    def score(self, plan: SkipPlan) -> Scored:
        """Return the model's quality and cost under one plan."""
        costs = [run_plan(recorded, plan.keep(self.layers)) for recorded in self.recorded]
        accuracy, kl, keep = (float(torch.cat([c[name] for c in costs]).mean()) for name in ("hit", "kl", "keep"))
        return Scored(plan, accuracy, kl, keep)

    def greedy(self, skips: int) -> list[Scored]:
        """Return plans of 0 to ``skips`` layers, or halves: one goes at a time, always the one whose loss hurts least.

        Costs at most ``skips * layers`` passes over the data.
        """
        labels = self.sites.labels(range(len(self.sites)))
        if not 0 <= skips <= len(labels):
            raise ConfigError(f"greedy: expected 0 to {len(labels)} layers to skip, got {skips}")
        path = [self.score(SkipPlan(**self.target))]
        for _ in range(skips):
            gone = path[-1].plan.skip
            tries = (SkipPlan.static([*gone, label], **self.target) for label in labels if label not in gone)
            path.append(best(self.score(plan) for plan in tries))
        return path

    def bands(self, absent: int) -> list[Scored]:
        """Score late entry and early exit with the same number of layers left out: plans of equal compute."""
        leave = SkipPlan.early_exit(self.layers - absent, **self.target)
        return [self.score(SkipPlan.late_entry(absent, **self.target)), self.score(leave)]


def best(scored: Iterable[Scored]) -> Scored:
    """Return the most accurate plan; of equally accurate ones that of the smallest KL."""
    return max(scored, key=lambda s: (s.accuracy, -s.kl))
