"""``adaskip`` with a death built in: ``MOMENT`` at ``STEP`` of process ``VICTIM``.

Every process tells a digest of its routers and adapters, and at its end whether it leaves the group of processes open.

A program of its own, so that Lightning and torchrun can start it as they start ``adaskip``. Imported, it arms the
process that imports it.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import signal
import sys
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.utilities import rank_zero_only

from adaskip.cli import main
from adaskip.runtime.adapters import trained_adapters
from adaskip.training.module import RouterTuner

train_one, write, validate = RouterTuner.training_step, Path.write_bytes, lightning.Trainer.validate


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def dies(moment: str) -> bool:
    return moment == os.environ.get("MOMENT") and rank_zero_only.rank == int(os.environ.get("VICTIM", 0))


def fatal_step() -> int:
    return int(os.environ.get("STEP", 0))


def training_step(self: RouterTuner, batch: Any, batch_idx: int) -> torch.Tensor:
    if dies("in step") and self.global_step == fatal_step():
        die()
    return train_one(self, batch, batch_idx)


def half_a_file(self: Path, content: bytes) -> int:
    if dies("in checkpoint") and self.name.startswith(f"{fatal_step():08d}.ckpt"):
        write(self, content[: len(content) // 2])
        die()
    return write(self, content)


def validate_or_die(self: lightning.Trainer, *args: Any, **options: Any) -> Any:
    if dies("after training"):
        die()
    return validate(self, *args, **options)


def tell(self: RouterTuner) -> None:
    trained = [*self.model.routers.parameters(), *trained_adapters(self.model)]
    weights = b"".join(w.detach().numpy().tobytes() for w in trained)
    line = f"ROUTERS {self.global_rank} {hashlib.sha256(weights).hexdigest()} {float(self.multiplier)!r}\n"
    os.write(2, line.encode())


RouterTuner.training_step, RouterTuner.on_train_end = training_step, tell
Path.write_bytes, lightning.Trainer.validate = half_a_file, validate_or_die
atexit.register(lambda: os.write(2, f"OPEN {torch.distributed.is_initialized()}\n".encode()))
if __name__ == "__main__":
    main(sys.argv[1:])
