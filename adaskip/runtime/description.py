"""`adaskip_config.json`, the file beside a policy's weights: written, read, and refused with all its faults at once."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from adaskip.errors import CheckpointError, ConfigError
from adaskip.plan import read_number
from adaskip.policy import Policy, find
from adaskip.runtime.lora import Lora
from adaskip.sites import label_site, read_sites
from adaskip.theory.gauge import stored_gauge

CONFIG, WEIGHTS, CARD = "adaskip_config.json", "router.safetensors", "README.md"
FORMAT = 4
"""1 and 2 knew routers only; 1 named its backbone by a hash. 4 holds adapters, without which 3 is written."""

_BACKBONE: dict[str, type] = {
    "name": str,
    "class": str,
    "model_type": str,
    "layers": int,
    "width": int,
    "vocabulary": int,
}
_BY_FORMAT: dict[int, dict[str, type]] = {1: {"weights": str}}
_BY_FORMAT |= {number: {"quantised": bool} for number in (2, 3, 4)}
_FREE: dict[str, Any] = {"threshold": 0.0, "held": []}
"""Settings that may be changed after training, in the file too."""


def read_config(folder: Path) -> dict[str, Any]:
    """Read the configuration of a saved policy.

    Raises:
        CheckpointError: the folder holds none, or a damaged one.
    """
    if folder.is_file():
        raise CheckpointError(f"{folder}: expected a folder of saved routers, got a file; pass {folder.parent}")
    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        there = "" if folder.exists() else "no such folder here; of a Hugging Face repository write user/name; "
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
    if meta.get("trained") not in (None, sign(_described(meta), meta["format"])):
        name = "policy" if meta["format"] >= 3 else "router"
        raise CheckpointError(
            f"{path}: {name}: changed since the routers were trained; of it only {' and '.join(_FREE)} may be changed "
            "by hand; take back the change, or export the routers again"
        )
    return meta


def describe_policy(policy: Policy) -> dict[str, Any]:
    """Return what brings a policy back, but for its weights: ``kind``, ``settings``, ``threshold``, ``held``.

    Raises:
        ConfigError: `find` would not know its kind, or JSON cannot hold its settings.
    """
    if not policy.kind or find(policy.kind) is not type(policy):
        raise ConfigError(
            f"save_pretrained: {type(policy).__name__} is no registered policy, so it could not be brought back; give "
            "it a kind and decorate the class with @adaskip.policies.register"
        )
    settings = policy.to_dict()
    try:
        settings = json.loads(json.dumps(settings))
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"save_pretrained: {type(policy).__name__}.to_dict(): JSON cannot hold it ({error})"
        ) from None
    held = [label_site(policy.target.unit, site) for site in policy.held]
    return {"kind": policy.kind, "settings": settings, "threshold": policy.threshold, "held": held}


def read_policy(meta: dict[str, Any]) -> Policy:
    """Return the policy that a configuration describes, without its weights.

    Raises:
        ConfigError: no such kind, or settings that it does not take.
    """
    description = _described(meta)
    policy = find(description["kind"]).from_dict(description["settings"])
    policy.threshold = read_number(description["threshold"])
    policy.held = read_sites(policy.target.unit, description["held"])
    return policy


def _described(meta: dict[str, Any]) -> dict[str, Any]:
    """Return the policy's description, of an old file too."""
    if meta["format"] >= 3:
        policy: dict[str, Any] = meta["policy"]
        return policy
    values = dict(meta["router"])
    free = {name: values.pop(name, default) for name, default in _FREE.items()}
    return {"kind": "learned", "settings": values, **free}


def sign(policy: dict[str, Any], number: int = 3) -> str:
    """Return a hash of the settings that the weights were trained for, as files of a format have it."""
    settings = find(policy["kind"]).from_dict(policy["settings"]).to_dict()
    if number < 3:
        settings.pop("phase", None)  # there was one only
        content = settings
    else:
        content = {"kind": policy["kind"], "settings": settings}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _faults(meta: Any) -> list[str]:
    """Return what of a configuration is missing or of the wrong kind."""
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
    name = "policy" if number >= 3 else "router"
    try:
        if not isinstance(meta.get(name), dict):
            raise ConfigError(f"expected an object, got {meta.get(name)!r}")
        if missing := {"kind", "settings", "threshold", "held"} - meta[name].keys() if number >= 3 else ():
            raise ConfigError(f"no {', '.join(sorted(missing))}")
        read_policy(meta)
    except (ConfigError, ValueError) as error:
        faults.append(f"{name}: {error}")
    for name in ("facts", "certificate", "gauge", "adapters"):
        if not isinstance(meta.get(name), dict | None):
            faults.append(f"{name}: expected an object, got {meta[name]!r}")
    try:
        if isinstance(gauge := meta.get("gauge"), dict):
            stored_gauge(gauge)
    except ValueError as error:
        faults.append(f"gauge: {error}")
    try:
        if isinstance(lora := meta.get("adapters"), dict):
            Lora.from_dict(lora)
    except (ConfigError, TypeError) as error:
        faults.append(f"adapters: {error}")
    return faults
