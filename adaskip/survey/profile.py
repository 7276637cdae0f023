"""`adaskip.profile`: how redundant each layer is for each token group, by every notion, and which notion predicts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from adaskip.batch import Batch, count, take
from adaskip.errors import DataError
from adaskip.plan import Group, SkipPlan
from adaskip.runtime.attach import RoutedModel, attach
from adaskip.stages import SILENT, Advance, Stages
from adaskip.survey.layers import survey_layers
from adaskip.survey.plans import PlanCosts, band_plans, plan_costs
from adaskip.survey.sizes import check_sizes
from adaskip.theory import bounds
from adaskip.theory.claims import Claim, judge_claims
from adaskip.theory.conditions import Findings, judge
from adaskip.theory.conformal import smallest_sample
from adaskip.theory.intervals import bonferroni, bootstrap_mean, clopper_pearson
from adaskip.theory.notions import PER_LAYER, Notions, plain
from adaskip.theory.prediction import describe_ranks, rank_over_inputs, rank_over_layers
from adaskip.theory.prices import calibrate_prices
from adaskip.theory.sinks import describe_sinks
from adaskip.theory.tables import Survey

Progress = Callable[[str, int], None]


@dataclass(frozen=True)
class GroupProfile:
    """Hold one token group of a profile; JSON-ready but for the claims."""

    group: str
    layers: list[dict[str, Any]]  # one row a layer: every notion with its interval, and the verdict
    rank_correlation: dict[str, dict[str, Any] | None]  # notion -> rho over layers with the exact cost, and interval
    rank_correlation_inputs: dict[str, float | None]  # notion -> mean rho over inputs at one layer
    late_entry: list[dict[str, Any]]  # one row a k: layers the group is absent from at the start
    early_exit: list[dict[str, Any]]  # one row a k: layers the group stays for
    claims: list[Claim]
    chain: dict[str, tuple[int, int]]  # link -> times checked, times violated
    undecided: dict[str, str]  # notion -> why it could not be measured
    ranks: str  # which notions rank layers, and which inputs, in a sentence
    sinks: str  # where states are many times as long as the others', in a sentence


@dataclass(frozen=True)
class Profile:
    """Hold a result of `profile`. The last of ``groups`` is ``vision``, the paper's setting, where it was measured."""

    model: str
    n: int
    tolerance: float
    dense_accuracy: float
    groups: list[GroupProfile]

    @property
    def chain_violations(self) -> int:
        """Count how often any link of the chain did not hold; a proved link that fails is a defect."""
        return sum(wrong for group in self.groups for _, wrong in group.chain.values())

    def to_dict(self) -> dict[str, Any]:
        """Return it JSON-ready. ``layers`` holds the rows of all groups; ``rank_correlation`` is that of ``group``."""
        main = self.groups[-1]
        rho = {name: None if row is None else row["estimate"] for name, row in main.rank_correlation.items()}
        return {
            "model": self.model,
            "n": self.n,
            "tolerance": self.tolerance,
            "dense_accuracy": self.dense_accuracy,
            "group": main.group,
            "layers": [row for group in self.groups for row in group.layers],
            "rank_correlation": rho,
            "chain_violations": self.chain_violations,
            "groups": {
                group.group: {
                    "rank_correlation": group.rank_correlation,
                    "rank_correlation_inputs": group.rank_correlation_inputs,
                    "late_entry": group.late_entry,
                    "early_exit": group.early_exit,
                    "claims": [claim.to_dict() for claim in group.claims],
                    "chain": {k: {"checked": a, "violated": b} for k, (a, b) in group.chain.items()},
                    "undecided": group.undecided,
                    "ranks": group.ranks,
                    "sinks": group.sinks,
                }
                for group in self.groups
            },
        }


PARTS = 4
"""A quarter of the inputs calibrates, two judge, one tests."""
ALPHA = 0.1


