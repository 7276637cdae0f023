"""`adaskip check`: do the theory's conditions hold for what a run's routers decide on inputs they have not seen?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from adaskip.errors import CheckpointError
from adaskip.stages import SILENT, Stages
from adaskip.survey.skips import measure, measure_bands
from adaskip.theory.bands import early_exits, judge_bands, late_entries
from adaskip.theory.conditions import conclude
from adaskip.theory.prices import Prices, calibrate_prices
from adaskip.training.callbacks import ConditionCheck
from adaskip.training.data import Collator, loader
from adaskip.verbs.amounts import enough_to_check, fitted
from adaskip.verbs.run import Run, open_run, read_recipe, unfitted
from adaskip.verbs.train import records


def check(run: Path, bands: bool = False, stages: Stages = SILENT) -> dict[str, Any]:
    """Judge a finished run's conditions anew, on held-out inputs that nothing was fitted on.

    ``ok`` is whether they were shown to hold; see `adaskip.theory.conditions.conclude` for what that takes. A check
    that cannot decide has not shown it: ``ok`` is False then too, and ``verdict`` tells the two apart.

    Args:
        run: the run's folder.
        bands: also judge every late entry and early exit, against the same tolerance; they do not change ``ok``.
        stages: hears what is under way.

    Returns:
        ``ok``, ``verdict`` (hold, do not hold, undecided), ``reasons``, ``rows`` (findings with their verdicts),
        ``skips`` (the routers' real skips, layer by layer), ``summary`` (the joint figures beside the tolerance), and
        ``bands`` if asked for.

    Raises:
        CheckpointError: the folder is no finished run, or its prices are missing or damaged.
        DataError: too few inputs; said before anything is loaded.
    """
    recipe, folder = read_recipe(Path(run)), Path(run)
    prices = read_prices(folder / "prices.json")
    chosen, split = unfitted(recipe)
    enough_to_check(recipe, len(chosen), split, len(records(recipe, "calibration")) if bands else None)
    loaded = open_run(folder, stages)
    model, device = loaded.model, loaded.model.spec.device
    layers = len(model.spec.layers)
    if len(prices.shift) != layers:
        raise CheckpointError(
            f"{folder / 'prices.json'}: expected prices of {layers} layers, found {len(prices.shift)}; it belongs to "
            "another run"
        )
    batches = [b.to(device) for b in loader(chosen, Collator(loaded.processor), recipe.trainer.batch_size)]
    with stages(f"measuring {layers} layers on {len(chosen)} inputs of split {split}", len(chosen)) as advance:
        measured = measure(model, batches, attention=model.runtime.hides_vision, progress=advance)
    tolerance = recipe.conditions.nats
    watcher = ConditionCheck(0, tolerance=tolerance, level=recipe.conditions.level, batches=batches, measured=measured)
    with stages("judging the routers' own skips"):
        look = watcher.inspect(model, prices, recipe.trainer.steps)
    free = {layer: found for layer, found in look.skips.items() if layer not in look.held}
    conclusion = conclude(look.joint, free, tolerance, prices.alpha)
    judged = {"bands": _bands(loaded, batches, stages)} if bands else {}
    told = look.to_dict()
    summary = {
        "verdict": conclusion.verdict,
        "reasons": list(conclusion.reasons),
        "tolerance": tolerance,
        **look.joint.to_dict(),
        "layers": told["layers"],
        "split": split,
    }
    return {
        "ok": conclusion.verdict == "hold",
        "verdict": conclusion.verdict,
        "reasons": list(conclusion.reasons),
        "rows": [row.to_dict() for row in look.findings.rows],
        "skips": told["skips"],
        "summary": summary,
        **judged,
    }


def read_prices(path: Path) -> Prices:
    """The bound's constants that a run left behind.

    Raises:
        CheckpointError: there are none, or they are damaged.
    """
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        tensors = {k: torch.tensor(stored[k], dtype=torch.float64) for k in ("shift", "peak", "mass")}
        pairs = stored.get("correlation")
        correlation = None if pairs is None else torch.tensor(pairs, dtype=torch.float64)
        shape = tensors["shift"].shape
        if len(shape) != 1 or any(t.shape != shape or bool(t.isnan().any()) for t in tensors.values()):
            raise ValueError("shift, peak and mass: expected one number for every layer")
        alpha, c = float(stored["alpha"]), float(stored["c"])
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: missing, and the bound's constants are in it; train the run again") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: missing or damaged ({error}); train the run again") from error
    return Prices(**tensors, alpha=alpha, c=c, correlation=correlation)


def _bands(run: Run, batches: list[Any], stages: Stages) -> list[dict[str, Any]]:
    """Late entries and early exits, judged on these batches with constants of the calibration split."""
    model, recipe = run.model, run.recipe
    layers, attention = len(model.spec.layers), model.runtime.hides_vision
    spans = [*late_entries(layers), *early_exits(layers)]
    chosen = records(recipe, "calibration")[: fitted(recipe)]
    device, size = model.spec.device, recipe.trainer.batch_size
    calibration = [b.to(device) for b in loader(chosen, Collator(run.processor), size)]
    with stages(f"measuring {len(spans)} bands of layers on {len(chosen)} calibration inputs"):
        fresh = measure_bands(model, calibration, spans, attention)
    with stages(f"measuring {len(spans)} bands of layers on the inputs judged"):
        measured = measure_bands(model, batches, spans, attention)
    prices = calibrate_prices(fresh, measured.mass.mean(0), recipe.objective.alpha)
    section = recipe.conditions
    judged = judge_bands(measured, spans, prices, recipe.router.group, section.nats, section.level)
    return [found.to_dict(layers) for found in judged]
