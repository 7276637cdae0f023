"""`adaskip export`: the routers of a run, ready to ship."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from adaskip.errors import CheckpointError
from adaskip.runtime.description import CARD, CONFIG, WEIGHTS, read_config
from adaskip.runtime.persist import read_weights
from adaskip.verbs.run import router_folder


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
