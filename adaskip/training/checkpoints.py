"""Checkpoints of a run: one every few steps and the one before it, each whole or not there at all."""

from __future__ import annotations

import logging
import os
import pickle
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

CHECKPOINTS = "checkpoints"
KEPT = 2

_log = logging.getLogger(__name__)


class WholeFiles(TorchCheckpointIO):
    """Write a checkpoint beside its place and move it there when it is on the disk.

    Lightning's own writer goes through the system's temporary folder, which may lie on another disk: moving the file
    from there copies it, and a kill while it is copied leaves half a checkpoint under the right name.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write the whole file or nothing of it."""
        place = Path(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        part = place.with_name(place.name + ".part")
        with part.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(place)


class RoundsBySteps(lightning.Callback):
    """Number rounds of records and logged steps by the optimiser steps that are done.

    Lightning goes through the last finished epoch of a resumed run once more, without a batch, and counts that: its own
    numbers would leave out a round of records, and log every later step one too high.

    Args:
        loader: of the training records; its sampler, or its batch sampler, has ``set_epoch``.
        steps: steps of a round.
    """

    def __init__(self, loader: DataLoader[Any], steps: int) -> None:
        chooses: Any = loader.batch_sampler if hasattr(loader.batch_sampler, "set_epoch") else loader.sampler
        self.sampler, self.steps = chooses, steps

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Overrule the numbers that Lightning has just set; the loader is asked for its first batch after this."""
        self.sampler.set_epoch(trainer.global_step // self.steps)
        trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step


def checkpoint_callback(folder: Path) -> ModelCheckpoint:
    """Save after every epoch, which is as many steps as lie between two checkpoints; keep the newest two.

    ``save_last`` alone would write nothing before training ends: Lightning copies what a top-k rule has saved. The rule
    here is the step itself, so the newest are the best.
    """
    return ModelCheckpoint(
        folder / CHECKPOINTS,
        filename="{step:08d}",
        auto_insert_metric_name=False,
        monitor="step",
        mode="max",
        save_top_k=KEPT,
        every_n_epochs=1,
        save_on_train_epoch_end=True,
    )


def checkpoints(folder: Path) -> list[Path]:
    """A run's checkpoints, newest first."""
    return sorted((folder / CHECKPOINTS).glob("*.ckpt"), reverse=True)


def newest_checkpoint(folder: Path) -> tuple[Path | None, int]:
    """The newest checkpoint that can be read, and its step; ``(None, 0)`` where there is none.

    One that cannot be read (a disk that was full, a file that was copied in part) is named in the log and passed over
    for the one before it.
    """
    for path in checkpoints(folder):
        try:
            return path, int(torch.load(path, map_location="cpu", weights_only=True)["global_step"])
        except (RuntimeError, OSError, EOFError, KeyError, ValueError, pickle.UnpicklingError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            _log.warning("%s: damaged (%s); going on from the checkpoint before it", path, reason)
    return None, 0
