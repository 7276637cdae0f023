"""A run of the embedded demo so short that a test can afford several, and ways to interrupt it."""

from __future__ import annotations

import csv
import importlib
import multiprocessing
import os
import sys
import tempfile
from pathlib import Path
from unittest import mock

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
    "data.examples.validation=17",
    "data.examples.calibration=24",
    "data.examples.test=24",
    "objective.warmup=0.1",
    "tracking.wandb=disabled",
    "static.width=0",  # the routers of so short a run beat no plan
    "conditions.hold_above=null",  # and all layers are theirs to decide
]

KILLER = Path(__file__).with_name("killer.py")
ARMS = "tests.faults.killer"
"""Never imported in a test's own process."""


def environment() -> dict[str, str]:
    """What a process of its own needs: one thread, and no word of a test's distributed or W&B neighbours."""
    hidden = ("WANDB_SERVICE", "LOCAL_RANK", "RANK", "WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in hidden}
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def kill(moment: str, step: int, arguments: list[str]) -> None:
    """Run ``adaskip ARGUMENTS`` and kill it -9 from within: ``in step``, ``in checkpoint`` or ``after training``.

    The process is forked from one that has imported everything, which would take as long as the run itself.
    """
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload([__name__, ARMS])
    death = environment() | {"MOMENT": moment, "STEP": str(step)}
    with tempfile.NamedTemporaryFile() as said:
        process = forks.Process(target=_run_and_die, args=(arguments, death, said.name))
        with mock.patch.dict(os.environ, environment(), clear=True):  # the first one starts the server
            process.start()
        process.join(240)
        process.kill()
        assert process.exitcode == -9, Path(said.name).read_text()


def _run_and_die(arguments: list[str], death: dict[str, str], said: str) -> None:
    os.environ.clear()
    os.environ.update(death)
    file = os.open(said, os.O_WRONLY)
    os.dup2(file, 1)
    os.dup2(file, 2)
    importlib.import_module(ARMS).main(arguments)


def numbers(run: Path) -> dict[str, list[tuple[int, str]]]:
    """Every series of ``metrics.csv``: name -> (step, value), values as they are written, NaN included."""
    series: dict[str, list[tuple[int, str]]] = {}
    with (run / "metrics.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            series.setdefault(row["name"], []).append((int(row["step"]), row["value"]))
    return series
