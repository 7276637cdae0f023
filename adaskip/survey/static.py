"""Find the best static plan of a compute budget, the rival that routers must beat, and set the two side by side.

exact cost of every layer alone      ->  leave out the cheapest, then the one that costs least beside it, ...
what each layer saves an input       ->  ... until the mean keep rate is within the budget
both on the same inputs              ->  whichever costs less is the better one; the difference has an interval
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adaskip.batch import Batch
from adaskip.plan import SkipPlan, Target
from adaskip.runtime.attach import RoutedModel
from adaskip.sites import Label, Unit, label_site, name_sites
from adaskip.survey.greedy import Path, exact_prices, greedy_paths
from adaskip.survey.plans import PlanCosts, run_plan
from adaskip.survey.record import match_predicted, record
from adaskip.survey.refine import refine_path
from adaskip.theory.intervals import Interval, paired_difference

ROUNDING = 1e-9
"""A keep rate so little above the budget is within it: float64's last digits."""
SKIP = -1.0
"""The logit at which the routers of layers that a plan leaves out begin."""


@torch.no_grad()
def layer_savings(model: RoutedModel, batches: Sequence[Batch]) -> Tensor:
    """Return float64 (n s): the share of each input's dense decoder FLOPs that leaving out one site alone saves.

    What sites save adds up, so a plan keeps ``1 - saved[:, skip].sum(1)``. Costs a pass that skips every layer.
    """
    shares = []
    for batch in batches:
        model(**batch.arguments(), routing=torch.zeros(len(model.sites), len(batch), dtype=torch.bool))
        run, skip = model.flops()
        dense = run.sum(0)
        shares.append(torch.where(dense > 0, (run - skip) / dense.clamp(min=1.0), 0.0).T.cpu())
    return torch.cat(shares)


def find_static(
    model: RoutedModel,
    batches: Sequence[Batch],
    single: Tensor,
    saved: Tensor,
    keep: float,
    width: int = 6,
    progress: Callable[[int], None] | None = None,
) -> Path | None:
    """Find the layers that cost least to leave out, the same for every input, within a compute budget.

    The fewest layers, chosen greedily, that bring the mean keep rate down to ``keep``; layers that the model holds
    stay. None where not even leaving out all of the others does. Costs about ``width`` plans for every layer left out
    after the first. Halves of layers, which save more or less, are exchanged with others once the budget holds.

    Args:
        model: attached; whatever decides in it, only its execution is used.
        batches: inputs that the plans are priced on, on the model's device.
        single: (n l) exact cost of each layer alone, on the same inputs.
        saved: (m l) of `layer_savings`, on the inputs whose mean keep rate counts.
        keep: the budget.
        width: layers tried each time one more goes.
        progress: called with the number of layers left out so far.
    """
    means, saves = single.double().mean(0).clone(), saved.mean(0)
    means[list(model.policy.held)] = torch.inf

    def kept(path: Path) -> float:
        return 1 - float(saves[list(path)].sum())

    def enough(path: Path) -> bool:
        if progress is not None:
            progress(len(path))
        return kept(path) <= keep + ROUNDING

    if enough(()):
        return ()
    if kept(tuple(means.isfinite().nonzero().flatten().tolist())) > keep + ROUNDING:
        return None
    price = exact_prices(model, lambda rows: batches)
    rows = range(len(single))
    found = greedy_paths(price, rows, means, len(means), width, enough, saves)[-1]
    if model.target.unit == "sublayers":
        found = refine_path(price, rows, found, means, width, enough, saves)
    return found[0]


def as_plan(skip: Path, target: Target) -> SkipPlan:
    """Return the plan that leaves these sites out, for the same tokens and units as the routers of a target."""
    return SkipPlan(skip=tuple(label_site(target.unit, site) for site in skip), **whole_rows(target))


def whole_rows(target: Target) -> dict[str, Any]:
    """Return which tokens and units a target speaks of, as settings of a policy that decides for whole rows at once."""
    settings: dict[str, Any] = {name: getattr(target, name) for name in ("unit", "group", "kv", "phase")}
    if target.group == "all" and target.phase != "prefill":
        settings["kv"] = "absent"  # where the whole row leaves a layer, nothing is there to read its keys
    return settings


def start_logits(skip: Path, held: Sequence[int], layers: int) -> Tensor:
    """Return float32 (l): logits at which routers begin at a plan, and may leave it from the first step on.

    A layer that the plan leaves out starts at -1, where a gate still has four fifths of its steepest slope. The others
    share one logit, between 1 and 4, at which as many layers are expected to run as the plan keeps: what training's
    draws skip of these makes up for what they run of those, so that it starts within its budget.

    >>> [round(logit, 2) for logit in start_logits((1, 2), (), 6).tolist()]
    [1.86, -1.0, -1.0, 1.86, 1.86, 1.86]
    """
    free = [layer for layer in range(layers) if layer not in skip and layer not in held]
    runs = 1 / (1 + math.exp(-SKIP)) * len(skip)  # expected of the layers that the plan leaves out
    share = min(max(runs / max(1, len(free)), 1e-6), 0.5)
    logits = torch.full((layers,), min(max(math.log((1 - share) / share), 1.0), 4.0))
    logits[list(skip)] = SKIP
    return logits


