"""One recipe, end to end: load, measure, train, hold the budget, check, save, report."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import Logger
from torch.utils.data import DataLoader

from adaskip import report
from adaskip.errors import CheckpointError, ConfigError
from adaskip.recipe import Recipe, dump, load
from adaskip.runtime import persist
from adaskip.runtime.attach import RoutedModel, attach
from adaskip.runtime.persist import load_backbone
from adaskip.theory.prices import price
from adaskip.theory.profile import LayerMeasures, Prices, exact_match, measure
from adaskip.training.callbacks import ConditionCheck, Look, to_device
from adaskip.training.data import Batch, Collator, Record, RoundSampler, load_records, loader
from adaskip.training.fit_run import fit_in_folder
from adaskip.training.module import RouterTuner
from adaskip.training.tracking import (
    CONDITIONS,
    KEEP_RATES,
    Board,
    Laps,
    MetricsFile,
    environment,
    truncate_lines,
    wandb_logger,
    write_text,
)

RECIPE, LAST = "recipe.resolved.yaml", "checkpoints/last.ckpt"


def load_processor(recipe: Recipe) -> Any:
    """The backbone's processor, or its tokenizer where it has no pictures."""
    section = recipe.backbone
    return persist.load_processor(section.path, trust_remote_code=section.trust_remote_code, revision=section.revision)


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


def train(recipe: Recipe, resume: bool = False) -> dict[str, Any]:
    """Train the routers of a recipe and leave a complete run folder.

    Args:
        recipe: what `adaskip.recipe.load` returned.
        resume: go on from the run folder's last checkpoint; the result equals that of an uninterrupted run.

    Returns:
        The summary that also stands in ``summary.json``.

    Raises:
        AdaSkipError: the recipe, the data, the backbone or the run folder does not fit; nothing is overwritten.
    """
    laps = Laps()
    folder = Path(recipe.output)
    checkpoint = _prepare(recipe, folder, resume)
    lightning.seed_everything(recipe.seed, verbose=False)
    collate = Collator(load_processor(recipe))
    splits = {split: records(recipe, split) for split in ("train", "validation", "calibration")}
    model = attach(load_backbone(recipe.backbone.path, **backbone_options(recipe)), recipe.router, seed=recipe.seed)

    size, looked_at = recipe.trainer.batch_size, recipe.conditions.examples
    check = [*loader(splits["validation"][:looked_at], collate, size)]
    measured, prices = _price(model, check, [*loader(splits["calibration"][: 2 * looked_at], collate, size)], recipe)
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
        batches=[to_device(batch, model.described.device) for batch in check],
        measured=measured,
        folder=folder,
    )
    step = torch.load(checkpoint, weights_only=True)["global_step"] if checkpoint else 0
    truncate_lines(folder / CONDITIONS, step)
    trainer = _trainer(recipe, folder, step, conditions)
    per_round = recipe.trainer.checkpoint_every * size
    batches: DataLoader[Any] = DataLoader(
        splits["train"],  # type: ignore[arg-type]
        size,
        sampler=RoundSampler(len(splits["train"]), per_round, recipe.seed),
        collate_fn=collate,
        num_workers=recipe.trainer.workers,
    )
    validation = loader(splits["validation"], collate, size)
    laps.lap("price")
    if recipe.method == "from-bounds" and checkpoint is None:
        say = (lambda text: print(text, file=sys.stderr)) if recipe.trainer.progress else None
        inputs = splits["train"]
        state, rounds = fit_in_folder(model, recipe.objective, recipe.fit, inputs, collate, folder, recipe.seed, say)
        tuner.multiplier.fill_(state.multiplier)
        for logger in trainer.loggers:
            logger.log_metrics({f"fit/{name}": value for name, value in rounds[-1].items()}, step=0)
        laps.lap("fit")
    if recipe.trainer.steps:
        trainer.fit(tuner, batches, validation, ckpt_path=checkpoint, weights_only=True if checkpoint else None)
        laps.lap("train")
    if conditions.stopped:
        return {"ok": False, "folder": str(folder), "steps": trainer.global_step, "stopped": conditions.stopped}
    if trainer.interrupted or trainer.global_step < recipe.trainer.steps:
        raise CheckpointError(
            f"{folder}: training stopped at step {trainer.global_step} of {recipe.trainer.steps}; "
            f"go on with: adaskip train {folder / RECIPE} --resume"
        )
    return _finish(recipe, folder, trainer, tuner, conditions, validation, laps)


