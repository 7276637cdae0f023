"""Finish a training run: hold the budget, check the conditions, write the routers and the files, report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import lightning
from torch.utils.data import DataLoader

from adaskip import report
from adaskip.batch import Batch
from adaskip.errors import AdaSkipError
from adaskip.recipe import Recipe
from adaskip.runfiles import CONDITIONS, DATA, KEEP_RATES, LEARNED, ROUTER, SUMMARY, append_line, write_json
from adaskip.runtime.attach import RoutedModel
from adaskip.runtime.description import CONFIG
from adaskip.stages import Stages
from adaskip.survey.certificate import Certificate
from adaskip.survey.gauging import gauge_routing
from adaskip.survey.greedy import Path as Plan
from adaskip.survey.static import Contest, compare
from adaskip.theory.bounds import kl_bennett, kl_two_point
from adaskip.theory.prices import Prices
from adaskip.theory.tables import LayerMeasures
from adaskip.training.callbacks import ConditionCheck
from adaskip.training.data import Record
from adaskip.training.looks import Look
from adaskip.training.module import RouterTuner
from adaskip.training.tracking import Board, Laps
from adaskip.verbs.budget import Budget, hold_budget
from adaskip.verbs.prices import write_prices
from adaskip.verbs.shown import answer_some
from adaskip.verbs.static import attach_plan, describe


@dataclass(frozen=True)
class TrainResult:
    """Hold the outcome of a training run; ``summary.json`` holds `to_dict`.

    Where training ``stopped`` at violated conditions, nothing after ``stopped`` is known.
    """

    folder: Path
    steps: int
    stopped: str | None = None  # why
    parts: dict[str, dict[str, float]] = field(default_factory=dict)  # part -> seconds, processor_s
    budget: Budget | None = None
    validation: dict[str, float] = field(default_factory=dict)  # accuracy, kl, keep of what ``router/`` holds
    look: Look | None = None  # the last one at its conditions
    contest: Contest | None = None  # of the routers with the best static plan; None: there is none, or none was sought
    exported: str = "routers"  # what ``router/`` holds: routers or static
    alarms: tuple[str, ...] = ()  # that the finished routers raise
    certificate: Certificate | None = None  # of a bank of paths

    @property
    def ok(self) -> bool:
        """Return whether the compute budget is held, and training went to its end."""
        return self.stopped is None and self.budget is not None and self.budget.met

    def to_dict(self) -> dict[str, Any]:
        """Return what ``--json`` prints."""
        values: dict[str, Any] = {"ok": self.ok, "folder": str(self.folder), "steps": self.steps}
        if self.budget is None or self.look is None:
            return values | {"stopped": self.stopped}
        look = self.look.to_dict()
        return values | {
            "seconds": round(sum(part["seconds"] for part in self.parts.values()), 1),
            "parts": self.parts,
            "threshold": self.budget.threshold,
            **self.budget.to_dict(),
            "val": self.validation,
            **describe(self.contest, self.exported),
            **({} if self.certificate is None else {"certificate": self.certificate.to_dict()}),
            "conditions": {
                "layers": look["layers"],
                "joint": look["joint"],
                "gauge": look["gauge"],
                "together": look["together"],
                "violations": sorted(self.look.violations),
                "held": look["held"],
                "alarms": list(self.alarms),
            },
        }


def finish(
    ending: Ending, tuner: RouterTuner, validation: DataLoader[Any], batches: list[Batch], plan: Plan | None = None
) -> TrainResult:
    """Find the threshold, validate, check, compare with a static ``plan``, and leave a complete run folder.

    Args:
        ending: of the run, with the prices that the tuner began with; those of its checkpoint take their place.
        tuner: with the trained routers.
        validation: what this process reads of the validation data.
        batches: all of them.
        plan: the static one.
    """
    assert tuner.prices is not None
    ending, model = replace(ending, prices=tuner.prices), tuner.model.eval()
    keep, stages, laps = ending.recipe.objective.keep, ending.stages, ending.laps
    with stages(f"finding the threshold for objective.keep={keep:g}") as advance:
        batches = [batch.to(model.spec.device) for batch in batches]
        budget = hold_budget(model, batches, keep, advance)
    stages.note(budget.sentence)
    laps.lap("threshold")
    with stages("validating, and checking the conditions"):
        logged = ending.trainer.validate(tuner, validation, verbose=False)[0]
        look = ending.look(model)
    laps.lap("check")
    figures = {name: logged[f"val/{name}"] for name in ("accuracy", "kl", "keep")}
    rates = {kind: row.tolist() for kind, row in tuner.keep_by_kind.compute().items()}
    return ending.end(model, batches, budget, figures, look, rates, plan)


@dataclass(frozen=True)
class Ending:
    """End a run whose routers are made: the better of them and the static plan goes into a complete folder."""

    recipe: Recipe
    trainer: lightning.Trainer
    prices: Prices
    conditions: ConditionCheck
    calibration: list[Batch]  # that neither routers nor threshold were fitted on
    laps: Laps
    stages: Stages
    inputs: Sequence[Record] = ()  # of validation, of which a few are answered for people to look at
    processor: Any = None  # of the model

    def look(self, model: RoutedModel) -> Look:
        """Calibrate the gauge of a model's decisions, and look at their conditions."""
        inputs = [batch.to(model.spec.device) for batch in self.calibration]
        model.gauge = gauge_routing(model, inputs, self.recipe.objective.alpha)
        return self.conditions.inspect(model, self.prices, self.trainer.global_step)

    def end(
        self,
        model: RoutedModel,
        batches: list[Batch],
        budget: Budget,
        figures: dict[str, float],
        look: Look,
        rates: dict[str, list[float]],
        plan: Plan | None,
        certificate: Certificate | None = None,
    ) -> TrainResult:
        """Compare with the plan, and write.

        Args:
            model: with the routers, at their threshold; a plan that is better takes their place.
            batches: the validation data, on the model's device.
            budget: what was asked for, and what is kept.
            figures: the routers' accuracy, kl and keep on validation.
            look: at their conditions.
            rates: their keep rates by kind and layer.
            plan: the static one; None: none was sought, or none keeps so little.
            certificate: of a bank of paths.
        """
        recipe, step = self.recipe, self.trainer.global_step
        contest, exported, alarms = None, "routers", tuple(alarm.sentence for alarm in look.alarms)
        if plan is not None:
            with self.stages("comparing with the best static plan"):
                contest = compare(model, batches, plan, recipe.objective.keep)
            for logger in self.trainer.loggers:
                beside = {f"val/static_{name}": value for name, value in contest.figures(1).items()}
                logger.log_metrics(beside, step=step)
            model.facts = _facts(recipe, figures, look, contest)
            if contest.winner == "static" and recipe.static.fallback:
                exported = "static"
                model, look, rates = self._give_way(model, contest, rates)
                figures = {name: contest.figures(1)[name] for name in figures}
            self.laps.lap("compare")
        for sentence in alarms:
            self.stages.note(sentence)
        model.facts = _facts(recipe, figures, look, contest)
        folder, parts = Path(recipe.output), self.laps.parts
        result = TrainResult(folder, step, None, parts, budget, figures, look, contest, exported, alarms, certificate)
        if self.trainer.is_global_zero:
            _write(result, model, self.prices, rates)
            self._report(result, model, rates)
        return result

    def _report(self, result: TrainResult, model: RoutedModel, rates: dict[str, list[float]]) -> None:
        """Send what is no number to W&B, if it is used, and write the report from the files."""
        assert result.look is not None
        report.write(result.folder)
        board, labels = Board(self.trainer.loggers), model.sites.labels(range(len(model.sites)))
        board.conditions(result.look.to_dict())
        if rates:  # the data may name no kinds
            board.keep_rates(rates, report.keep_heat_map(rates, labels=labels), labels)
        if board.runs and (measured := self.conditions.measured) is not None:
            rungs = ladder(measured)
            board.ladder(rungs, report.ladder_plot(rungs, labels), labels)
        if board.runs and self.inputs:
            with self.stages("answering a few inputs to look at"):
                board.answers(self._answers(model))
        board.router(result.folder / ROUTER, f"router-{self.recipe.name}", model.facts | _origin(self.recipe, result))
        board.finish(self.stages)

    def _answers(self, model: RoutedModel) -> list[dict[str, Any]]:
        """Answer a few inputs; where the model cannot, the run is none the worse."""
        try:
            return answer_some(model, self.inputs, self.processor)
        except AdaSkipError as error:
            self.stages.note(f"no answers to look at: {error}")
            return []

    def _give_way(
        self, model: RoutedModel, contest: Contest, rates: dict[str, list[float]]
    ) -> tuple[RoutedModel, Look, dict[str, list[float]]]:
        """Put the routers aside and the plan in their place; return its model, conditions and keep rates."""
        if self.trainer.is_global_zero:
            model.save_pretrained(Path(self.recipe.output) / LEARNED)
        model = attach_plan(model, contest.skip)
        look = self.look(model)
        share = [0.0 if site in contest.skip else 1.0 for site in range(len(model.sites))]
        return model, look, dict.fromkeys(rates, share)


