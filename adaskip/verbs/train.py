"""One recipe, end to end: load, measure, train, hold the budget, check, save, report."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.callbacks import Callback, RichProgressBar
from lightning.pytorch.loggers import Logger
from torch.utils.data import DataLoader

from adaskip import report
from adaskip.backbone import load
from adaskip.backbone.load import load_backbone
from adaskip.batch import Batch, count
from adaskip.errors import CheckpointError
from adaskip.ranks import is_first_process, is_lost_process, launched, says_when_lost
from adaskip.recipe import RESOLVED, Recipe
from adaskip.runtime.attach import RoutedModel, attach
from adaskip.stages import SILENT, Stages
from adaskip.survey.calibration import price
from adaskip.survey.skips import measure
from adaskip.theory.prices import Prices
from adaskip.theory.tables import LayerMeasures
from adaskip.training.callbacks import ConditionCheck
from adaskip.training.checkpoints import RoundsBySteps, WholeFiles, checkpoint_callback
from adaskip.training.data import Collator, Record, load_records, loader, training_loader
from adaskip.training.fit_run import fit_in_folder
from adaskip.training.looks import Look
from adaskip.training.module import RouterTuner
from adaskip.training.steps import StepCount
from adaskip.training.tracking import (
    CONDITIONS,
    KEEP_RATES,
    Board,
    Laps,
    MetricsFile,
    truncate_lines,
    wandb_logger,
    write_text,
)
from adaskip.verbs.amounts import enough_to_train
from adaskip.verbs.budget import hold_budget, lightest
from adaskip.verbs.start import check_start, opened

RECIPE = RESOLVED


def load_processor(recipe: Recipe) -> Any:
    """The backbone's processor, or its tokenizer where it has no pictures."""
    section = recipe.backbone
    return load.load_processor(section.path, trust_remote_code=section.trust_remote_code, revision=section.revision)


def backbone_options(recipe: Recipe) -> dict[str, Any]:
    """The recipe's backbone section as arguments of ``from_pretrained``."""
    section = recipe.backbone
    options: dict[str, Any] = {"dtype": section.dtype, "attn_implementation": section.attention}
    options |= {"device_map": section.device_map} if section.device_map else {}
    options |= {"trust_remote_code": True} if section.trust_remote_code else {}
    return options | ({"revision": section.revision} if section.revision else {})


def records(recipe: Recipe, split: str) -> list[Record]:
    """One split of the recipe's data."""
    section = recipe.data
    columns = section.columns.model_dump()
    return load_records(section.source, split, getattr(section.examples, split), recipe.seed, columns)


def train(recipe: Recipe, resume: bool = False, stages: Stages = SILENT) -> dict[str, Any]:
    """Train the routers of a recipe and leave a complete run folder.

    Args:
        recipe: what `adaskip.recipe.load` returned.
        resume: go on from the run folder's last checkpoint; the result equals that of an uninterrupted run.
        stages: hears what is under way.

    Returns:
        The summary that also stands in ``summary.json``. ``ok`` is False where the compute budget was missed, or where
        training stopped at violated conditions.

    Raises:
        AdaSkipError: the recipe, the data, the backbone or the run folder does not fit; nothing is overwritten.
    """
    laps = Laps()
    folder = Path(recipe.output)
    check_start(recipe, folder, resume)
    lightning.seed_everything(recipe.seed, verbose=False)
    collate = Collator(load_processor(recipe))
    splits = {split: records(recipe, split) for split in ("train", "validation", "calibration")}
    for chosen in splits.values():  # before the model is loaded and measured, which may take minutes
        collate.check(chosen)
    enough_to_train(recipe, len(splits["validation"]), len(splits["calibration"]))
    with stages(f"loading {recipe.backbone.path}"):
        model = attach(load_backbone(recipe.backbone.path, **backbone_options(recipe)), recipe.router, seed=recipe.seed)
    with opened(recipe, folder, resume) as (checkpoint, step):
        if resume:
            stages.note(f"{folder}: going on from step {step}")
        lost = (
            f"{folder}: another process of this run has ended, see what it says above; "
            f"go on with: adaskip train {folder / RESOLVED} --resume"
        )
        try:
            with says_when_lost(lost):
                return _train(recipe, folder, model, collate, splits, checkpoint, step, laps, stages)
        except RuntimeError as error:
            if not is_lost_process(error):
                raise
            raise CheckpointError(lost) from error


