"""Measure every batch size, path, share and phase that settings ask for: one line of a table each."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, cast

import torch

from adaskip.bench.cell import Cell, batch_cell
from adaskip.bench.lossless import lossless_cell
from adaskip.bench.many import many_cell
from adaskip.bench.random_model import Size, random_subject
from adaskip.bench.rounds import Seconds
from adaskip.bench.settings import DEFAULT_SKIP, BenchSettings, Path
from adaskip.bench.subject import Subject, stored_subject
from adaskip.errors import ConfigError
from adaskip.training.tracking import environment

Progress = Callable[[str, float], None]
"""Called with what is being done and the share of all that is done."""
_Choice = tuple[int, Path, float | None]
"""Rows, their paths, and the share of layers they leave out; None: what the policy itself decides."""


@dataclass(frozen=True)
class BenchResult:
    """Hold a table, and all that its figures depend on."""

    rows: list[dict[str, Any]]  # as `bench` returns them
    settings: BenchSettings
    environment: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return what ``--json`` prints."""
        return {"results": self.rows, "settings": self.settings.to_dict(), "environment": self.environment}


def run(settings: BenchSettings, progress: Progress = lambda text, share: None) -> BenchResult:
    """Build the model that settings name, and measure it.

    Raises:
        AdaSkipError: the model or the device is not there, or something asked for cannot be measured.
    """
    device = _device(settings.device)
    rows = bench(_subject(settings, device), settings, progress)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return BenchResult(rows, settings, environment(settings.seed, name) | {"threads": torch.get_num_threads()})


@torch.no_grad()
def bench(
    subject: Subject, settings: BenchSettings, progress: Progress = lambda text, share: None
) -> list[dict[str, Any]]:
    """Measure every batch size, path and skip rate, prefill and decode apart.

    Dense, routed, ideal and a second ideal (the control) take turns in one process, there and back. The policy does
    all its work in the routed time; what it decides is laid down beforehand. Seconds that one row does not need are
    there for the later ones. ``path``: on ``uniform`` all rows leave out the same layers; on ``mixed`` each row others,
    equally many; on ``many`` the rows are prompts of `generate_many` that go a few different paths, and the ideal
    decodes each path's prompts as one batch (layers are left out for group ``all``). On ``lossless`` dense and routed
    are calls of ``generate``, the routed one drafts for the dense model, and the ideal is the draft alone.

    Args:
        subject: the model.
        settings: what to measure, and how long.
        progress: hears what is being done.

    Returns:
        One row per batch size, path, skip rate and phase. ``*_s``: medians over rounds, seconds of one prefill or of
        one decoding step; ``*_spread``: quartiles; ratios are geometric means over paired rounds with ``_low`` and
        ``_high`` of their 95 % bootstrap interval (None where rounds were too few): ``speedup`` dense over routed,
        ``ideal_speedup`` dense over ideal, ``efficiency`` ideal over routed, ``overhead`` routed over dense where
        nothing is skipped, ``control`` ideal over ideal. ``flops`` and ``kv_bytes``: what the routed batch spent in the
        phase, and holds after it; ``dense_*`` likewise. ``rounds_s``: seconds of every side, round by round.

    Raises:
        ConfigError: something asked for cannot be measured on this model; all faults at once.
        AdaSkipError: sides compute different things.
    """
    skips = settings.skip
    if skips is None and not subject.trained:
        skips = DEFAULT_SKIP
    if faults := _faults(subject, settings, skips):
        raise ConfigError("bench: " + "; ".join(faults))
    choices = _choices(settings, skips)
    count = len(choices) * len(settings.phase)
    rows: list[dict[str, Any]] = []
    end = time.perf_counter() + settings.budget
    for choice in choices:
        cell = _cell(subject, choice, settings)
        for phase in settings.phase:
            # what earlier rows did not need of their seconds is shared by all that are still to come
            share = max(0.0, end - time.perf_counter()) / (count - len(rows))
            on_round = partial(_tell, progress, f"{phase}, {_name(choice)}", len(rows) / count)
            rows.append(cell.measure(phase, share, settings.width, on_round))
        del cell  # its caches would count as memory of the next one
    return rows


def _tell(progress: Progress, text: str, share: float, seconds: Seconds) -> None:
    progress(f"{text}: round {len(seconds['routed'])}", share)


def _choices(settings: BenchSettings, skips: tuple[float, ...] | None) -> list[_Choice]:
    """List what to measure; twice the same is measured once."""
    choices: list[_Choice] = []
    for batch in settings.batch:
        if skips is None:  # every row may have a path of its own
            own = ("lossless" if path == "lossless" else "mixed" for path in settings.path)
            choices += [(batch, path, None) for path in cast(dict[Path, None], dict.fromkeys(own))]
            continue
        paths = settings.path
        if batch == 1:  # a single row has a single path
            single = ("lossless" if path == "lossless" else "uniform" for path in settings.path)
            paths = tuple(cast(dict[Path, None], dict.fromkeys(single)))
        choices += [(batch, path, rate) for path, rate in product(paths, skips)]
    # where nothing is left out, mixed rows are uniform ones
    return [c for c in choices if not (c[2] == 0 and c[1] == "mixed" and "uniform" in settings.path)]


