"""Checkpoints of a run: one every few steps and the one before it, each whole or not there at all."""

from __future__ import annotations

import io
import logging
import pickle
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from adaskip.errors import CheckpointError
from adaskip.runfiles import CHECKPOINTS, write

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
        content = io.BytesIO()  # routers and their optimiser are small; and torch cannot tell of a disk that is full
        torch.save(checkpoint, content)
        write(place, content.getvalue())


class RoundsBySteps(lightning.Callback):
    """Begin every round of records at the number of optimiser steps that are done, also after a resume.

    Lightning takes the epoch of a resumed run for unfinished: it goes through that epoch again, with one batch or with
    none, depending on when validation falls, and counts it. Rounds, logged steps and checkpoints would shift by one
    with every resume. A checkpoint of ours always stands at the end of a round, so its epoch is marked as finished.

    Args:
        loader: of the training records; its sampler, or its batch sampler, has ``set_epoch``.
        steps: steps of a round.
        done: steps that are done when training starts.
    """

    def __init__(self, loader: DataLoader[Any], steps: int, done: int = 0) -> None:
        sampler: Any = loader.batch_sampler if hasattr(loader.batch_sampler, "set_epoch") else loader.sampler
        self.sampler, self.steps = sampler, steps
        self.sampler.set_epoch(done // steps)  # workers fetch before the first epoch is said to start

    def on_load_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Mark every epoch that the checkpoint has seen as finished."""
        rounds = checkpoint["global_step"] // self.steps
        progress = checkpoint["loops"]["fit_loop"]["epoch_progress"]
        for counts in (progress["total"], progress["current"]):
            counts.update(dict.fromkeys(counts, rounds))

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Start the round as a run that was never interrupted would start it."""
        if trainer.global_step % self.steps:
            raise CheckpointError(
                f"{trainer.default_root_dir}: expected a round of {self.steps} steps to begin at a multiple of it, got "
                f"step {trainer.global_step}; its checkpoints are of another run: start anew, output=another-folder"
            )
        loop = trainer.fit_loop.epoch_loop
        loop.restarting = False
        loop._batches_that_stepped = trainer.global_step  # what loggers get
        self.sampler.set_epoch(trainer.global_step // self.steps)


def checkpoint_callback(folder: Path) -> ModelCheckpoint:
    """Save after every epoch, which is as many steps as lie between two checkpoints; keep the newest two.

    ``save_last`` alone would write nothing before training ends: Lightning copies what a top-k rule has saved. The rule
    here is the step itself, so the newest are the best.
    """
    return ModelCheckpoint(
        folder / CHECKPOINTS,
        filename="{step:08d}",
        auto_insert_metric_name=False,
        enable_version_counter=False,  # a run that was moved writes its own steps again
        monitor="step",
        mode="max",
        save_top_k=KEPT,
        every_n_epochs=1,
        save_on_train_epoch_end=True,
    )


def checkpoints(folder: Path) -> list[Path]:
    """List a run's checkpoints, newest first."""
    return sorted((folder / CHECKPOINTS).glob("*.ckpt"), reverse=True)


def newest_checkpoint(folder: Path) -> tuple[Path | None, int]:
    """Find the newest checkpoint that can be read, and its step; ``(None, 0)`` where there is none.

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


def keep_newest(folder: Path, newest: Path | None) -> None:
    """Remove what a resumed run does not go on from: damaged files, parts of files, all but the one before the newest.

    Lightning never removes the checkpoint that it has resumed from; without this every resume would leave one more.
    """
    if newest is None:
        return
    whole = checkpoints(folder)
    kept = whole[whole.index(newest) :][:KEPT]
    for path in (folder / CHECKPOINTS).iterdir():
        if path not in kept:
            path.unlink()
