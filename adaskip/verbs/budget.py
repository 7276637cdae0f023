"""The compute budget: the threshold whose mean keep rate is just below what was asked, or why there is none.

A threshold means something only beside the routers' own logits, so every candidate is one of them. Raising it past a
logit changes what the layers behind see, and with it their logits: what a threshold keeps is known by running it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adaskip.batch import Batch, exact_match
from adaskip.errors import ConfigError, DataError
from adaskip.plan import KEEP_ALL
from adaskip.runtime.attach import RoutedModel
from adaskip.stages import Advance

CLOSE = 0.002
"""So far below the budget the search may stop: a fifth of a point of the dense FLOPs."""
COARSE = 0.05
"""From here on a gap below the budget is worth a sentence."""
RUNS = 60
"""Passes over the inputs at most; halving a million different logits takes twenty."""
ROUNDING = 1e-9


@dataclass(frozen=True)
class Budget:
    """Hold a goal for the mean keep rate, the rate that was reached, and its threshold.

    ``least`` is what these routers keep when all of them skip: nothing below it can be reached on these inputs.
    """

    target: float
    keep: float
    threshold: float
    least: float
    reasons: tuple[str, ...] = ()  # why not less can be skipped

    @property
    def met(self) -> bool:
        """Return whether the mean keep rate lies at or below the goal."""
        return self.keep <= self.target + ROUNDING

    @property
    def sentence(self) -> str:
        """Say what was asked, what was reached, and why."""
        goal = f"objective.keep={self.target:g}"
        if not self.met:
            why = "; ".join(self.reasons) or "the rest of a layer runs although its router skips"
            return (
                f"budget missed: {goal} was asked for and a mean keep rate of {self.keep:.3f} reached, the least that "
                f"is possible here: {why}. Ask for at least {_up(self.least)}, or let more be skipped"
            )
        reached = f"{goal}: mean keep rate {self.keep:.3f} at threshold {self.threshold:.6g}"
        if (gap := self.target - self.keep) < COARSE:
            return reached
        return (
            f"{reached}, {gap:.3f} below what was asked: the routers decide so coarsely that the next lower threshold "
            "keeps more than that; train them longer, or ask for another keep rate"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return what stands in ``summary.json``."""
        return {
            "budget": "held" if self.met else "missed",
            "target_keep": self.target,
            "reached_keep": self.keep,
            "least_keep": self.least,
            "budget_sentence": self.sentence,
        }


