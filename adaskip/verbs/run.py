"""A finished run, opened: its recipe, routed model and processor; and which of its inputs nothing was fitted on."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from adaskip.backbone.load import load_backbone
from adaskip.errors import AdaSkipError, CheckpointError, ConfigError, DataError, did_you_mean
from adaskip.recipe import Recipe, load
from adaskip.runtime.attach import RoutedModel
from adaskip.stages import SILENT, Stages
from adaskip.training.data import SPLITS, Record
from adaskip.verbs.amounts import fitted
from adaskip.verbs.export import router_folder
from adaskip.verbs.train import RECIPE, backbone_options, load_processor, records


@dataclass(frozen=True)
class Run:
    """A finished run, loaded: its recipe, routed model and processor."""

    folder: Path
    recipe: Recipe
    model: RoutedModel
    processor: Any


def read_recipe(folder: Path) -> Recipe:
    """The recipe of a finished run; loads nothing else, so that what is missing is said at once.

    Raises:
        CheckpointError: the folder is no finished run.
    """
    folder = Path(folder)
    router_folder(folder)
    if not (folder / RECIPE).is_file():
        above = folder.parent
        instead = f": pass {above}" if (above / RECIPE).is_file() else ", not an export"
        raise CheckpointError(f"{folder}: holds routers but no {RECIPE}; expected the folder of a run{instead}")
    return load(folder / RECIPE)


def open_run(folder: Path, stages: Stages = SILENT) -> Run:
    """Load a finished run.

    Raises:
        CheckpointError: the folder is no finished run.
    """
    folder = Path(folder)
    recipe = read_recipe(folder)
    with stages(f"loading {recipe.backbone.path} and the routers of {folder}"):
        base = load_backbone(recipe.backbone.path, **backbone_options(recipe))
        model = RoutedModel.from_pretrained(router_folder(folder), base)
        if torch.cuda.is_available() and not recipe.backbone.device_map:
            model.cuda()
        return Run(folder, recipe, model, load_processor(recipe))


def check_split(split: str) -> None:
    """Raise ConfigError unless there can be a split of that name."""
    if split not in SPLITS:
        hint = did_you_mean(split, SPLITS)
        near = f"; {hint}" if hint.startswith("did") else ""
        raise ConfigError(f"--split: expected one of {', '.join(SPLITS)}, got {split!r}{near}")


def check_writable(folder: Path, what: str) -> None:
    """Raise CheckpointError unless files can be written into a folder; asked before long work."""
    if not os.access(folder, os.W_OK):
        raise CheckpointError(f"{folder}: cannot be written to, and {what} is stored there; copy the folder first")


def split_of(recipe: Recipe, split: str) -> list[Record]:
    """One split of a run's data, for a verb that asks for it by name.

    Raises:
        ConfigError: no split can have that name.
        DataError: the data does not hold it; says which other one to ask for.
    """
    check_split(split)
    if split == "test" and not has_test(recipe):
        raise DataError(
            f"{recipe.data.source}: holds no test split; add a test.jsonl with prompts and answers there, or ask for "
            "inputs that training has seen: --split validation"
        )
    return records(recipe, split)


def has_test(recipe: Recipe) -> bool:
    """Whether a run's data holds a test split; a split that is there but damaged counts."""
    source = Path(recipe.data.source)
    if source.is_dir():
        return (source / "test.jsonl").is_file()
    try:
        return bool(records(recipe, "test"))
    except AdaSkipError:  # a dataset of the hub tells only by failing
        return False


def held_out(recipe: Recipe) -> tuple[Sequence[Record], str]:
    """Examples to show, which the routers were not trained on, and their split: test, or else calibration."""
    split = "test" if has_test(recipe) else "calibration"
    return records(recipe, split), split


def unfitted(recipe: Recipe) -> tuple[list[Record], str]:
    """Records that neither routers, threshold nor prices have seen, and their split.

    Raises:
        DataError: there is no test split, and training has used up the calibration split.
    """
    used = fitted(recipe)
    if has_test(recipe):
        return records(recipe, "test")[-used:], "test"
    left = records(recipe, "calibration")[used:]
    if len(left) < 4:
        raise DataError(
            f"check: no test split, and training used {used} calibration records and left {len(left)}; "
            f"add a test.jsonl to {recipe.data.source}"
        )
    return left, "calibration"
