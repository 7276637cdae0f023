"""Start a run, or go on with one: whose folder it is, what it already holds, and who else is at work in it."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from adaskip import runfiles
from adaskip.errors import CheckpointError, ConfigError, did_you_mean
from adaskip.ranks import is_first_process, launched
from adaskip.recipe import Recipe, dump, load
from adaskip.runfiles import (
    BANK_PRICES,
    ENVIRONMENT,
    EVIDENCE,
    FIT_ROUTERS,
    LOCK,
    METRICS,
    RECIPE,
    ROUTER,
    STARTED,
    SUMMARY,
    TOKEN_PRICES,
)
from adaskip.training.checkpoints import checkpoints, keep_newest, newest_checkpoint
from adaskip.training.tracking import environment, wandb_mode
from adaskip.verbs.run import check_writable

_FREE_TO_CHANGE = {"name", "output", "tracking", "trainer.progress", "trainer.workers"}
"""Keys that a resumed run may have otherwise: they change nothing that it computes."""

_NO_TRAINING = ("seed", "objective.keep", "backbone.path", "static.fallback", "conditions.on_violation")
"""Keys that tell no way of training from another: draw, budget, where a model lies, what becomes of the result."""


def check_start(recipe: Recipe, folder: Path, resume: bool) -> None:
    """Refuse a start that cannot work, before anything is loaded or written.

    A folder in which an earlier start failed before its first step counts as new: for a start and for a resume.

    Raises:
        ConfigError: the folder holds a run, or another run than this recipe's; torchrun has started another number
            of processes than the recipe asks for; or sections contradict the method.
        CheckpointError: there is no run to go on with, or the folder cannot be written to.
    """
    recipe.check_method()
    _check_launch(recipe)
    if not is_first_process():
        return
    if resume:
        _check_same_run(recipe, folder)
    elif has_progress(folder):
        raise ConfigError(
            f"{folder}: already holds a run; go on with it: adaskip train {folder / RECIPE} --resume, "
            f"or choose another folder: output={folder}-2"
        )
    elif other := _foreign(folder):
        raise ConfigError(
            f"{folder}: expected a new or empty folder, found {', '.join(other[:5])}; "
            f"choose another folder: output={folder}-2"
        )
    check_writable(folder, "the run", "choose another folder: output=DIR")


@contextmanager
def opened(recipe: Recipe, folder: Path, resume: bool) -> Iterator[tuple[Path | None, int]]:
    """Make the run's folder, which inside is this run's alone; give the checkpoint to go on from, and its step.

    Only the first process of a run makes the folder and keeps others out; the lock dies with the process, however that
    ends.

    Raises:
        ConfigError: another process is at work in the folder.
    """
    if not is_first_process():
        yield newest_checkpoint(folder) if resume else (None, 0)
        return
    _make(folder)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ConfigError(
            f"{folder}: another process is training in this folder; wait for it, or choose another: output={folder}-2"
        ) from None
    try:
        checkpoint, step = newest_checkpoint(folder) if resume else (None, 0)
        keep_newest(folder, checkpoint)
        if not has_progress(folder):
            _forget_failed_start(folder)
            runfiles.write_text(folder / RECIPE, dump(recipe))
            device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
            runfiles.write_json(folder / ENVIRONMENT, environment(recipe.seed, device), indent=2)
        yield checkpoint, step
    finally:
        (folder / LOCK).unlink(missing_ok=True)
        lock.release()


def has_progress(folder: Path) -> bool:
    """Return whether a run in this folder has got as far as a step, a fitted round or a result."""
    metrics = folder / METRICS
    stepped = metrics.is_file() and len(metrics.read_bytes().splitlines()) > 1
    made = (
        (folder / FIT_ROUTERS).is_file()
        or (folder / BANK_PRICES).is_file()
        or (folder / TOKEN_PRICES).is_file()
        or (folder / EVIDENCE).is_dir()
        or (folder / ROUTER).is_dir()
        or (folder / SUMMARY).is_file()
    )
    return stepped or made or bool(checkpoints(folder))


def _foreign(folder: Path) -> list[str]:
    """List the names in a folder that no start of ours leaves there."""
    if not folder.exists():
        return []
    if not folder.is_dir():
        return ["a file of that name"]
    names = sorted(path.name for path in folder.iterdir())
    return [name for name in names if runfiles.whole_name(name) not in STARTED]


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / LOCK).touch()
    except OSError as error:
        raise ConfigError(
            f"{folder}: cannot be written ({error.strerror}); choose another folder: output=..."
        ) from error


def _forget_failed_start(folder: Path) -> None:
    """Remove what a start left that never came to its first step."""
    for path in folder.iterdir():
        if path.name == LOCK or runfiles.whole_name(path.name) not in STARTED:
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _check_same_run(recipe: Recipe, folder: Path) -> None:
    resolved = folder / RECIPE
    if not resolved.is_file():
        raise CheckpointError(f"{folder}: no run to resume here; start one without --resume")
    if not has_progress(folder):
        return
    if changed := changed_keys(load(resolved), recipe):
        raise ConfigError(
            f"{resolved}: the run was started with another {', '.join(changed[:5])}; "
            f"resume it as it was: adaskip train {resolved} --resume"
        )


def changed_keys(before: Recipe, now: Recipe) -> list[str]:
    """Return the keys in which two recipes train differently, each with both values."""
    old, new = _flat(before.model_dump()), _flat(now.model_dump())
    changed = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    return [f"{key} ({old.get(key)!r}, now {new.get(key)!r})" for key in changed if not _is_free(key)]


def training_mark(recipe: Recipe) -> str:
    """Return 16 hexadecimal digits that are equal for recipes which train alike, but for budget and seed."""
    values = _flat(recipe.model_dump())
    told = {key: value for key, value in values.items() if key not in _NO_TRAINING and not _is_free(key)}
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _is_free(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in _FREE_TO_CHANGE)


def _flat(values: dict[str, object], prefix: str = "") -> dict[str, object]:
    """Flatten nested sections to one mapping of dotted keys."""
    flat: dict[str, object] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _check_launch(recipe: Recipe) -> None:
    """Compare what torchrun has started with what the recipe asks for: each process would train for itself."""
    started, _ = launched()
    devices = recipe.trainer.devices
    requested = len(devices) if isinstance(devices, list) else devices
    if started > 1 and requested != "auto" and str(requested) != str(started):
        raise ConfigError(
            f"trainer.devices: torchrun has started {started} processes on this machine, and the recipe asks for "
            f"{requested}; leave it out, or type trainer.devices={started}"
        )


def check_tracking(wanted: str, name: str) -> str:
    """Return the mode of W&B that holds: what is wanted, or what the environment says, where that is quieter.

    A key that is missing or wrong is no reason not to start: what is recorded here is sent later.

    Raises:
        ConfigError: it is no mode; ``name`` is what the setting is called.
    """
    if wanted not in (modes := ("disabled", "offline", "online")):
        raise ConfigError(f"{name}: expected {' | '.join(modes)}, got {wanted!r}; {did_you_mean(wanted, modes)}")
    return wandb_mode(wanted)
