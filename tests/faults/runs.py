"""A run of the embedded demo so short that a test can afford several, and ways to interrupt it."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

STEPS, EVERY = 16, 4  # a checkpoint every four steps
SHORT = [
    f"trainer.steps={STEPS}",
    "trainer.batch_size=8",
    f"trainer.checkpoint_every={EVERY}",
    "trainer.validate_every=3",
    "trainer.progress=false",
    "conditions.every=6",
    "conditions.examples=12",
    "data.examples.train=130",
    "data.examples.validation=49",
    "data.examples.calibration=24",
    "data.examples.test=24",
    "objective.warmup=0.1",
    "tracking.wandb=disabled",
    "static.width=0",  # the routers of so short a run beat no plan
    "conditions.hold_above=null",  # and all layers are theirs to decide
]

KILLER = Path(__file__).with_name("killer.py")


def environment() -> dict[str, str]:
    """What a process of its own needs: one thread, and no word of a test's distributed or W&B neighbours."""
    hidden = ("WANDB_SERVICE", "LOCAL_RANK", "RANK", "WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in hidden}
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def kill(moment: str, step: int, arguments: list[str]) -> None:
    """Run ``adaskip ARGUMENTS`` and kill it -9 from within: ``in step``, ``in checkpoint`` or ``after training``."""
    done = subprocess.run(
        [sys.executable, str(KILLER), *arguments],
        env=environment() | {"MOMENT": moment, "STEP": str(step)}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == -9, done.stderr


def numbers(run: Path) -> dict[str, list[tuple[int, str]]]:
    """Every series of ``metrics.csv``: name -> (step, value), values as they are written, NaN included."""
    series: dict[str, list[tuple[int, str]]] = {}
    with (run / "metrics.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            series.setdefault(row["name"], []).append((int(row["step"]), row["value"]))
    return series
