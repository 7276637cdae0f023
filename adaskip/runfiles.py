"""Name the files of a run's folder, and write a file whole or not at all; nobody else spells one of these names."""

from __future__ import annotations

import json
import os
import re
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

RECIPE = "recipe.resolved.yaml"
ENVIRONMENT = "env.json"
LOCK = ".lock"  # while a process trains in the folder
DATA = "data.json"  # how many records each split held, their digests, and the bad ones that were left out
METRICS = "metrics.csv"
CONDITIONS = "conditions.jsonl"
CHECKPOINTS = "checkpoints"
WANDB, WANDB_ID = "wandb", "run-id.txt"  # the folder that `wandb sync` reads, and in it the id that a resume keeps
FIT, FIT_ROUTERS = "fit.jsonl", "fit.safetensors"  # of method from-bounds: its rounds, and the routers after the last
BANK_PRICES = "bank-prices.safetensors"  # of method path-bank: what paths cost inputs, as far as it was measured
TOKEN_PRICES = "token-prices.safetensors"  # of method token-plan: what plans cost, as far as it was measured
EVIDENCE = "evidence"  # of a method of the field: the folder of what plans cost, as far as it was measured
PRICES = "prices.json"
KEEP_RATES = "keep_rates.json"
SUMMARY = "summary.json"
ROUTER = "router"  # the folder that `export` copies
LEARNED = "router-learned"  # the learned routers, where `router` holds a static plan that they do not beat
REPORT, PLOTS = "report.md", "plots"
EVALUATION = "evaluation.json"
CALIBRATION = "calibration.json"
HEALING = "healing"  # the folder of `heal`: its checkpoints, and the routers as they were
PROFILE, PROFILE_PLOT = "profile.json", "profile.png"  # of `profile`, whose folder is no run's
COMPARISON, COMPARISON_TABLE, COMPARISON_PLOT = "compare.json", "compare.md", "compare.png"  # of `compare`

STARTED = (RECIPE, ENVIRONMENT, DATA, METRICS, CONDITIONS, LOCK, CHECKPOINTS, WANDB)
"""What a start leaves in a folder before its first step."""

NAMES = frozenset(
    {
        *STARTED,
        FIT,
        FIT_ROUTERS,
        BANK_PRICES,
        TOKEN_PRICES,
        EVIDENCE,
        PRICES,
        KEEP_RATES,
        SUMMARY,
        ROUTER,
        LEARNED,
        REPORT,
        PLOTS,
        EVALUATION,
        CALIBRATION,
        HEALING,
    }
    | {PROFILE, PROFILE_PLOT, COMPARISON, COMPARISON_TABLE, COMPARISON_PLOT}
)
"""All of them."""

_PART = re.compile(r"(\.[0-9a-f]{8})?\.part$")


def write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: two who write at once never meet in one unfinished file."""
    write_with(path, lambda part: part.write_bytes(content))


def write_text(path: Path, text: str) -> None:
    """Write a text in UTF-8, whole or not at all."""
    write(path, text.encode())


def write_json(path: Path, values: Any, indent: int | None = None) -> None:
    """Write values as one JSON document, whole or not at all."""
    write_text(path, json.dumps(values, indent=indent) + "\n")


def write_lines(path: Path, values: list[dict[str, Any]]) -> None:
    """Write one JSON object a line, whole or not at all."""
    write_text(path, "".join(json.dumps(line) + "\n" for line in values))


def append_line(path: Path, values: dict[str, Any]) -> None:
    """Append one JSON object as a line; a kill in the middle leaves the lines before it whole."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(values) + "\n")


def write_with(path: Path, fill: Callable[[Path], Any]) -> None:
    """Let ``fill`` write a file beside ``path``, and move it there once it lies on the disk.

    A file that is moved before its content is on the disk may be empty after a power cut, under its right name.
    """
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        fill(part)
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        if error.errno is not None:
            error.filename = str(path)  # where a disk is full the system says no name
        raise
    finally:
        part.unlink(missing_ok=True)


def whole_name(name: str) -> str:
    """Return the name that an unfinished file was to get; any other name as it is.

    >>> whole_name("metrics.csv.0a1b2c3d.part"), whole_name("metrics.csv")
    ('metrics.csv', 'metrics.csv')
    """
    return _PART.sub("", name)
