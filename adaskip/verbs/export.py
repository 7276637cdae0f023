"""`adaskip export`: the routers of a run, ready to ship."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from adaskip.errors import CheckpointError
from adaskip.runfiles import RECIPE, ROUTER
from adaskip.runtime.description import CARD, CONFIG, WEIGHTS, read_config
from adaskip.runtime.persist import read_weights


def router_folder(run: Path) -> Path:
    """The folder that holds a run's routers: ``RUN/router``, or RUN itself when it is an exported folder.

    Raises:
        CheckpointError: there is none; says what is missing.
    """
    if not run.is_dir():
        raise CheckpointError(f"{run}: no such folder; train one with `adaskip train RECIPE`")
    if (run / CONFIG).is_file():
        return run
    if not (run / ROUTER / CONFIG).is_file():
        unfinished = (run / RECIPE).is_file()
        hint = f"the run has not finished; go on with `adaskip train {run / RECIPE} --resume`"
        raise CheckpointError(
            f"{run}: holds no routers; " + (hint if unfinished else "train one with `adaskip train RECIPE`")
        )
    return run / ROUTER


def export(run: Path, destination: Path) -> dict[str, Any]:
    """Copy the routers of a finished run to an empty or new folder: configuration, weights and model card.

    Raises:
        CheckpointError: the run has no whole routers, or the destination holds something else.
    """
    source = router_folder(Path(run))
    meta = read_config(source)
    read_weights(source / WEIGHTS, meta)  # a damaged file is said here, not where it has been shipped to
    destination = Path(destination)
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise CheckpointError(f"{destination}: already holds something; choose a new or empty folder")
    destination.mkdir(parents=True, exist_ok=True)
    for name in (CONFIG, WEIGHTS, CARD):
        if not (source / name).is_file():
            continue  # a model card may have been taken away
        shutil.copyfile(source / name, destination / name)
    size = sum(path.stat().st_size for path in destination.iterdir())
    return {
        "folder": str(destination),
        "files": sorted(path.name for path in destination.iterdir()),
        "bytes": size,
        "backbone": meta["backbone"]["name"],
    }
