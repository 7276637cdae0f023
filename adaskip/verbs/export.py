"""`adaskip export`: the routers of a run, ready to ship."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaskip.errors import CheckpointError
from adaskip.runtime.description import CARD, CONFIG, WEIGHTS, read_config
from adaskip.runtime.persist import read_weights
from adaskip.verbs.run import check_writable, router_folder


@dataclass(frozen=True)
class ExportResult:
    """Hold a folder that `RoutedModel.from_pretrained` reads."""

    folder: Path
    files: tuple[str, ...]
    bytes: int
    backbone: str  # the name it is loaded by; empty where it was built in memory

    def to_dict(self) -> dict[str, Any]:
        """Return what ``--json`` prints."""
        return {
            "folder": str(self.folder),
            "files": list(self.files),
            "bytes": self.bytes,
            "backbone": self.backbone,
        }


def export(run: str | Path, destination: str | Path) -> ExportResult:
    """Copy the routers of a finished run to an empty or new folder: configuration, weights and model card.

    Raises:
        CheckpointError: the run has no whole routers, or the destination holds something else or cannot be written to.

    Example:
        ``adaskip.export("runs/digits-vlm", "my-router")``
    """
    source, destination = router_folder(Path(run)), Path(destination)
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise CheckpointError(f"{destination}: already holds something; choose a new or empty folder")
    check_writable(destination, "the export", "choose another folder")
    meta = read_config(source)
    read_weights(source / WEIGHTS, meta)  # a damaged file is said here, not where it has been shipped to
    destination.mkdir(parents=True, exist_ok=True)
    for name in (CONFIG, WEIGHTS, CARD):
        if (source / name).is_file():  # a model card may have been taken away
            shutil.copyfile(source / name, destination / name)
    copied = sorted(destination.iterdir())
    size = sum(path.stat().st_size for path in copied)
    return ExportResult(destination, tuple(path.name for path in copied), size, meta["backbone"]["name"])