@dataclass(frozen=True)
class Contest:
    """Hold what routers and the best static plan of their budget cost the same inputs."""

    skip: Path  # of the plan
    costs: PlanCosts  # (n 2): of the routers, of the plan
    budget: float
    unit: Unit = "block"
    adapted: bool = False  # whether the routers have adapters; the plan is of the frozen model

    @property
    def labels(self) -> tuple[Label, ...]:
        """Return what the plan leaves out, by name."""
        return tuple(label_site(self.unit, site) for site in self.skip)

    @property
    def difference(self) -> Interval:
        """Return what the plan costs more than the routers, nats per predicted token, with a 95 % interval."""
        routers, static = self.costs.kl.unbind(1)
        gap = static - routers
        if not gap.isfinite().all():
            return Interval(float(gap.mean()), -math.inf, math.inf, len(gap))
        return paired_difference(static, routers)

    @property
    def winner(self) -> str:
        """Return ``routers`` or ``static``: within the budget the lower mean KL, and the routers where both are equal.

        Who misses the budget loses to who does not.
        """
        kl, keep = self.costs.kl.mean(0), self.costs.keep.mean(0)
        within = (keep <= self.budget + ROUNDING).tolist()
        if within[0] != within[1]:
            return "routers" if within[0] else "static"
        return "routers" if bool(kl[0] <= kl[1]) else "static"

    def figures(self, side: int) -> dict[str, float]:
        """Return mean keep rate, KL and accuracy of the routers (0) or the plan (1)."""
        means = {"keep": self.costs.keep, "kl": self.costs.kl, "accuracy": self.costs.hit}
        return {name: float(values[:, side].mean()) for name, values in means.items()}

    @property
    def sentence(self) -> str:
        """Say by how much the routers win, or that they do not."""
        gap = self.difference
        sides = [f"{self.figures(side)['kl']:.3g}" for side in (0, 1)]
        names = ("routers with adapters", "plan of the frozen model") if self.adapted else ("routers", "plan")
        text = (
            f"{names[0]}: {sides[0]} nats a token, the best static {names[1]} ({name_sites(self.labels)}) {sides[1]}: "
        )
        if self.winner == "static":
            if self.figures(0)["keep"] > self.budget + ROUNDING:
                return f"{text}the routers miss the budget, which the plan holds"
            return f"{text}the routers do not beat it, they cost {_range(-gap.estimate, -gap.high, -gap.low)} more"
        clear = "" if gap.low > 0 else ", which may be chance"
        if gap.estimate == 0:
            return f"{text}they cost the same"
        if gap.estimate < 0:
            return f"{text}the plan costs less, but misses the budget"
        return f"{text}routers win by {_range(gap.estimate, gap.low, gap.high)}{clear}"

    def to_dict(self) -> dict[str, Any]:
        """Return it JSON-ready, infinite ends as None."""
        gap = self.difference
        ends = {name: value if math.isfinite(value) else None for name, value in (("low", gap.low), ("high", gap.high))}
        return {
            "skip": list(self.labels),
            **self.figures(1),
            "routers": self.figures(0),
            "comparison": {"difference": gap.estimate, **ends, "n": gap.n, "winner": self.winner},
        }


@torch.no_grad()
def compare(model: RoutedModel, batches: Sequence[Batch], skip: Path, budget: float) -> Contest:
    """Run the model's own decisions and a static plan on the same inputs, beside the dense model.

    Args:
        model: attached, deciding as it will be saved.
        batches: prompts with answers, on the model's device.
        skip: layers that the plan leaves out.
        budget: the keep rate that both were asked for.
    """
    plan = torch.ones(len(model.sites), dtype=torch.bool)
    plan[list(skip)] = False
    columns: dict[str, list[Tensor]] = {"kl": [], "hit": [], "keep": []}
    for batch in batches:
        dense = record(model, batch, states=False)
        routed = record(model, batch, routed=True, states=False)
        decided = {
            "kl": dense.compare(routed.logits)["kl"],
            "hit": match_predicted(routed.logits, batch),
            "keep": model.routing.keep_rate,
        }
        static = run_plan(dense, plan)
        for name, values in columns.items():
            values.append(torch.stack([decided[name].double().cpu(), static[name]], 1))
    costs = PlanCosts(**{name: torch.cat(values) for name, values in columns.items()})
    return Contest(skip, costs, budget, model.target.unit, model.adapters is not None)


def _range(estimate: float, low: float, high: float) -> str:
    if not (math.isfinite(low) and math.isfinite(high)):
        return f"{estimate:.3g} (too few inputs for an interval)"
    return f"{estimate:.3g} (95 %: {low:.3g} to {high:.3g})"
