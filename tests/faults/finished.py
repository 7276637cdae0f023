"""A short run of the embedded model that the tests of the verbs share, and ways to change a copy of it."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

import adaskip
from adaskip.recipe import load
from adaskip.verbs.train import train

SHORT = [
    "trainer.steps=2",
    "trainer.batch_size=12",
    "trainer.checkpoint_every=2",
    "trainer.validate_every=2",
    "trainer.progress=false",
    "conditions.every=0",
    "conditions.examples=18",
    "data.examples.train=24",
    "data.examples.validation=24",
    "data.examples.calibration=66",
    "data.examples.test=48",
    "tracking.wandb=disabled",
    "static.width=0",  # the routers of so short a run beat no plan
    "conditions.hold_above=null",  # and all layers are theirs to decide
]


def short_run(folder: Path) -> Path:
    """A whole run of two steps."""
    train(load("digits-vlm", [*SHORT, f"output={folder}"]))
    return folder


def copy_of(run: Path, folder: Path, spread: float | None = None, threshold: float | None = None) -> Path:
    """A copy of a run, its routers with logits that spread like ``spread``, or another threshold."""
    shutil.copytree(run, folder)
    model = adaskip.RoutedModel.from_pretrained(folder / "router")
    draw = torch.Generator().manual_seed(0)
    for head in model.routers if spread is not None else ():
        with torch.no_grad():
            head.outer.weight.copy_(spread * torch.randn(head.outer.weight.shape, generator=draw))
    if threshold is not None:
        model.set_threshold(threshold)
    model.save_pretrained(folder / "router")
    return folder
