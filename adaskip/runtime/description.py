"""`adaskip_config.json`: what stands beside a router's weights, read with every fault told in words."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from adaskip.errors import CheckpointError, ConfigError
from adaskip.plan import RouterConfig

CONFIG, WEIGHTS, CARD = "adaskip_config.json", "router.safetensors", "README.md"
FORMAT = 2

_BACKBONE: dict[str, type] = {
    "name": str,
    "class": str,
    "model_type": str,
    "layers": int,
    "width": int,
    "vocabulary": int,
}
_BY_FORMAT: dict[int, dict[str, type]] = {1: {"weights": str}, 2: {"quantised": bool}}
_FREE = ("threshold", "held")
"""Settings that may be changed after training, in the file too."""


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration of saved routers.

    Raises:
        CheckpointError: the folder holds none, or a damaged one.
    """
    if folder.is_file():
        raise CheckpointError(f"{folder}: expected a folder of saved routers, got a file; pass {folder.parent}")
    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        there = "" if folder.exists() else "no such folder here; of a Hugging Face repository first: hf download ID; "
        raise CheckpointError(
            f"{folder}: {there}expected saved routers, found no {' and no '.join(missing)} (missing); "
            "pass the folder that save_pretrained or `adaskip export` wrote, or RUN/router"
        )
    path = folder / CONFIG
    try:
        meta: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: damaged ({error}); export the routers again") from error
    number = meta.get("format") if isinstance(meta, dict) else None
    if type(number) is int and number > FORMAT:
        raise CheckpointError(f"{path}: format {number}, this adaskip reads formats 1 to {FORMAT}; upgrade adaskip")
    if faults := _faults(meta):
        raise CheckpointError(f"{path}: damaged ({'; '.join(faults)}); export the routers again")
    if meta.get("trained") not in (None, sign(meta["router"])):
        raise CheckpointError(
            f"{path}: router: changed since the routers were trained; of it only {' and '.join(_FREE)} may be "
            "changed by hand; take back the change, or export the routers again"
        )
    return meta


def sign(router: dict[str, Any]) -> str:
    """A hash of those settings without which the weights mean something else."""
    values = {name: value for name, value in RouterConfig.from_dict(router).to_dict().items() if name not in _FREE}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _faults(meta: Any) -> list[str]:
    """What of a configuration is missing or of the wrong kind."""
    if not isinstance(meta, dict):
        return [f"expected an object, got {type(meta).__name__}"]
    number = meta.get("format")
    if type(number) is not int or number not in _BY_FORMAT:
        return [f"format: expected 1 to {FORMAT}, got {number!r}"]
    faults = []
    backbone = meta.get("backbone")
    if not isinstance(backbone, dict):
        faults.append(f"backbone: expected an object, got {backbone!r}")
    else:
        faults += [
            f"backbone.{name}: expected {kind.__name__}, got {backbone.get(name)!r}"
            for name, kind in (_BACKBONE | _BY_FORMAT[number]).items()
            if type(backbone.get(name)) is not kind
        ]
    try:
        RouterConfig.from_dict(meta.get("router"))  # type: ignore[arg-type]
    except ConfigError as error:
        faults.append(f"router: {error}")
    for name in ("facts", "certificate"):
        if not isinstance(meta.get(name), dict | None):
            faults.append(f"{name}: expected an object, got {meta[name]!r}")
    return faults
