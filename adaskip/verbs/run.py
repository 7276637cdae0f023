"""Open the folder of a finished run: its recipe, routed model and processor."""

from __future__ import annotations

import hashlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from adaskip.backbone import load as backbones
from adaskip.backbone.quantise import quantisation
from adaskip.errors import CheckpointError
from adaskip.recipe import Recipe, load
from adaskip.runfiles import RECIPE, ROUTER
from adaskip.runtime.attach import RoutedModel
from adaskip.runtime.description import CONFIG, WEIGHTS
from adaskip.stages import SILENT, Stages


@dataclass(frozen=True)
class Run:
    """Hold a finished run, loaded."""

    folder: Path
    recipe: Recipe
    model: RoutedModel  # on the GPU, if there is one
    processor: Any

    @classmethod
    def open(cls, folder: str | Path, stages: Stages = SILENT) -> Run:
        """Load a finished run.

        Raises:
            CheckpointError: the folder is no finished run.
        """
        folder = Path(folder)
        recipe = read_recipe(folder)
        with stages(f"loading {recipe.backbone.path} and the routers of {folder}"):
            model = RoutedModel.from_pretrained(router_folder(folder), load_model(recipe))
            if torch.cuda.is_available() and not recipe.backbone.device_map:
                model.cuda()
            return cls(folder, recipe, model, load_processor(recipe))


def router_folder(folder: Path) -> Path:
    """Return the folder of a run's routers: ``RUN/router``, or the folder itself where it is an exported one.

    Raises:
        CheckpointError: there is none; says what is missing.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; train one with `adaskip train RECIPE`")
    if (folder / CONFIG).is_file():
        return folder
    if (folder / ROUTER / CONFIG).is_file():
        return folder / ROUTER
    if (folder / RECIPE).is_file():
        hint = f"the run has not finished; go on with `adaskip train {folder / RECIPE} --resume`"
    else:
        hint = "train one with `adaskip train RECIPE`"
    raise CheckpointError(f"{folder}: holds no routers; {hint}")


def read_recipe(folder: Path) -> Recipe:
    """Read the recipe of a finished run, and load nothing else, so that what is missing is said at once.

    Raises:
        CheckpointError: the folder is no finished run.
    """
    router_folder(folder)
    if not (folder / RECIPE).is_file():
        above = folder.parent
        instead = f": pass {above}" if (above / RECIPE).is_file() else ", not an export"
        raise CheckpointError(f"{folder}: holds routers but no {RECIPE}; expected the folder of a run{instead}")
    return load(folder / RECIPE)


def policy_mark(saved: Path) -> str:
    """Return 16 hexadecimal digits of a saved policy, its settings and weights."""
    return hashlib.sha256(b"".join((saved / name).read_bytes() for name in (CONFIG, WEIGHTS))).hexdigest()[:16]


def load_model(recipe: Recipe) -> PreTrainedModel:
    """Load the backbone of a recipe as its section says."""
    section = recipe.backbone
    options: dict[str, Any] = {"dtype": section.dtype, "attn_implementation": section.attention}
    # what is not said is left out: an option that is None is not the same as none to every model's own code
    options |= {"device_map": section.device_map} if section.device_map else {}
    options |= {"quantization_config": quantisation(section.quantise, section.dtype)} if section.quantise else {}
    options |= {"trust_remote_code": True} if section.trust_remote_code else {}
    options |= {"revision": section.revision} if section.revision else {}
    return backbones.load_backbone(section.path, **options)


def load_processor(recipe: Recipe) -> Any:
    """Load the processor of a recipe's backbone, or its tokenizer where it has no pictures."""
    section = recipe.backbone
    return backbones.load_processor(
        section.path, trust_remote_code=section.trust_remote_code, revision=section.revision
    )


def check_writable(folder: Path, what: str, otherwise: str = "copy the folder first") -> None:
    """Refuse a folder, made or still to be made, that files cannot be written into; asked before anything is loaded.

    A file without a name is written, and gone at once: permissions alone say nothing of a file where a folder is to be,
    of a disk that is full, or to root.

    Raises:
        CheckpointError: names the place that cannot be written to; says what is stored there, and what to do.
    """
    place = folder.absolute()
    while not os.path.lexists(place):
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place, buffering=0) as file:
            file.write(b"\0")
    except OSError as error:
        why = f"{place} is a file" if place.is_file() else f"{place}: {error.strerror}"
        raise CheckpointError(
            f"{folder}: cannot be written to ({why}), and {what} is stored there; {otherwise}"
        ) from error