def smallest_profile(alpha: float = ALPHA) -> int:
    """Return how many inputs a profile needs: with fewer, the quarter that calibrates is too small for this alpha.

    >>> smallest_profile(0.1)
    33
    """
    return max(PARTS * (smallest_sample(alpha) - 1) + 1, 2 * PARTS)


def profile(
    base: PreTrainedModel,
    batches: Iterable[Batch],
    groups: tuple[Group, ...] | None = None,
    *,
    tolerance: float = 0.05,
    level: float = 0.95,
    alpha: float = ALPHA,
    tangents: int = 64,
    seed: int = 0,
    progress: Progress | None = None,
    stages: Stages = SILENT,
) -> Profile:
    """Measure how redundant each layer of a frozen model is, by every notion; trains nothing, changes nothing.

    A quarter of the inputs calibrates the constants, a half judges the layers, and a quarter tests the verdicts.

    Args:
        base: a Hugging Face model without routers; it is left as it was.
        batches: as `Collator` makes them from prompts with answers.
        groups: ``all``, ``vision`` or both; default: both where the model has vision tokens.
        tolerance: nats per predicted token that one skipped layer may cost.
        level: of every interval; verdicts are corrected for multiplicity.
        alpha: miscoverage of the calibrated constants.
        tangents: inputs that get forward-mode products.
        seed: of folds, codebooks, draws and bootstraps.
        progress: called with the group and the number of inputs done.
        stages: hears what is under way.

    Raises:
        DataError: no batches with answers or too few inputs (said before anything is measured), inputs that predict
            nothing or lack the group, activations that are not finite.
        BackboneError: the model cannot be routed, or its attention cannot be read.

    Example:
        ``adaskip.profile(base, loader(records, adaskip.Collator(processor), 32)).to_dict()["layers"]``
    """
    kept = take(batches, None, "profile")
    if (inputs := count(kept)) < (needed := smallest_profile(alpha)):
        raise DataError(
            f"profile: expected at least {needed} inputs, of which a quarter calibrates at alpha={alpha:g}, "
            f"got {inputs}"
        )
    profiles: list[GroupProfile] = []
    accuracy = math.nan
    remaining: list[Group] = ["all"] if groups is None else [*groups]
    while remaining:
        group = remaining.pop(0)
        model = attach(base, SkipPlan(group=group))
        try:
            if groups is None and group == "all" and model.spec.vision_ids:
                remaining.append("vision")
            layers = len(model.spec.layers)
            with stages(f"measuring {layers} layers on {inputs} inputs, group {group}", inputs) as advance:

                def tick(done: int, group: Group = group, advance: Advance = advance) -> None:
                    advance(done)
                    if progress is not None:
                        progress(group, done)

                check_sizes(model, kept)
                measured = survey_layers(model, kept, tangents, seed=seed, progress=tick)
            with stages(f"judging the notions and running late entries and early exits, group {group}"):
                profiles.append(_Judge(measured, tolerance, level, alpha, seed).profile(model, kept))
        finally:
            model.detach()
        accuracy = measured.dense_hit.mean().item()
    return Profile(type(base).__name__, inputs, tolerance, accuracy, profiles)