def _train(
    recipe: Recipe,
    folder: Path,
    model: RoutedModel,
    collate: Collator,
    splits: dict[str, list[Record]],
    checkpoint: Path | None,
    step: int,
    laps: Laps,
    stages: Stages,
) -> dict[str, Any]:
    """Price, fit, train and finish in a folder that is this run's alone."""
    size, looked_at = recipe.trainer.batch_size, recipe.conditions.examples
    check = [*loader(splits["validation"][:looked_at], collate, size)]
    calibration = [*loader(splits["calibration"][: 2 * looked_at], collate, size)]
    measured, prices = _price(model, check, calibration, recipe, stages)
    tuner = RouterTuner(
        model,
        recipe.objective,
        prices,
        learning_rate=recipe.trainer.learning_rate,
        steps=recipe.trainer.steps or None,  # 0: nothing is tuned after a fit from bounds
        temperature=recipe.trainer.temperature,
        kinds=sorted({str(r["kind"]) for r in splits["validation"] if r.get("kind") not in (None, "")}),
        seed=recipe.seed,
    )
    conditions = ConditionCheck(
        recipe.conditions.every,
        tolerance=recipe.conditions.nats,
        level=recipe.conditions.level,
        on_violation=recipe.conditions.on_violation,
        batches=[batch.to(model.spec.device) for batch in check],
        measured=measured,
        folder=folder,
    )
    if is_first_process():
        truncate_lines(folder / CONDITIONS, step)
    every = recipe.trainer.checkpoint_every
    batches = training_loader(splits["train"], collate, size, every * size, recipe.seed, recipe.trainer.workers)
    trainer = _trainer(recipe, folder, step, [conditions, RoundsBySteps(batches, every, step)])
    validation = loader(splits["validation"], collate, size)
    laps.lap("price")
    if recipe.method == "from-bounds" and checkpoint is None:
        inputs, goal = splits["train"], recipe.objective
        with stages(f"fitting the routers from bounds, {recipe.fit.rounds} rounds"):
            state, rounds = fit_in_folder(model, goal, recipe.fit, inputs, collate, folder, recipe.seed, stages.note)
        tuner.multiplier.fill_(state.multiplier)
        for logger in trainer.loggers:
            logger.log_metrics({f"fit/{name}": value for name, value in rounds[-1].items()}, step=0)
        laps.lap("fit")
    if recipe.trainer.steps:
        with stages(f"training for {recipe.trainer.steps} steps", recipe.trainer.steps) as advance:
            if not any(isinstance(callback, RichProgressBar) for callback in trainer.callbacks):  # type: ignore[attr-defined]
                trainer.callbacks.append(StepCount(advance))  # type: ignore[attr-defined]
            _fit(trainer, tuner, batches, validation, checkpoint)
        laps.lap("train")
    if conditions.stopped:
        return {"ok": False, "folder": str(folder), "steps": trainer.global_step, "stopped": conditions.stopped}
    if trainer.interrupted or trainer.global_step < recipe.trainer.steps:
        raise CheckpointError(
            f"{folder}: training stopped at step {trainer.global_step} of {recipe.trainer.steps}; "
            f"go on with: adaskip train {folder / RECIPE} --resume"
        )
    return _finish(recipe, folder, trainer, tuner, conditions, validation, laps, stages)


def _fit(
    trainer: lightning.Trainer, tuner: RouterTuner, batches: Any, validation: Any, checkpoint: Path | None
) -> None:
    """Train; Ctrl-C stays one, where Lightning would make an ordinary exit of it.

    Raises:
        KeyboardInterrupt: with what to type to go on.
    """
    try:
        trainer.fit(tuner, batches, validation, ckpt_path=checkpoint, weights_only=True if checkpoint else None)
    except SystemExit as stop:
        if not trainer.interrupted:
            raise
        resolved = Path(trainer.default_root_dir) / RECIPE
        raise KeyboardInterrupt(
            f"interrupted at step {trainer.global_step} of {trainer.max_steps}; go on with: adaskip train {resolved} "
            "--resume"
        ) from stop


def _price(
    model: RoutedModel, check: list[Batch], calibration: list[Batch], recipe: Recipe, stages: Stages
) -> tuple[LayerMeasures, Prices]:
    """Measure what each layer is worth on validation inputs; calibrate the bound's constants on others."""
    if (own := own_device(recipe)) is not None:
        model.to(own)
    device = model.spec.device
    vision, layers = model.runtime.hides_vision, len(model.spec.layers)
    check = [b.to(device) for b in check]
    if not (least := lightest(model, check, recipe.objective.keep)).met:
        stages.note(f"{least.sentence}; training goes on all the same")
    validated = count(check)
    with stages(f"measuring {layers} layers on {validated} validation inputs", validated) as advance:
        measured = measure(model, check, attention=vision, progress=advance)
    with stages(f"pricing {layers} layers on {count(calibration)} calibration inputs"):
        return measured, price(
            model,
            [b.to(device) for b in calibration],
            measured.mass.mean(0),
            recipe.objective.alpha,
            recipe.objective.price,
            recipe.seed,
        )


