"""Make the Lightning trainer of a recipe: its loggers, callbacks, devices and checkpoints."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import lightning
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.callbacks import Callback, RichProgressBar
from lightning.pytorch.loggers import Logger

from adaskip.errors import ConfigError
from adaskip.ranks import launched
from adaskip.recipe import Recipe
from adaskip.runtime.attach import RoutedModel
from adaskip.training.checkpoints import WholeFiles, checkpoint_callback
from adaskip.training.sharding import ShardedBackbone
from adaskip.training.tracking import MetricsFile, wandb_logger, wandb_mode


def make_trainer(recipe: Recipe, folder: Path, step: int, own: list[Callback], bar: bool = False) -> lightning.Trainer:
    """Make the trainer of a run that has done so many steps, with these callbacks and those of every run.

    ``bar``: Lightning draws one on a terminal, where the recipe asks for it; for those who hear no stages.
    """
    section, tracking = recipe.trainer, recipe.tracking
    loggers: list[Logger] = [MetricsFile(folder, step)]
    if (mode := wandb_mode(tracking.wandb)) != "disabled":
        loggers.append(wandb_logger(folder, mode, tracking.project, tracking.name, tracking.tags, recipe.model_dump()))
    callbacks = [*own, checkpoint_callback(folder)]
    bar = bar and section.progress and sys.stdout.isatty()
    callbacks += [RichProgressBar(leave=True)] if bar else []
    local, machines = launched()
    return lightning.Trainer(
        accelerator=section.accelerator,
        devices=local if local > 1 and section.devices == "auto" else section.devices,
        num_nodes=machines,
        strategy=ShardedBackbone() if section.strategy == "fsdp2" else section.strategy,
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
    """Take SLURM without Lightning's own way to requeue.

    At SLURM's signal it writes a checkpoint in mid-round, which a resume would prefer to the run's own.
    """
    if TorchElasticEnvironment.detect() or not SLURMEnvironment.detect():
        return []
    return [SLURMEnvironment(auto_requeue=False)]


def checkpoint_layers(model: RoutedModel) -> None:
    """Have the layers of a model run again in the backward pass.

    Raises:
        ConfigError: its architecture does not offer that.
    """
    if not model.backbone.supports_gradient_checkpointing:
        raise ConfigError(
            f"trainer.gradient_checkpointing: expected an architecture that offers it, got "
            f"{type(model.backbone).__name__}; leave it out, or take objective.gradient=flips, which keeps no results"
        )
    model.backbone.gradient_checkpointing_enable({"use_reentrant": False})


def own_device(recipe: Recipe) -> torch.device | None:
    """Find the GPU that Lightning will train this process on, so that pricing runs there too; None: the model stays."""
    section = recipe.trainer
    loaded = recipe.backbone.device_map or recipe.backbone.quantise  # onto where it stays
    placed = bool(loaded) or section.accelerator not in ("auto", "gpu", "cuda")
    if placed or not torch.cuda.is_available():
        return None
    local = int(os.environ.get("LOCAL_RANK", 0))
    return torch.device("cuda", section.devices[local] if isinstance(section.devices, list) else local)