class _Judge:
    """Draw conclusions from one group's survey: who calibrates, who judges and who tests is drawn here."""

    def __init__(self, measured: Survey, tolerance: float, level: float, alpha: float, seed: int) -> None:
        self.measured, self.seed = measured, seed
        self.tolerance, self.level, self.alpha = tolerance, level, alpha
        self.n, self.n_layers = measured.kl.shape
        for name in ("cosine", "rho", "kl", "mass"):
            values = getattr(measured, name)
            if not values.isfinite().all():
                row, layer = (~values.isfinite()).nonzero()[0].tolist()
                raise DataError(
                    f"profile: {name} of input {row} at layer {layer} is {values[row, layer]}; expected finite states, "
                    "load the model in another dtype"
                )
        # at random, for the data may repeat with a period
        place = torch.randperm(self.n, generator=torch.Generator().manual_seed(seed)) % PARTS
        self.calibrating, self.judging, self.testing = place == 0, place >= 2, place == 1

    def profile(self, model: RoutedModel, batches: list[Batch]) -> GroupProfile:
        """Judge every layer, and run the plans that the verdicts suggest."""
        measured = self.measured
        prices = calibrate_prices(measured.select(self.calibrating), measured.mass[self.judging].mean(0), self.alpha)
        findings = judge(measured.select(self.judging), prices, measured.group, self.tolerance, self.level)
        sets = self._sets(findings)

        # one pass over the inputs runs all plans: late entries, early exits, and all admissible layers at once
        plans = band_plans(self.n_layers)
        joint = ~torch.tensor(sets["admissible"])
        costs = plan_costs(model, batches, [*plans["late_entry"], *plans["early_exit"], joint])
        late_entry = costs.select(slice(0, self.n_layers + 1))
        early_exit = costs.select(slice(self.n_layers + 1, -1))
        claims = judge_claims(
            measured.group,
            {"late_entry": late_entry.kl, "early_exit": early_exit.kl},
            measured.kl[self.testing],
            costs.kl[self.testing, -1],
            sets,
            self.tolerance,
            self.level,
        )

        # the bound's constants were calibrated on a quarter of the inputs: it predicts the others only
        bound = bounds.kl_two_point(*prices.costs(measured.rho)).masked_fill(self.calibrating[:, None], torch.nan)
        notions = Notions(measured, bound, self.level, self.seed)
        predictors = notions.predictors()
        single = {name: values for name, values in predictors.items() if name not in PER_LAYER}
        over_layers = {
            name: rank_over_layers(values, measured.kl, self.level, seed=self.seed)
            for name, values in predictors.items()
        }
        over_inputs = {name: rank_over_inputs(values, measured.kl) for name, values in single.items()}
        rows = [self._row(layer, notions, findings) for layer in range(self.n_layers)]
        lengths = [row["sinks"] for row in rows]
        return GroupProfile(
            group=measured.group,
            layers=rows,
            rank_correlation={name: plain(rho) for name, rho in over_layers.items()},
            rank_correlation_inputs=over_inputs,
            late_entry=self._curve(late_entry),
            early_exit=self._curve(early_exit),
            claims=claims,
            chain=measured.chain | notions.state_links(),
            undecided=notions.undecided,
            ranks=describe_ranks(
                {name: None if rho is None else rho.estimate for name, rho in over_layers.items()}, over_inputs
            ),
            sinks=describe_sinks(
                [row["longest"] for row in lengths],
                [[place["position"] for place in row["positions"]] for row in lengths],
            ),
        )

    def _sets(self, findings: Findings) -> dict[str, list[bool]]:
        """Return which layers are admissible, inadmissible, or admissible by the cheap notions alone."""
        verdicts = [findings.verdict(layer) for layer in range(self.n_layers)]
        cheap = [
            {row.verdict for row in findings.rows if row.layer == layer and row.notion != "functional"}
            for layer in range(self.n_layers)
        ]
        return {
            "admissible": [verdict == "admissible" for verdict in verdicts],
            "inadmissible": [verdict == "inadmissible" for verdict in verdicts],
            "cheap": [verdicts == {"admissible"} for verdicts in cheap],
        }

    def _row(self, layer: int, notions: Notions, findings: Findings) -> dict[str, Any]:
        rows = [row.to_dict() for row in findings.rows if row.layer == layer]
        return {**notions.row(layer), "verdict": findings.verdict(layer), "findings": rows}

    def _curve(self, costs: PlanCosts) -> list[dict[str, Any]]:
        each = bonferroni(self.level, costs.kl.shape[1])
        return [
            {
                "k": k,
                "kl": plain(bootstrap_mean(costs.kl[:, k], each, seed=self.seed)),
                "accuracy": plain(clopper_pearson(int(costs.hit[:, k].sum()), len(costs.hit), each)),
            }
            for k in range(costs.kl.shape[1])
        ]