def _prepare(recipe: Recipe, folder: Path, resume: bool) -> Path | None:
    """Make the run folder, or check that it can be resumed; returns the checkpoint to go on from."""
    resolved = folder / RECIPE
    if resume:
        if not resolved.is_file():
            raise CheckpointError(f"{folder}: no run to resume here; start one without --resume")
        before = load(resolved)
        differing = [
            key for key, value in recipe.model_dump().items() if key != "name" and value != before.model_dump()[key]
        ]
        if differing:
            raise ConfigError(
                f"{resolved}: the run was started with another {' and '.join(differing)}; "
                f"resume it with: adaskip train {resolved} --resume"
            )
        return folder / LAST if (folder / LAST).is_file() else None
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(
            f"{folder}: already holds a run; go on with --resume, or choose another folder: output={folder}-2"
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_text(resolved, dump(recipe))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    write_text(folder / "env.json", json.dumps(environment(recipe.seed, device), indent=2) + "\n")
    return None


def _price(
    model: RoutedModel, check: list[Batch], calibration: list[Batch], recipe: Recipe
) -> tuple[LayerMeasures, Prices]:
    """Measure what each layer is worth on validation inputs; calibrate the bound's constants on others."""
    if torch.cuda.is_available() and not recipe.backbone.device_map:
        model.cuda()
    device = model.described.device
    vision = model.runtime.hides_vision
    measured = measure(model, [to_device(b, device) for b in check], attention=vision)
    return measured, price(
        model,
        [to_device(b, device) for b in calibration],
        measured.mass.mean(0),
        recipe.objective.alpha,
        recipe.objective.price,
        recipe.seed,
    )


def _trainer(recipe: Recipe, folder: Path, step: int, conditions: ConditionCheck) -> lightning.Trainer:
    section, tracking = recipe.trainer, recipe.tracking
    loggers: list[Logger] = [MetricsFile(folder, step)]
    if tracking.wandb != "disabled":
        loggers.append(
            wandb_logger(folder, tracking.wandb, tracking.project, tracking.name, tracking.tags, recipe.model_dump())
        )
    saver = ModelCheckpoint(
        folder / "checkpoints", save_last=True, save_top_k=0, every_n_epochs=1, save_on_train_epoch_end=True
    )
    callbacks: list[Callback] = [conditions, saver]
    callbacks += [RichProgressBar(leave=True)] if section.progress else []
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for noise in (".*many workers.*", ".*LeafSpec.*", ".*eval mode at the start of training.*"):
        warnings.filterwarnings("ignore", noise)
    return lightning.Trainer(
        accelerator=section.accelerator,
        devices=section.devices,
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
        enable_progress_bar=section.progress,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
    )


@torch.no_grad()
def quality(model: RoutedModel, batches: list[Batch]) -> tuple[float, float]:
    """Mean keep rate and teacher-forced exact-match accuracy of the routed model."""
    keep, right = [], []
    for batch in batches:
        logits = model(**batch["inputs"], prompt_mask=batch["prompt_mask"], use_cache=False).logits
        keep.append(model.routing.keep_rate)
        right.append(exact_match(logits, batch["labels"]))
    return float(torch.cat(keep).mean()), float(torch.cat(right).float().mean())


def hold_budget(model: RoutedModel, batches: list[Batch], keep: float, steps: int = 10) -> float:
    """Set the routers' threshold so that their mean keep rate on these inputs is just below ``keep``.

    Training leaves the hard decisions near the target, not on it; one number, found on validation data by bisection of
    the logits' range, closes the gap. Returns the threshold.
    """
    low, high = model.config.threshold - 16.0, model.config.threshold + 16.0
    for _ in range(steps):
        middle = (low + high) / 2
        model.set_threshold(middle)
        if quality(model, batches)[0] <= keep:
            high = middle
        else:
            low = middle
    model.set_threshold(high)
    return high


def _finish(
    recipe: Recipe,
    folder: Path,
    trainer: lightning.Trainer,
    tuner: RouterTuner,
    conditions: ConditionCheck,
    validation: DataLoader[Any],
    laps: Laps,
) -> dict[str, Any]:
    model = tuner.model.eval()
    device = model.described.device
    held = [to_device(batch, device) for batch in validation]
    threshold = hold_budget(model, held, recipe.objective.keep)
    laps.lap("threshold")
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
        "folder": str(folder),
        "steps": trainer.global_step,
        "seconds": round(sum(part["seconds"] for part in laps.parts.values()), 1),
        "parts": laps.parts,
        "threshold": threshold,
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
        board.keep_rates(rates, report.keep_heat_map(rates))
        board.router(folder / "router", model.facts)
        board.finish()
        report.write(folder)
    return summary


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, torch.Tensor) else value