def _up(share: float) -> float:
    """Return the next whole hundredth; it is advice to type."""
    return min(1.0, -(-share * 100 // 1) / 100)


@torch.no_grad()
def quality(model: RoutedModel, batches: Sequence[Batch]) -> tuple[float, float]:
    """Measure mean keep rate and teacher-forced exact-match accuracy of the routed model."""
    keep, right = [], []
    for batch in batches:
        logits = model(**batch.arguments()).logits
        keep.append(model.routing.keep_rate)
        right.append(exact_match(logits, batch.labels))
    return float(torch.cat(keep).mean()), float(torch.cat(right).float().mean())


def hold_budget(model: RoutedModel, batches: Iterable[Batch], keep: float, advance: Advance | None = None) -> Budget:
    """Set the routers' threshold so that their mean keep rate on these inputs is just below ``keep``.

    Training leaves the hard decisions near the target, not on it; one number, found on validation data, closes it.
    `adaskip train` ends with it; behind a trainer of your own it is yours to call.

    The search holds two thresholds that were both run: ``low`` keeps more than the budget, ``high`` does not. Between
    ``low`` and the smallest logit of its own run above it no decision changes, in the first layer and so in none
    behind it. So the next threshold to run is one of the logits of ``low``'s run, whatever their scale; when none lies
    strictly between, ``high`` is exactly where the keep rate falls. Equal logits end the search early.

    Args:
        model: with trained routers.
        batches: prompts with answers that the routers were not fitted on, such as a data loader of validation inputs.
        keep: the mean keep rate that is asked for.
        advance: called with the number of passes over the batches made so far.

    Returns:
        What was reached. Where not even skipping everything meets the budget, the threshold is the one that keeps
        least, and ``met`` is False.

    Raises:
        ConfigError: the model's policy has no threshold.
        DataError: a router's logit is not finite, or there are no inputs.

    Example:
        ``adaskip.hold_budget(model, validation, 0.6).sentence``
    """
    given = [batch.to(model.spec.device) for batch in batches]
    if not given:
        raise DataError("hold_budget: expected batches of validation inputs, got none")
    training = model.training
    try:
        return _search(model.eval(), given, keep, advance)
    finally:
        model.train(training)


def _search(model: RoutedModel, batches: Sequence[Batch], keep: float, advance: Advance | None) -> Budget:
    dense = _run(model, batches, KEEP_ALL)
    if dense.keep <= keep + ROUNDING:
        return Budget(keep, dense.keep, KEEP_ALL, dense.keep)
    empty = _run(model, batches, -KEEP_ALL)
    # skipping everything is what the largest logit of that very run does as well
    top = float(empty.logits.max()) if len(empty.logits) else model.policy.threshold
    low, high, at_high = dense, top, empty.keep
    if empty.keep > keep + ROUNDING:
        model.set_threshold(top)
        return Budget(keep, empty.keep, top, empty.keep, _reasons(model, empty.rates))
    for run in range(RUNS):
        if advance is not None:
            advance(run)
        between = low.logits[(low.logits > low.threshold) & (low.logits < high)]
        if not len(between) or keep - at_high <= CLOSE:
            break
        # every other step guesses by interpolation, so that a smooth curve takes few runs and a steep one no more
        # than halving does
        share = (low.keep - keep) / (low.keep - at_high) if run % 2 == 0 else 0.5
        place = min(len(between) - 1, int(len(between) * min(0.9, max(0.1, share))))
        tried = _run(model, batches, float(between.sort().values[place]))
        if tried.keep <= keep:
            high, at_high = tried.threshold, tried.keep
        else:
            low = tried
    model.set_threshold(high)
    return Budget(keep, at_high, high, empty.keep)


@torch.no_grad()
def lightest(model: RoutedModel, batches: Sequence[Batch], keep: float) -> Budget:
    """Measure what these inputs keep when every router skips, beside a budget; leave the model as it was."""
    before = model.policy.threshold
    try:
        run = _run(model, batches, -KEEP_ALL)
    finally:
        model.set_threshold(before)
    return Budget(keep, run.keep, -KEEP_ALL, run.keep, _reasons(model, run.rates))


@dataclass(frozen=True)
class _Ran:
    """Hold one pass over the inputs at a threshold."""

    threshold: float
    keep: float  # mean over inputs
    rates: Tensor  # float64 (n) keep rate of each input
    logits: Tensor  # float32 (k) of every decision that a threshold can change


@torch.no_grad()
def _run(model: RoutedModel, batches: Sequence[Batch], threshold: float) -> _Ran:
    model.set_threshold(threshold)
    rates, logits = [], []
    free = [site for site in range(len(model.sites)) if site not in model.policy.held]
    for batch in batches:
        model(**batch.arguments())
        routing = model.routing
        if routing.logits is None:
            raise ConfigError(
                f"budget: a policy of kind {model.policy.kind!r} has no threshold to hold a budget by; expected "
                "routers, or another policy that gives logits"
            )
        decided = routing.logits[free]
        logits.append((decided if routing.tokens is None else decided[:, routing.tokens]).flatten().float().cpu())
        rates.append(routing.keep_rate.double().cpu())
    all_logits = torch.cat(logits)
    if not all_logits.isfinite().all():
        raise DataError(
            f"budget: {int((~all_logits.isfinite()).sum())} of {len(all_logits)} logits of the routers are not finite, "
            "so no threshold orders them; train with a smaller trainer.learning_rate, or in trainer.precision=32-true"
        )
    all_rates = torch.cat(rates)
    return _Ran(threshold, float(all_rates.mean()), all_rates, all_logits)


def _reasons(model: RoutedModel, rates: Tensor) -> tuple[str, ...]:
    """Say why skipping everything still keeps as much as ``rates`` (n) say."""
    target, held, sites, reasons = model.target, model.policy.held, model.sites, []
    if held:
        names = ", ".join(map(str, sites.labels(held)))
        whole = "layers" if len(sites) == sites.layers else "halves of layers"
        reasons.append(f"{len(held)} of {len(sites)} {whole} are held and run whatever their routers say ({names})")
    if bound := int((rates >= 1 - ROUNDING).sum()):
        reasons.append(
            f"on {bound} of {len(rates)} inputs nothing can be left out"
            + (", they hold no vision tokens" if target.group == "vision" and len(held) < len(sites) else "")
        )
    if target.group == "vision" and bound < len(rates):
        reasons.append("text tokens run every layer under router.group=vision")
    if target.unit in ("attention", "mlp"):
        reasons.append(f"only the {target.unit} of a layer can be left out under router.unit={target.unit}")
    if target.kv == "kept":
        reasons.append("keys and values of what skips are computed under router.kv=kept")
    return tuple(reasons)
