"""Loggers of a run's numbers: always into files of the run folder, and the same into Weights & Biases on request."""

from __future__ import annotations

import csv
import json
import os
import platform
import re
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from matplotlib.figure import Figure

from adaskip.lines import own_lines
from adaskip.ranks import is_first_process
from adaskip.runfiles import METRICS, WANDB, WANDB_ID, write_text
from adaskip.sites import Label
from adaskip.stages import SILENT, Stages
from adaskip.training.upload import Upload

PACKAGES = ("adaskip", "torch", "transformers", "lightning", "wandb", "torchmetrics", "numpy")


class MetricsFile(Logger):
    """Append to ``metrics.csv`` one number a line: step, name, value. A killed run loses none that was written.

    Args:
        folder: of the run.
        after: steps that are done; lines of later steps are deleted, as the resumed run writes them again.
    """

    def __init__(self, folder: Path, after: int = 0) -> None:
        super().__init__()
        self.path = folder / METRICS
        if is_first_process():
            truncate_table(self.path, after)

    @property
    def name(self) -> str:
        """Return the name of the logger."""
        return "metrics"

    @property
    def version(self) -> int:
        """Return 0: a run folder has one file of metrics."""
        return 0

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append the numbers of one step."""
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows((step, name, repr(float(v))) for name, v in metrics.items() if name != "epoch")

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Log nothing: the resolved recipe beside the file says it all."""


def truncate_table(path: Path, after: int) -> None:
    """Keep the header and the whole lines of the first ``after`` steps, which are numbered from 0."""
    lines = own_lines(path.read_text(encoding="utf-8")) if path.exists() else []
    kept = [line for line in lines[1:] if line.count(",") >= 2 and int(line.split(",", 1)[0]) < after]
    write_text(path, "\n".join(["step,name,value", *kept]) + "\n")


def truncate_lines(path: Path, after: int) -> None:
    """Keep the JSON lines whose ``step`` is at most ``after``; a line cut short by a kill goes too."""
    if not path.exists():
        return
    kept = []
    for line in own_lines(path.read_text(encoding="utf-8")):
        try:
            if json.loads(line)["step"] <= after:
                kept.append(line)
        except (json.JSONDecodeError, KeyError):
            continue
    write_text(path, "".join(line + "\n" for line in kept))


class Laps:
    """Measure the wall-clock seconds, and this process's processor seconds, of one part of a run after the other."""

    def __init__(self) -> None:
        self.parts: dict[str, dict[str, float]] = {}
        self._last = time.monotonic(), time.process_time()

    def lap(self, name: str) -> None:
        """Count what has passed since the last lap as this part."""
        now = time.monotonic(), time.process_time()
        wall, cpu = (round(b - a, 2) for a, b in zip(self._last, now, strict=True))
        self.parts[name], self._last = {"seconds": wall, "processor_s": cpu}, now