def _facts(recipe: Recipe, figures: dict[str, float], look: Look, contest: Contest | None) -> dict[str, Any]:
    """Say what the model card says of the run."""
    joint = look.joint.to_dict()
    beside = {} if contest is None else {"beside_the_best_static_plan": contest.sentence}
    return {
        "target_keep": recipe.objective.keep,
        "validation_keep": round(figures["keep"], 4),
        "validation_accuracy": round(figures["accuracy"], 4),
        "validation_kl_nats": round(figures["kl"], 5),
        "bound_kappa": joint["kappa"],
        "bound_coverage": joint["coverage"],
        **beside,
    }


def _write(result: TrainResult, model: RoutedModel, prices: Prices, rates: dict[str, list[float]]) -> None:
    assert result.look is not None
    model.save_pretrained(result.folder / ROUTER)
    write_json(result.folder / KEEP_RATES, rates)
    write_prices(result.folder, prices)
    append_line(result.folder / CONDITIONS, result.look.to_dict() | {"final": True})
    write_json(result.folder / SUMMARY, result.to_dict(), indent=2)


def ladder(measured: LayerMeasures) -> dict[str, list[float]]:
    """Return, of each layer, the exact cost of its skip and two proved bounds on it, means over inputs in nats.

    s and u are the largest of an input's predicted tokens and KL is their mean, so each rung lies above the one before
    for every input (link 3b of docs/theory.md).
    """
    s, u = measured.s.double(), measured.u.double()
    rungs = {"exact KL": measured.kl.double(), "two-point bound": kl_two_point(s, u), "Bennett bound": kl_bennett(s, u)}
    return {name: values.mean(0).tolist() for name, values in rungs.items()}


def _origin(recipe: Recipe, result: TrainResult) -> dict[str, Any]:
    """Say what routers were made of: run, recipe, backbone with a digest of its weights, data with theirs."""
    saved = json.loads((result.folder / ROUTER / CONFIG).read_text(encoding="utf-8"))
    data = json.loads((result.folder / DATA).read_text(encoding="utf-8"))
    return {
        "recipe": recipe.name,
        "method": recipe.method,
        "seed": recipe.seed,
        "exported": result.exported,
        "backbone": saved["backbone"] | {"revision": recipe.backbone.revision},
        "data": {"source": recipe.data.source, "subset": recipe.data.subset, **data["splits"]},
        "content": saved["content"],
    }
