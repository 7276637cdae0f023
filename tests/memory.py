"""The third line of every recipe, which says what memory it is meant for: `python -m tests.memory` writes it."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from adaskip.recipe import load, recipes
from adaskip.verbs.estimate import estimate


def line(name: str) -> str:
    """Return the line of a recipe, from the estimate of its own settings."""
    recipe = load(name)
    found = estimate(recipe, timed=False)
    devices = recipe.trainer.devices
    where = f"each of {devices} GPUs" if isinstance(devices, int) and devices > 1 else "a GPU"
    return f"# For {where} of {found.gpu} GB: `adaskip validate {name}` estimates {found.bytes / 1e9:.2g} GB a step."


def filled(name: str, text: str) -> str:
    """Return a recipe's text with its line made anew."""
    first, launch, third, *rest = text.split("\n")
    return "\n".join([first, launch, line(name), *(rest if third.startswith("# For ") else [third, *rest])])


if __name__ == "__main__":
    paths = recipes()
    os.chdir(tempfile.mkdtemp())  # where no backbone lies that would be taken instead of the published sizes
    for name, path in paths.items():
        path = Path(path).absolute()
        path.write_text(filled(name, path.read_text(encoding="utf-8")), encoding="utf-8")