def environment(seed: int, device: str) -> dict[str, Any]:
    """Describe what a figure of this run depends on beside the recipe."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "device": device,
        "seed": seed,
        "packages": versions,
    }


def wandb_mode(wanted: str) -> str:
    """Return the quieter of what a recipe wants and what the environment's ``WANDB_MODE`` says, as W&B's users know it.

    Quietest first: disabled, offline, online.
    """
    modes = ("disabled", "offline", "online")
    said = os.environ.get("WANDB_MODE", "").lower()
    said = "offline" if said == "dryrun" else said  # W&B's own older word
    return min(wanted, said, key=modes.index) if said in modes else wanted


def run_id(folder: Path) -> str:
    """Return the W&B id of a run folder: made when it is first asked for, and kept there, so that a resume goes on.

    W&B's own agent of a sweep has made the id already, and says it in ``WANDB_RUN_ID``.
    """
    file = folder / WANDB / WANDB_ID
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, (os.environ.get("WANDB_RUN_ID") or uuid.uuid4().hex[:8]) + "\n")
    return file.read_text(encoding="utf-8").strip()


class RunLogger(WandbLogger):
    """Record into a file that ``wandb sync`` reads; a process of its own sends it where ``online`` is asked for."""

    upload: Upload | None = None


def wandb_logger(
    folder: Path, mode: str, project: str, name: str | None, tags: Iterable[str], config: dict[str, Any]
) -> RunLogger:
    """Make Lightning's own W&B logger; it uploads no checkpoints (that fails offline); the id is the run folder's.

    Args:
        folder: of the run.
        mode: ``offline``, or ``online``: what is recorded is also sent.
        project: to which the run belongs.
        name: of the run; None: the folder's.
        tags: of the run.
        config: the resolved recipe.
    """
    logger = RunLogger(
        project=project,
        name=name or folder.name,
        save_dir=str(folder),
        mode="offline",  # not Lightning's ``offline``, which sets WANDB_MODE for all that this process does later
        log_model=False,
        id=run_id(folder) if is_first_process() else None,
        tags=list(tags),
        resume="allow",  # `wandb sync` then appends what a resumed run has recorded, else it would write over it
    )
    logger.log_hyperparams(config)
    if mode == "online" and is_first_process():
        settings = logger.experiment.settings
        # W&B reads the environment once a process
        logger.upload = Upload(Path(settings.sync_file), os.environ.get("WANDB_BASE_URL") or settings.base_url)
    return logger


class Board:
    """Send tables, pictures and files to whichever W&B logger a trainer has; without one nothing happens."""

    def __init__(self, loggers: Iterable[Logger]) -> None:
        self.loggers = [logger for logger in loggers if isinstance(logger, WandbLogger)]
        self.runs = [logger.experiment for logger in self.loggers]

    def conditions(self, look: dict[str, Any]) -> None:
        """Send the verdicts as a table."""
        if not self.runs:
            return
        import wandb

        columns: list[Any] = [
            "layer",
            "group",
            "notion",
            "estimate",
            "low",
            "high",
            "threshold",
            "margin",
            "n",
            "verdict",
        ]
        rows: list[Any] = [[finding[c] for c in columns] for finding in look["findings"]]
        for run in self.runs:
            run.log({"conditions": wandb.Table(columns=columns, data=rows)})

    def alarm(self, name: str, text: str) -> None:
        """Send an alarm, which W&B mails or shows as its user wants it."""
        for run in self.runs:
            run.alert(title=f"routers: {name}", text=text)

    def keep_rates(self, rates: dict[str, list[float]], figure: Figure, labels: Sequence[Label]) -> None:
        """Send the heat map layer x kind, as a picture and as a table; ``labels`` are what its columns are called."""
        if not self.runs:
            return
        import wandb

        rows: list[Any] = [
            [kind, layer, rate] for kind, row in rates.items() for layer, rate in zip(labels, row, strict=True)
        ]
        for run in self.runs:
            run.log(
                {
                    "keep_rates": wandb.Image(figure),
                    "keep_rate_table": wandb.Table(columns=["kind", "layer", "keep"], data=rows),
                }
            )

    def ladder(self, rungs: dict[str, list[float]], figure: Figure, labels: Sequence[Label]) -> None:
        """Send what one skip of each layer costs beside what bounds it, as a picture and as a table."""
        if not self.runs:
            return
        import wandb

        columns: list[Any] = ["layer", *rungs]
        rows: list[Any] = [[str(label), *values] for label, *values in zip(labels, *rungs.values(), strict=True)]
        for run in self.runs:
            table = wandb.Table(columns=columns, data=rows)
            run.log({"bound_ladder": wandb.Image(figure), "bound_ladder_table": table})

    def answers(self, rows: Sequence[dict[str, Any]]) -> None:
        """Send answers with their routes as a table."""
        if not (self.runs and rows):
            return
        import wandb

        columns: list[Any] = list(rows[0])
        values: list[Any] = [list(row.values()) for row in rows]
        for run in self.runs:
            run.log({"answers": wandb.Table(columns=columns, data=values)})

    def comparison(self, rows: Sequence[dict[str, Any]], picture: Path) -> None:
        """Send the rows of a comparison as a table of their plain figures, and its picture."""
        if not self.runs:
            return
        import wandb

        columns: list[Any] = [name for name, value in rows[0].items() if not isinstance(value, dict | list)]
        values: list[Any] = [[row.get(name) for name in columns] for row in rows]
        for run in self.runs:
            run.log({"comparison": wandb.Table(columns=columns, data=values), "pareto": wandb.Image(str(picture))})

    def router(self, folder: Path, name: str, facts: dict[str, Any]) -> None:
        """Send the routers as the next version of an artifact, which says what they were made of.

        Args:
            folder: in which they lie.
            name: of the artifact; characters that W&B does not take are replaced.
            facts: its metadata.
        """
        if not self.runs:
            return
        import wandb

        for run in self.runs:
            artifact = wandb.Artifact(re.sub(r"[^\w.-]", "-", name), type="model", metadata=facts)
            artifact.add_dir(str(folder))
            run.log_artifact(artifact)

    def finish(self, stages: Stages = SILENT) -> None:
        """Close the runs, so that the next training in this process opens its own, and end their uploads."""
        for logger in self.loggers:
            logger.experiment.finish()
            if isinstance(logger, RunLogger) and logger.upload is not None:
                with stages(f"sending the rest to W&B at {logger.upload.server}"):
                    logger.upload.finish()
