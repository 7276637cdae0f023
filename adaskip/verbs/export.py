"""`adaskip export`: the routers of a run, ready to ship, or the layers that a plan keeps, as an ordinary model."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from adaskip.errors import CheckpointError
from adaskip.generate.plain import save_plain
from adaskip.runtime import hub
from adaskip.runtime.description import CARD, CONFIG, WEIGHTS, read_config
from adaskip.runtime.persist import read_weights
from adaskip.stages import SILENT, Stages
from adaskip.verbs.run import Run, check_writable, router_folder


@dataclass(frozen=True)
class ExportResult:
    """Hold a folder that `RoutedModel.from_pretrained` reads; of a cut model, Hugging Face reads it by itself."""

    folder: Path
    files: tuple[str, ...]
    bytes: int
    backbone: str  # the name it is loaded by; empty where it was built in memory
    url: str | None = None  # on the Hub, where it was uploaded

    def to_dict(self) -> dict[str, Any]:
        """Return what ``--json`` prints."""
        return {
            "folder": str(self.folder),
            "files": list(self.files),
            "bytes": self.bytes,
            "backbone": self.backbone,
            "url": self.url,
        }


def export(
    run: str | Path,
    destination: str | Path,
    *,
    cut: bool = False,
    push: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    stages: Stages = SILENT,
) -> ExportResult:
    """Copy the routers of a finished run to an empty or new folder: configuration, weights and model card.

    Args:
        run: the run's folder.
        destination: new or empty.
        cut: write the layers that the run's plan keeps as an ordinary Hugging Face model in their place, with its
            processor, adapters merged; nothing of adaskip is left in it.
        push: repository of the Hugging Face Hub to upload the folder to, as ``user/name``.
        private: whether a new repository is; None: as the account's settings say.
        revision: branch to upload to, made where there is none; None: the main branch.
        stages: hears what is under way.

    Raises:
        CheckpointError: the run has no whole routers, or the destination holds something else or cannot be written to;
            or the Hub refuses the upload, and the folder is complete here.
        ConfigError: ``push`` is no name of a repository; or ``cut``, and the run's policy leaves other layers out for
            other inputs, or only parts of layers.
        BackboneError: ``cut``, and what is left cannot be written as a model of the backbone's class.

    Example:
        ``adaskip.export("runs/digits-vlm", "my-router")``
    """
    if push is not None:
        hub.check_name(push)
    source, destination = router_folder(Path(run)), Path(destination)
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise CheckpointError(f"{destination}: already holds something; choose a new or empty folder")
    check_writable(destination, "the export", "choose another folder")
    meta = read_config(source)
    read_weights(source / WEIGHTS, meta)  # a damaged file is said here, not where it has been shipped to
    if cut:
        done = _export_cut(Path(run), destination, stages)
    else:
        destination.mkdir(parents=True, exist_ok=True)
        for name in (CONFIG, WEIGHTS, CARD):
            if (source / name).is_file():  # a model card may have been taken away
                shutil.copyfile(source / name, destination / name)
        done = _listed(destination, meta["backbone"]["name"])
    if push is None:
        return done
    what = "a model without some layers" if cut else "routers"
    with stages(f"uploading {done.bytes:,} bytes to {push}"):
        try:
            url = hub.push(destination, push, private=private, revision=revision, message=f"Upload {what}")
        except CheckpointError as error:
            later = f"hf upload {push} {destination}"
            raise CheckpointError(f"{error}; the export lies whole in {destination}, upload it: {later}") from error
    return replace(done, url=url)


def _export_cut(folder: Path, destination: Path, stages: Stages) -> ExportResult:
    run = Run.open(folder, stages)
    with stages("cutting the plan's layers out, and reading them again"):
        save_plain(run.model, destination, run.processor)
    return _listed(destination, run.recipe.backbone.path)


def _listed(destination: Path, backbone: str) -> ExportResult:
    written = sorted(path for path in destination.iterdir() if path.is_file())
    size = sum(path.stat().st_size for path in written)
    return ExportResult(destination, tuple(path.name for path in written), size, backbone)