def _trainer(recipe: Recipe, folder: Path, step: int, own: list[Callback]) -> lightning.Trainer:
    section, tracking = recipe.trainer, recipe.tracking
    loggers: list[Logger] = [MetricsFile(folder, step)]
    if tracking.wandb != "disabled":
        loggers.append(
            wandb_logger(folder, tracking.wandb, tracking.project, tracking.name, tracking.tags, recipe.model_dump())
        )
    callbacks = [*own, checkpoint_callback(folder)]
    # a bar that is not drawn would be silence: where there is no terminal, lines say how far training is
    bar = section.progress and sys.stdout.isatty()
    callbacks += [RichProgressBar(leave=True)] if bar else []
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for noise in (".*many workers.*", ".*LeafSpec.*", ".*eval mode at the start of training.*"):
        warnings.filterwarnings("ignore", noise)
    local, machines = launched()
    return lightning.Trainer(
        accelerator=section.accelerator,
        devices=local if local > 1 and section.devices == "auto" else section.devices,
        num_nodes=machines,
        strategy=section.strategy,
        precision=section.precision,  # type: ignore[arg-type]
        max_steps=section.steps,
        max_epochs=-1,
        val_check_interval=section.validate_every,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        gradient_clip_val=section.gradient_clip or None,
        log_every_n_steps=10,
        logger=loggers,
        callbacks=callbacks,
        plugins=[WholeFiles(), *_cluster()],
        enable_progress_bar=bar,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
    )


def _cluster() -> list[SLURMEnvironment]:
    """SLURM without Lightning's own way to requeue: it writes a checkpoint in mid-round that a resume would prefer."""
    if TorchElasticEnvironment.detect() or not SLURMEnvironment.detect():
        return []
    return [SLURMEnvironment(auto_requeue=False)]


def own_device(recipe: Recipe) -> torch.device | None:
    """The GPU that Lightning will train this process on, so that pricing runs there too; None: the model stays."""
    section = recipe.trainer
    if (
        recipe.backbone.device_map
        or section.accelerator not in ("auto", "gpu", "cuda")
        or not torch.cuda.is_available()
    ):
        return None
    local = int(os.environ.get("LOCAL_RANK", 0))
    return torch.device("cuda", section.devices[local] if isinstance(section.devices, list) else local)


def _finish(
    recipe: Recipe,
    folder: Path,
    trainer: lightning.Trainer,
    tuner: RouterTuner,
    conditions: ConditionCheck,
    validation: DataLoader[Any],
    laps: Laps,
    stages: Stages,
) -> dict[str, Any]:
    model = tuner.model.eval()
    device = model.spec.device
    held = [batch.to(device) for batch in validation]
    with stages(f"finding the threshold for objective.keep={recipe.objective.keep:g}") as advance:
        budget = hold_budget(model, held, recipe.objective.keep, advance)
    stages.note(budget.sentence)
    laps.lap("threshold")
    with stages("validating, and checking the conditions"):
        found = trainer.validate(tuner, validation, verbose=False)[0]
        assert tuner.prices is not None
        look: Look = conditions.inspect(model, tuner.prices, trainer.global_step)
    rates = {kind: row.tolist() for kind, row in tuner.keep_by_kind.compute().items()}
    joint = look.joint.to_dict()
    laps.lap("check")
    model.facts = {
        "target_keep": recipe.objective.keep,
        "validation_keep": round(found["val/keep"], 4),
        "validation_accuracy": round(found["val/accuracy"], 4),
        "validation_kl_nats": round(found["val/kl"], 5),
        "bound_kappa": joint["kappa"],
        "bound_coverage": joint["coverage"],
    }
    summary = {
        "ok": budget.met,
        "folder": str(folder),
        "steps": trainer.global_step,
        "seconds": round(sum(part["seconds"] for part in laps.parts.values()), 1),
        "parts": laps.parts,
        "threshold": budget.threshold,
        **budget.to_dict(),
        "val": {name: found[f"val/{name}"] for name in ("accuracy", "kl", "keep")},
        "conditions": {
            "layers": look.to_dict()["layers"],
            "joint": joint,
            "violations": sorted(look.violations),
            "held": list(look.held),
        },
    }
    if trainer.is_global_zero:
        model.save_pretrained(folder / "router")
        write_text(folder / KEEP_RATES, json.dumps(rates) + "\n")
        write_text(folder / "prices.json", json.dumps({k: _plain(v) for k, v in asdict(tuner.prices).items()}) + "\n")
        with (folder / CONDITIONS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(look.to_dict() | {"final": True}) + "\n")
        write_text(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
        board = Board(trainer.loggers)
        board.conditions(look.to_dict())
        if rates:  # the data may name no kinds
            board.keep_rates(rates, report.keep_heat_map(rates))
        board.router(folder / "router", model.facts)
        board.finish()
        report.write(folder)
    return summary


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, torch.Tensor) else value
