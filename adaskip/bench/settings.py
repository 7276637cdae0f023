"""The options of `adaskip bench`: read, every fault told at once, and turned into a subject; its table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast, get_args

import torch

from adaskip.bench import Progress, bench
from adaskip.bench.cell import Phase
from adaskip.bench.forced import Path
from adaskip.bench.random_model import Size, random_subject
from adaskip.bench.subject import Subject, stored_subject
from adaskip.errors import ConfigError, did_you_mean
from adaskip.plan import Group
from adaskip.training.tracking import environment

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_OF_RANDOM_MODELS = {*vars(Size()), "backbone", "prompt", "image_tokens", "group", "attention", "dtype"}


@dataclass(frozen=True)
class Settings:
    """What will be measured, read and checked."""

    subject: Callable[[], Subject]
    device: torch.device
    told: dict[str, Any]
    skips: list[float] | None
    batches: list[int]
    paths: list[Path]
    different: int
    new: int
    budget: float
    width: float
    seed: int
    phases: list[Phase]

    def run(self, progress: Progress) -> dict[str, Any]:
        """Build the subject and measure it; ``results``, the ``settings``, and what the figures depend on beside."""
        subject = self.subject()
        skips = self.skips if self.skips is not None or subject.trained else [0.0, 0.25, 0.5]
        rows = bench(
            subject,
            skips,
            self.batches,
            self.paths,
            new=self.new,
            budget=self.budget,
            width=self.width,
            different=self.different,
            progress=progress,
            phases=self.phases,
        )
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        around = environment(self.seed, name) | {"threads": torch.get_num_threads()}
        return {"results": rows, "settings": self.told, "environment": around}


def read(
    target: str | None,
    backbone: str | None,
    layers: int,
    hidden: int,
    heads: int | None,
    kv_heads: int | None,
    intermediate: int | None,
    vocabulary: int,
    prompt: int | None,
    image_tokens: int,
    group: str | None,
    skip: str | None,
    batch: str,
    path: str,
    paths: int,
    phase: str,
    new: int,
    budget: float,
    width: float,
    attention: str,
    dtype: str,
    device: str | None,
    seed: int,
) -> Settings:
    """Options as typed, lists with commas.

    Raises:
        ConfigError: all faults at once.
    """
    told = dict(locals())
    faults: list[str] = []
    if (target is None) == (backbone is None):
        faults.append("expected a run folder, digits-vlm, or --backbone TYPE for a random model, one of them")
    size, made = Size(layers, hidden, heads, kv_heads, intermediate, vocabulary), (attention, dtype)
    if target is not None:
        if prompt is not None or image_tokens or group is not None or size != Size() or made != ("sdpa", "float32"):
            faults.append(
                "--prompt, --image-tokens, --group, --attention, --dtype and sizes: a stored model has its own; "
                "leave them out"
            )
        told = {name: value for name, value in told.items() if name not in _OF_RANDOM_MODELS}
    if image_tokens < 0:
        faults.append(f"--image-tokens: expected a whole number >= 0, got {image_tokens}")
    group = group or ("vision" if image_tokens else "all")
    for name, value, valid in (
        ("group", group, get_args(Group)),
        ("attention", attention, ("sdpa", "eager")),
        ("dtype", dtype, tuple(_DTYPES)),
    ):
        if value not in valid:
            faults.append(f"--{name}: expected {' | '.join(valid)}, got {value!r}; {did_you_mean(value, valid)}")
    for name, number in (("prompt", 512 if prompt is None else prompt), ("budget", budget), ("width", width)):
        if number <= 0:
            faults.append(f"--{name}: expected more than 0, got {number:g}")
    skips = None if skip is None else _numbers("skip", skip, float, faults)
    batches = _numbers("batch", batch, int, faults)
    place = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device is not None:
        try:
            place = torch.device(device)
        except RuntimeError:
            faults.append(f"--device: expected cpu or cuda, got {device!r}")
    if place.type not in ("cpu", "cuda"):
        faults.append(f"--device: expected cpu or cuda, got {device!r}")
    if place.type == "cuda" and torch.cuda.is_available() and (place.index or 0) >= torch.cuda.device_count():
        faults.append(f"--device {device}: expected a number below {torch.cuda.device_count()}, so many GPUs there are")
    if place.type == "cuda" and not torch.cuda.is_available():
        faults.append(f"--device {device}: no GPU was found here; expected cpu")
    if faults:
        raise ConfigError("\n".join(["bench:", *faults]) if len(faults) > 1 else f"bench: {faults[0]}")

    def subject() -> Subject:
        if target is not None:
            return stored_subject(target, place, seed)
        assert backbone is not None
        kind = cast(Group, group)
        words = prompt or 512
        return random_subject(backbone, size, words, new, image_tokens, kind, attention, _DTYPES[dtype], place, seed)

    kinds, phases = cast(list[Path], path.split(",")), cast(list[Phase], phase.split(","))
    return Settings(subject, place, told, skips, batches, kinds, paths, new, budget, width, seed, phases)


def _numbers(name: str, text: str, kind: type, faults: list[str]) -> list[Any]:
    try:
        return [kind(word) for word in text.split(",")]
    except ValueError:
        faults.append(f"--{name}: expected numbers with commas between, such as 0,0.5, got {text!r}")
        return []


def columns(row: dict[str, Any]) -> dict[str, Any]:
    """What the terminal shows of a row; 80 columns are all there is."""
    skip = "own" if row["skip"] is None else f"{row['skip']:g}"
    first = {"phase": row["phase"], "rows": row["batch"], "path": row["path"][:5], "skip": skip}
    seconds = {name: f"{row[name]:.3g}" for name in ("dense_s", "routed_s", "ideal_s")}
    told = {name: _interval(row, name) for name in ("efficiency", "overhead", "control")}
    return first | seconds | {"speed_up": f"{row['speedup']:.2f}"} | told | {"n": row["rounds"]}


def _interval(row: dict[str, Any], name: str) -> str | None:
    if row[name] is None:
        return None
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return f"{row[name]:.2f}" + ("" if low is None else f"\n{low:.2f}-{high:.2f}")
