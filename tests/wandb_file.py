"""Read an offline W&B run back: LevelDB log framing (32 KiB blocks) behind a 7-byte header, protobuf records inside."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

BLOCK, HEADER = 32768, 7


def records(path: Path) -> Iterator[Any]:
    """Every record of a ``.wandb`` file, in order."""
    data = path.read_bytes()
    place, parts = HEADER, []
    while place + HEADER <= len(data):
        left = BLOCK - place % BLOCK
        if left < HEADER:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + HEADER])
        if kind == 0:
            place += left
            continue
        parts.append(data[place + HEADER : place + HEADER + length])
        place += HEADER + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(b"".join(parts))
            parts = []
            yield record


def _whole(path: Path, patience: float = 5.0) -> list[Any]:
    """The records of a file up to its last, which W&B may write a moment after ``finish``; a killed run has none."""
    deadline = time.monotonic() + patience
    while True:
        found = [*records(path)]
        if any(record.WhichOneof("record_type") == "exit" for record in found) or time.monotonic() > deadline:
            return found
        time.sleep(0.05)


def read(folder: Path) -> dict[str, Any]:
    """Configuration, history (one dict a row) and artifacts of the runs below a run folder's ``wandb``."""
    found: dict[str, Any] = {"config": {}, "history": [], "artifacts": []}
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for record in _whole(path):
            kind = record.WhichOneof("record_type")
            if kind in ("config", "run"):
                updates = record.config.update if kind == "config" else record.run.config.update
                for item in updates:
                    found["config"][item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
            elif kind == "history":
                found["history"].append(
                    {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
                )
            elif kind == "artifact":
                found["artifacts"].append(record.artifact)
    return found
