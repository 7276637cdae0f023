"""`adaskip heal`: adapters for a finished run, which mend what its skips break; the dense model stays as it is."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning
import torch
from filelock import FileLock, Timeout

from adaskip.batch import Batch
from adaskip.errors import CheckpointError, ConfigError
from adaskip.runfiles import HEALING, LOCK, ROUTER, write_json
from adaskip.runtime.adapters import adapt
from adaskip.runtime.lora import Lora
from adaskip.stages import SILENT, Stages
from adaskip.survey.gauging import gauge_routing
from adaskip.theory.intervals import paired_difference
from adaskip.training.checkpoints import (
    RoundsBySteps,
    WholeFiles,
    checkpoint_callback,
    checkpoints,
    keep_newest,
    newest_checkpoint,
)
from adaskip.training.data import Collator, loader, training_loader
from adaskip.training.digest import digest
from adaskip.training.healing import AdapterTuner
from adaskip.training.objective import is_count
from adaskip.training.steps import StepCount
from adaskip.training.tracking import MetricsFile
from adaskip.verbs.amounts import fitted
from adaskip.verbs.run import Run, check_writable, policy_mark, read_recipe, router_folder
from adaskip.verbs.splits import records
from adaskip.verbs.teacher import Forced, join, read_answers

_SETTINGS, _RESULT, _BEFORE = "settings.json", "healing.json", "router"
"""Files of the folder ``RUN/healing``: what was asked for, what came of it, and the routers as they were."""


@dataclass(frozen=True)
class HealResult:
    """Hold a healed run: its routers carry the adapters now."""

    folder: Path
    steps: int
    parameters: int  # of the adapters
    before: dict[str, float]  # keep, kl (nats per predicted token), token_agreement, perplexity on validation inputs
    after: dict[str, float]
    saved: dict[str, float]  # nats per predicted token that healing saves: estimate, low, high (95 %), n

    @property
    def ok(self) -> bool:
        """Return whether the routed model is nearer to the dense one than before."""
        return self.after["kl"] < self.before["kl"]

    def to_dict(self) -> dict[str, Any]:
        """Return what ``--json`` prints."""
        return {"ok": self.ok, **asdict(self), "folder": str(self.folder)}


def heal(
    run: str | Path,
    *,
    lora: Lora | None = None,
    steps: int = 160,
    batch_size: int = 8,
    learning_rate: float = 1e-3,
    task_weight: float = 0.0,
    seed: int = 0,
    checkpoint_every: int = 40,
    stages: Stages = SILENT,
) -> HealResult:
    """Train adapters on the path that a finished run's policy takes, so that it answers more like the dense model.

    The policy stays as it is, and dense passes stay bitwise those of the original model. The adapters are saved with
    the policy in ``RUN/router``; the routers as they were lie in ``RUN/healing/router``. A healing that was stopped
    goes on from its last checkpoint when it is asked for again. A certificate of `adaskip calibrate` is void; the gauge
    is calibrated anew.

    Args:
        run: the run's folder.
        lora: what adapters are made of; None: ``Lora()``.
        steps: optimiser steps.
        batch_size: examples a step.
        learning_rate: peak of a one-cycle schedule.
        task_weight: weight of the cross-entropy with the data's own answers, beside the KL to the dense model.
        seed: of the adapters' initial weights and of the order of the data.
        checkpoint_every: steps.
        stages: hears what is under way.

    Raises:
        ConfigError: a setting outside its range, other settings than those that the folder was begun with, a run that
            is healed already, or another process at work in the folder.
        CheckpointError: the folder is no finished run, or cannot be written to.

    Example:
        ``adaskip.heal("runs/smollm2", steps=160).after["kl"]``
    """
    folder, lora = Path(run), Lora() if lora is None else lora
    counts = {"steps": steps, "batch_size": batch_size, "checkpoint_every": checkpoint_every}
    if wrong := [
        f"{name}: expected an integer >= 1, got {value!r}" for name, value in counts.items() if not is_count(value)
    ]:
        raise ConfigError("heal: " + "; ".join(wrong))
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ConfigError(f"heal: seed: expected an integer from 0 to {2**32 - 1}, got {seed!r}")
    recipe, place = read_recipe(folder), folder / HEALING
    check_writable(folder, "the adapters")
    place.mkdir(exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ConfigError(f"{folder}: another process is at work in this folder; wait for it") from None
    try:
        loaded = Run.open(folder, stages)
        model, size = loaded.model, recipe.trainer.batch_size
        if model.adapters is not None:
            raise ConfigError(
                f"{folder}: healed already; to heal it anew, put {place / _BEFORE} in the place of {folder / ROUTER}, "
                f"and remove {place}"
            )
        collate = Collator(loaded.processor)
        train, validation = records(recipe, "train"), records(recipe, "validation")
        settings = {
            "lora": lora.to_dict(),
            **counts,
            "learning_rate": learning_rate,
            "task_weight": task_weight,
            "seed": seed,
            "policy": policy_mark(router_folder(folder)),
            "data": digest(train),
        }
        _check_settings(place, settings)
        batches = training_loader(train, collate, batch_size, checkpoint_every * batch_size, seed)
        judged = [batch.to(model.spec.device) for batch in loader(validation, collate, min(size, 16))]
        with stages(f"judging the policy on {len(validation)} validation inputs"):
            before, unhealed = _measure(loaded, judged)
        adapters = adapt(model, lora, seed)
        tuner = AdapterTuner(model, learning_rate=learning_rate, steps=steps, task_weight=task_weight, seed=seed)
        _train(tuner, batches, place, steps, checkpoint_every, stages)
        with stages(f"judging the healed policy on {len(validation)} validation inputs"):
            after, healed = _measure(loaded, judged)
        count = sum(weight.numel() for weight in adapters.parameters())
        gap = paired_difference(unhealed.kl, healed.kl)
        saved = {"estimate": gap.estimate, "low": gap.low, "high": gap.high, "n": gap.n}
        result = HealResult(folder, steps, count, before, after, saved)
        calibration = [*loader(records(recipe, "calibration")[: fitted(recipe)], collate, min(size, 16))]
        with stages("calibrating the gauge anew"):
            inputs = [batch.to(model.spec.device) for batch in calibration]
            model.gauge = gauge_routing(model, inputs, recipe.objective.alpha)
        _store(loaded, result, place)
        return result
    finally:
        (folder / LOCK).unlink(missing_ok=True)
        lock.release()


def _check_settings(place: Path, settings: dict[str, Any]) -> None:
    """Note what is asked for, and refuse to go on from a checkpoint of other settings; a failed start left none."""
    path = place / _SETTINGS
    if not path.is_file() or not checkpoints(place):
        write_json(path, settings, indent=2)
        return
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: damaged ({error}); remove {place} to begin anew") from None
    if changed := sorted(name for name in settings if stored.get(name) != settings[name]):
        differences = ", ".join(f"{name} ({stored.get(name)!r}, now {settings[name]!r})" for name in changed)
        raise ConfigError(f"{place}: begun with another {differences}; ask for the same, or remove it to begin anew")


def _measure(run: Run, batches: list[Batch]) -> tuple[dict[str, float], Forced]:
    """Return the routed model's figures on batches, and what it gives each input."""
    parts, keep = [], []
    for batch in batches:
        parts.append(read_answers(run.model, [batch], None)["routed"])
        keep.append(run.model.routing.keep_rate)  # of the routed pass, the last one
    forced = join(parts)
    figures = forced.figures()
    figures.pop("log_likelihood")
    return {"keep": float(torch.cat(keep).mean()), **figures}, forced


