"""What data a run learns from: written into its folder at the start, and compared when it goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaskip.errors import CheckpointError
from adaskip.lines import SHOWN
from adaskip.ranks import is_first_process
from adaskip.runfiles import DATA, RECIPE, write_json
from adaskip.training.bad_records import BadRecords
from adaskip.training.data import Record
from adaskip.training.digest import digest


@dataclass(frozen=True)
class DataUsed:
    """Hold how many records each split of a run has, a digest of each, and the bad ones that were left out."""

    splits: dict[str, dict[str, Any]]  # name -> records, digest
    bad: int
    faults: tuple[str, ...]  # one may have several
    chat: bool = False  # whether the model's chat template wrote the prompts

    @classmethod
    def of(cls, splits: Mapping[str, Sequence[Record]], bad: BadRecords) -> DataUsed:
        """Describe the splits that a run has read."""
        used = {name: {"records": len(chosen), "digest": digest(chosen)} for name, chosen in splits.items()}
        chat = any("turns" in record for chosen in splits.values() for record in chosen)
        return cls(used, len(bad), tuple(bad.lines()), chat)

    def told(self) -> list[str]:
        """Write what is said of records that were left out; nothing where none was."""
        if not self.bad:
            return []
        kept = sum(split["records"] for split in self.splits.values())
        lines = [f"{self.bad} bad records are left out, {kept} are read (data.bad_limit):", *self.faults[:SHOWN]]
        return lines + ([f"and {len(self.faults) - SHOWN} more, see {DATA}"] if len(self.faults) > SHOWN else [])

    def store(self, folder: Path) -> None:
        """Write ``data.json`` into a run's folder."""
        if is_first_process():
            values = {"splits": self.splits, "chat": self.chat, "bad": self.bad, "faults": list(self.faults)}
            write_json(folder / DATA, values, indent=2)

    @staticmethod
    def is_chat(folder: Path) -> bool:
        """Return whether the chat template wrote what the run of a folder learned from."""
        path = folder / DATA
        return path.is_file() and bool(json.loads(path.read_text(encoding="utf-8")).get("chat"))

    def check_same(self, folder: Path) -> None:
        """Compare with what the run was started on; an older run does not tell.

        Raises:
            CheckpointError: a split has changed since; says which.
        """
        path = folder / DATA
        if not path.is_file():
            return
        before = json.loads(path.read_text(encoding="utf-8"))["splits"]
        changed = [
            f"{name} ({_change(before[name]['records'], split['records'])})"
            for name, split in self.splits.items()
            if name in before and before[name] != split
        ]
        if changed:
            raise CheckpointError(
                f"{folder}: the data have changed since the run was started: {', '.join(changed)}; bring them back as "
                f"they were and resume: adaskip train {folder / RECIPE} --resume, or start anew: output={folder}-2"
            )


def _change(before: int, now: int) -> str:
    return "other contents" if before == now else f"{before} records, now {now}"
