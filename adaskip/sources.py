"""Say what ships with the package under a name, a model and its data; no other module knows of any.

A model is a shipped one (``digits-vlm``), a folder that ``save_pretrained`` wrote, or a Hugging Face id; data likewise.
`adaskip.backbone.load` and `adaskip.training.data.load_records` take the name of either.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from adaskip.demo.backbone import EMBEDDED, FOLDER


@dataclass(frozen=True)
class Shipped:
    """Locate a model and its data that come with the package under one name."""

    folder: Path  # of the model and its processor, as `save_pretrained` writes them
    data: str  # module with `records(split, limit, seed)`, which draws them, and their `KINDS`


_SHIPPED = {EMBEDDED: Shipped(FOLDER, "adaskip.demo.digits")}


def is_shipped(name: str) -> bool:
    """Return whether a name is that of a model and data in the package.

    >>> is_shipped("digits-vlm"), is_shipped("Qwen/Qwen2.5-VL-7B-Instruct")
    (True, False)
    """
    return name in _SHIPPED


def shipped_names() -> str:
    """Return the names of what ships with the package, for an error or a help text."""
    return ", ".join(_SHIPPED)


def shipped_model(name: str) -> Path:
    """Return the folder of a shipped model and its processor."""
    return _SHIPPED[name].folder


def shipped_records(name: str, split: str, limit: int | None, seed: int) -> list[dict[str, Any]]:
    """Draw records of shipped data: as many as asked for, the same for the same arguments."""
    records: list[dict[str, Any]] = import_module(_SHIPPED[name].data).records(split, limit, seed)
    return records


def shipped_kinds(name: str) -> tuple[str, ...]:
    """Return the kinds of input that shipped data holds, each equally often."""
    kinds: tuple[str, ...] = import_module(_SHIPPED[name].data).KINDS
    return kinds


def expanded(name: str) -> Path:
    """Return the path that a name is, with a home directory for ``~``; as typed where nobody lives there."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        return Path(name)


def model_name(path: str) -> str:
    """Return the name by which a loaded model is found again, also from another working directory."""
    for name, shipped in _SHIPPED.items():
        if path and Path(path) == shipped.folder:  # an installed package lies elsewhere on the next machine
            return name
    return str(Path(path).resolve()) if path and Path(path).is_dir() else path