def _train(tuner: AdapterTuner, batches: Any, place: Path, steps: int, every: int, stages: Stages) -> None:
    """Train from the newest checkpoint, or from the start.

    Raises:
        KeyboardInterrupt: with what to type to go on.
    """
    checkpoint, done = newest_checkpoint(place)
    keep_newest(place, checkpoint)
    if done:
        stages.note(f"{place}: going on from step {done}")
    with stages(f"healing for {steps} steps", steps) as advance:
        trainer = lightning.Trainer(
            max_steps=steps,
            max_epochs=-1,
            logger=[MetricsFile(place, done)],
            log_every_n_steps=10,
            callbacks=[RoundsBySteps(batches, every, done), checkpoint_callback(place), StepCount(advance)],
            plugins=[WholeFiles()],
            gradient_clip_val=1.0,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            devices=1,
            default_root_dir=place,
        )
        try:
            trainer.fit(tuner, batches, ckpt_path=checkpoint, weights_only=True if checkpoint else None)
        except SystemExit as stop:
            if not trainer.interrupted:
                raise
            raise KeyboardInterrupt(
                f"interrupted at step {trainer.global_step} of {steps}; go on with the same command"
            ) from stop
    if trainer.interrupted or trainer.global_step < steps:
        raise CheckpointError(
            f"{place}: healing stopped at step {trainer.global_step} of {steps}; go on with the same command"
        )
    tuner.eval()


@torch.no_grad()
def _store(run: Run, result: HealResult, place: Path) -> None:
    """Save the policy with its adapters; keep the routers as they were beside it."""
    router = run.folder / ROUTER
    if not (place / _BEFORE).exists():
        shutil.copytree(router, place / f"{_BEFORE}.new", dirs_exist_ok=True)
        (place / f"{_BEFORE}.new").replace(place / _BEFORE)
    run.model.facts |= {
        "validation_keep": round(result.after["keep"], 4),
        "validation_kl": round(result.after["kl"], 4),
        "healed_steps": result.steps,
    }
    run.model.save_pretrained(router)
    write_json(place / _RESULT, result.to_dict(), indent=2)