def _cell(subject: Subject, choice: _Choice, settings: BenchSettings) -> Cell:
    batch, path, rate = choice
    if path == "many":
        assert rate is not None
        return many_cell(subject, batch, settings.paths, rate, settings.new)
    if path == "lossless":
        return lossless_cell(subject, batch, rate, settings.new)
    return batch_cell(subject, batch, path, rate, settings.new)


def _name(choice: _Choice) -> str:
    batch, path, rate = choice
    return f"batch {batch}, {path}, skip {'own' if rate is None else f'{rate:g}'}"


def _faults(subject: Subject, settings: BenchSettings, skips: tuple[float, ...] | None) -> list[str]:
    """List what of the settings cannot be measured on this very model."""
    routed, layers = subject.routed.runtime, len(subject.spec.layers)
    skipped = {rate: round(rate * layers) for rate in skips or ()}
    faults = [f"--skip {rate:g}: leaves no layer of {layers}" for rate, count in skipped.items() if count == layers]
    target = routed.target
    # what drafts read ran whole in either phase
    phases = ("both", "decode") if {*settings.path} == {"lossless"} else ("both",)
    if (target.scope, target.unit, target.kv) != ("prompt", "block", "absent") or target.phase not in phases:
        faults.append(
            f"a policy of scope {target.scope!r}, unit {target.unit!r}, kv {target.kv!r} and phase {target.phase!r} "
            "leaves no layer as a whole, so there is no model to cut out for comparison; expected scope prompt, unit "
            "block, kv absent, phase both. `adaskip eval` measures its seconds beside the dense model's"
        )
    if routed.known is not None and skips is not None and (other := {*settings.path} - {"uniform", "lossless"}):
        faults.append(f"--path {' '.join(sorted(other))}: a plan sends every row the same way; expected --path uniform")
    if "lossless" in settings.path and routed.group == "vision":
        faults.append("--path lossless: without vision no layer is left out of decoding; expected --group all")
    if "many" not in settings.path:
        return faults
    if skips is None:
        faults.append("--path many: by itself the policy goes as many paths as it likes; say which share --skip leaves")
    if routed.group == "vision":
        faults.append("--path many: without vision no layer is left out of decoding; expected --group all")
    faults += [
        f"--paths {settings.paths}: expected at least so many prompts, got --batch {batch}"
        for batch in settings.batch
        if 1 < batch < settings.paths and any(skipped.values())
    ]
    faults += [
        f"--paths {settings.paths}: {count} of {layers} layers can be left out in {math.comb(layers, count)} ways only"
        for count in skipped.values()
        if 0 < count < layers and math.comb(layers, count) < settings.paths
    ]
    return faults


def _subject(settings: BenchSettings, device: torch.device) -> Subject:
    if settings.target is not None:
        return stored_subject(settings.target, device, settings.seed)
    assert settings.backbone is not None
    size = Size(**{name: getattr(settings, name) for name in vars(Size())})
    words, dtype = settings.prompt or 512, getattr(torch, settings.dtype)
    return random_subject(
        settings.backbone, size, words, settings.new, settings.image_tokens, settings.group, settings.attention,
        dtype, device, settings.seed,
    )  # fmt: skip


def _device(name: str | None) -> torch.device:
    """Find the device to measure on; None: the GPU, if there is one.

    Raises:
        ConfigError: no such device is here.
    """
    gpus = torch.cuda.device_count()
    if name is None:
        return torch.device("cuda" if gpus else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and not gpus:
        raise ConfigError(f"bench: --device {name}: no GPU was found here; expected cpu")
    if device.type == "cuda" and (device.index or 0) >= gpus:
        raise ConfigError(f"bench: --device {name}: expected a number below {gpus}, so many GPUs there are")
    return device


def columns(row: dict[str, Any]) -> dict[str, Any]:
    """Choose what the terminal shows of a row; 80 columns are all there is."""
    skip = "own" if row["skip"] is None else f"{row['skip']:g}"
    first = {"phase": row["phase"], "rows": row["batch"], "path": row["path"][:5], "skip": skip}
    seconds = {name: f"{row[name]:.3g}" for name in ("dense_s", "routed_s", "ideal_s")}
    ratios = {name: _interval(row, name) for name in ("efficiency", "overhead", "control")}
    return first | seconds | {"speed_up": f"{row['speedup']:.2f}"} | ratios | {"n": row["rounds"]}


def _interval(row: dict[str, Any], name: str) -> str | None:
    if row[name] is None:
        return None
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return f"{row[name]:.2f}" + ("" if low is None else f"\n{low:.2f}-{high:.2f}")
