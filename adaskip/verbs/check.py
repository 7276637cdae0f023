"""`adaskip check`: do the theory's conditions hold for what a run's routers decide on inputs they have not seen?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaskip.batch import Batch
from adaskip.sites import PARTS
from adaskip.stages import SILENT, Stages
from adaskip.survey.skips import measure_bands, measure_skips
from adaskip.theory.bands import BandFinding, early_exits, judge_bands, late_entries
from adaskip.theory.conditions import Conclusion, conclude
from adaskip.theory.prices import Prices, calibrate_prices
from adaskip.training.callbacks import ConditionCheck
from adaskip.training.data import Collator, Record, loader
from adaskip.training.looks import Look
from adaskip.verbs.amounts import enough_to_check, fitted
from adaskip.verbs.prices import check_layers, read_prices
from adaskip.verbs.run import Run, read_recipe
from adaskip.verbs.splits import records, unfitted


@dataclass(frozen=True)
class CheckResult:
    """Hold a verdict on a run's conditions, and what it rests on."""

    conclusion: Conclusion  # its verdict: hold, do not hold, or undecided
    look: Look  # the layers, the routers' real skips, and what these cost together
    split: str  # that was judged
    bands: tuple[BandFinding, ...] | None = None  # late entries and early exits, if they were asked for

    @property
    def ok(self) -> bool:
        """Return whether the conditions were shown to hold; a check that cannot decide has not shown it."""
        return self.conclusion.verdict == "hold"

    def to_dict(self) -> dict[str, Any]:
        """Return what ``--json`` prints; ``summary`` holds the joint figures beside the tolerance."""
        look = self.look.to_dict()
        verdict = {"verdict": self.conclusion.verdict, "reasons": list(self.conclusion.reasons)}
        summary = {**verdict, "tolerance": self.look.tolerance, **look["joint"], "layers": look["layers"]}
        values = {"ok": self.ok, **verdict, "rows": look["findings"], "skips": look["skips"]}
        values["summary"] = summary | {"gauge": look["gauge"], "together": look["together"], "split": self.split}
        if self.bands is not None:
            layers = len(look["layers"]) // len(PARTS[self.look.unit])
            values["bands"] = [band.to_dict(layers) for band in self.bands]
        return values


def check(run: str | Path, bands: bool = False, stages: Stages = SILENT) -> CheckResult:
    """Judge a finished run's conditions anew, on held-out inputs that nothing was fitted on.

    See `adaskip.theory.conditions.conclude` for what it takes that they hold.

    Args:
        run: the run's folder.
        bands: also judge every late entry and early exit, against the same tolerance; they do not change ``ok``.
        stages: hears what is under way.

    Raises:
        CheckpointError: the folder is no finished run, or its prices are missing or damaged.
        DataError: too few inputs; said before anything is loaded.

    Example:
        ``assert adaskip.check("runs/digits-vlm").ok``
    """
    folder = Path(run)
    recipe, prices = read_recipe(folder), read_prices(folder)
    chosen, split = unfitted(recipe)
    enough_to_check(recipe, len(chosen), split, len(records(recipe, "calibration")) if bands else None)
    loaded = Run.open(folder, stages)
    check_layers(prices, len(loaded.model.sites), folder)
    batches = _batches(loaded, chosen)
    look = _look(loaded, batches, prices, split, stages)
    free = {layer: finding for layer, finding in look.skips.items() if layer not in look.held}
    conclusion = conclude(look.joint, free, look.tolerance, prices.alpha)
    return CheckResult(conclusion, look, split, _judge_bands(loaded, batches, stages) if bands else None)


def _batches(run: Run, chosen: list[Record]) -> list[Batch]:
    collate, size = Collator(run.processor), run.recipe.trainer.batch_size
    return [batch.to(run.model.spec.device) for batch in loader(chosen, collate, size)]


def _look(run: Run, batches: list[Batch], prices: Prices, split: str, stages: Stages) -> Look:
    """Measure every layer on these batches, and judge the layers and the routers' own skips."""
    model, section = run.model, run.recipe.conditions
    layers, count = len(model.spec.layers), sum(map(len, batches))
    with stages(f"measuring {layers} layers on {count} inputs of split {split}", count) as advance:
        measured = measure_skips(model, batches, attention=model.runtime.hides_vision, progress=advance)
    watcher = ConditionCheck(0, tolerance=section.nats, level=section.level, batches=batches, measured=measured)
    with stages("judging the routers' own skips"):
        return watcher.inspect(model, prices, run.recipe.trainer.steps)


def _judge_bands(run: Run, batches: list[Batch], stages: Stages) -> tuple[BandFinding, ...]:
    """Judge late entries and early exits on these batches, with constants of the calibration split."""
    model, recipe = run.model, run.recipe
    layers, attention = len(model.spec.layers), model.runtime.hides_vision
    spans = [*late_entries(layers), *early_exits(layers)]
    calibration = _batches(run, records(recipe, "calibration")[: fitted(recipe)])
    with stages(f"measuring {len(spans)} bands of layers on {sum(map(len, calibration))} calibration inputs"):
        fresh = measure_bands(model, calibration, spans, attention)
    with stages(f"measuring {len(spans)} bands of layers on the inputs judged"):
        measured = measure_bands(model, batches, spans, attention)
    prices = calibrate_prices(fresh, measured.mass.mean(0), recipe.objective.alpha)
    section = recipe.conditions
    return tuple(judge_bands(measured, spans, prices, recipe.router.group, section.nats, section.level))
