"""`adaskip bench`: what skipping saves, against the dense model and against the same layers physically cut out."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from adaskip.bench.forced import Path, check_forced, force, spread_out
from adaskip.bench.rounds import Seconds, interleave, ratio, spread
from adaskip.bench.sides import Side, Sides, ideal
from adaskip.bench.subject import Subject
from adaskip.errors import AdaSkipError, ConfigError
from adaskip.plan import Routing
from adaskip.runtime.measure import cache_bytes, peak_memory

Progress = Callable[[str, float], None]


@torch.no_grad()
def bench(
    subject: Subject,
    skips: Sequence[float] | None,
    batches: Sequence[int],
    paths: Sequence[Path],
    new: int,
    budget: float,
    width: float = 0.04,
    progress: Progress = lambda text, share: None,
) -> list[dict[str, Any]]:
    """Measure every batch size, path and skip rate, prefill and decode apart.

    Dense, routed, ideal and a second ideal (the control) take turns in one process, forth and back. Routers pool,
    think and decide in the routed time; what they decide is laid down beforehand.

    Args:
        subject: the model.
        skips: shares of the layers left out; None: what trained routers decide on the inputs themselves.
        batches: rows.
        paths: ``uniform``: all rows leave out the same layers; ``mixed``: each row others, equally many.
        new: tokens written per decode turn.
        budget: seconds for the rounds of all rows together; what one does not need is left to the later ones.
        width: rounds go on until the 95 % interval of efficiency (of overhead, too, where nothing is skipped) is
            narrower than this.
        progress: hears what is being done and the share that is done.

    Returns:
        One row per batch size, path, skip rate and phase. ``*_s``: medians over rounds, seconds of one prefill or of
        one decoding step; ``*_spread``: quartiles; ratios are geometric means over paired rounds with ``_low`` and
        ``_high`` of their 95 % bootstrap interval (None where rounds were too few): ``speedup`` dense over routed,
        ``ideal_speedup`` dense over ideal, ``efficiency`` ideal over routed, ``overhead`` routed over dense where
        nothing is skipped, ``control`` ideal over ideal. ``flops`` and ``kv_bytes``: what the routed batch spent in the
        phase, and holds after it; ``dense_*`` likewise.
    """
    faults = [f"--skip: expected shares in [0, 1), got {x:g}" for x in skips or () if not 0 <= x < 1]
    layers = len(subject.described.layers)
    faults += [
        f"--skip {x:g}: leaves no layer of {layers}" for x in skips or () if 0 <= x < 1 and round(x * layers) == layers
    ]
    faults += [f"--batch: expected whole numbers >= 1, got {x}" for x in batches if x < 1]
    faults += [f"--path: expected uniform | mixed, got {x!r}" for x in paths if x not in get_args(Path)]
    faults += [f"--new: expected a whole number >= 1, got {new}"] if new < 1 else []
    if faults:
        raise ConfigError("bench: " + "; ".join(faults))
    cells = [
        (batch, path, rate) for batch in batches for path in _paths(paths, batch, skips) for rate in skips or (None,)
    ]
    cells = [c for c in cells if not (c[2] == 0 and c[1] == "mixed" and "uniform" in paths)]
    rows: list[dict[str, Any]] = []
    end = time.perf_counter() + budget
    for number, (batch, path, rate) in enumerate(cells):
        name = f"batch {batch}, {path}, skip {'own' if rate is None else f'{rate:g}'}"
        cell = _Cell(subject, batch, path, rate, new)
        for phase in ("prefill", "decode"):
            left = 2 * (len(cells) - number) - (phase == "decode")
            share = max(0.0, end - time.perf_counter()) / left

            def told(seconds: Seconds, done: int = 2 * len(cells) - left, what: str = f"{phase}, {name}") -> None:
                progress(f"{what}: round {len(seconds['routed'])}", done / (2 * len(cells)))

            rows.append(cell.measure(phase, share, width, told))
    return rows


def _paths(paths: Sequence[Path], batch: int, skips: Sequence[float] | None) -> Sequence[Path]:
    """One row has one path, and trained routers have theirs."""
    if skips is None:
        return ("mixed",)
    return ("uniform",) if batch == 1 else paths


class _Cell:
    """One batch size, path and rate: its four sides, warmed up and holding their caches."""

    def __init__(self, subject: Subject, batch: int, path: Path, rate: float | None, new: int) -> None:
        inputs = subject.batch(batch)
        routed = subject.routed
        self.facts: dict[str, Any] = {
            "backbone": subject.name,
            "group": routed.runtime.group,
            "batch": batch,
            "path": path if rate is not None else "own",
            "skip": rate,
            "tokens": inputs["input_ids"].shape[1],
        }
        if rate is not None:
            keep = spread_out(len(subject.described.layers), rate, batch, path)
            force(routed, inputs, keep)
        self.dense = Side(subject.described.model, inputs, new)
        self.routed = Side(routed, inputs, new)
        device = subject.described.device
        self.memory: dict[str, Any] = {}
        self.memory["peak_bytes"], self.memory["peak_is"] = peak_memory(self.routed.settle, device)
        if rate is not None:
            check_forced(routed, keep)
        self.prompt = routed.routing
        self.held = {"kv_bytes": cache_bytes(self.routed.cache)}
        self.memory["dense_peak_bytes"], _ = peak_memory(self.dense.settle, device)
        self.held["dense_kv_bytes"] = cache_bytes(self.dense.cache)
        keep = self.prompt.keep.cpu()
        self.ideal, self.control = (ideal(subject, inputs, keep, new) for _ in range(2))
        self.ideal.settle()
        self.control.settle()
        if rate is not None and path == "uniform" and len(self.ideal.parts) == 1:
            _check_same(self.routed.logits, self.ideal.parts[0].logits)

    def measure(self, phase: str, budget: float, width: float, told: Callable[[Seconds], None]) -> dict[str, Any]:
        sides: dict[str, Side | Sides] = {
            "dense": self.dense,
            "routed": self.routed,
            "ideal": self.ideal,
            "control": self.control,
        }
        cost, held = self.prompt, dict(self.held)
        if phase == "decode":
            for side in (self.dense, self.routed):
                side.decode()
            held = {"kv_bytes": cache_bytes(self.routed.cache), "dense_kv_bytes": cache_bytes(self.dense.cache)}
            cost = self.routed.model.routing
            for side in (self.dense, self.routed):
                side.cache.crop(-side.new)
        seconds = interleave(
            {name: getattr(side, f"{phase}_seconds") for name, side in sides.items()},
            lambda found: all(_width(found, *pair) < width for pair in self._asked()),
            budget,
            told,
        )
        executed, whole = _spent(cost)
        if phase == "decode":
            before, before_whole = _spent(self.prompt)
            executed, whole = (
                (now - then) / self.routed.new for now, then in ((executed, before), (whole, before_whole))
            )
        row: dict[str, Any] = {"phase": phase, **self.facts}
        row |= {f"{name}_s": statistics.median(seconds[name]) for name in ("dense", "routed", "ideal")}
        row |= _ratio("speedup", seconds, "dense", "routed")
        row |= _ratio("ideal_speedup", seconds, "dense", "ideal")
        row |= _ratio("efficiency", seconds, "ideal", "routed")
        nothing = {"overhead": None, "overhead_low": None, "overhead_high": None}
        row |= _ratio("overhead", seconds, "routed", "dense") if self.facts["skip"] == 0 else nothing
        row |= _ratio("control", seconds, "control", "ideal")
        row |= {f"{name}_spread": spread(seconds[name]) for name in ("dense", "routed", "ideal")}
        row |= {"rounds": len(seconds["routed"]), "keep": executed / whole, "flops": executed, "dense_flops": whole}
        return row | held | self.memory

    def _asked(self) -> list[tuple[str, str]]:
        return [("ideal", "routed"), *([("routed", "dense")] if self.facts["skip"] == 0 else [])]


def _spent(routing: Routing) -> tuple[float, float]:
    assert routing.executed is not None
    assert routing.dense is not None
    return float(routing.executed.sum()), float(routing.dense.sum())


def _width(seconds: Seconds, above: str, below: str) -> float:
    found = ratio(seconds[above], seconds[below])
    return found.high - found.low


def _ratio(name: str, seconds: Seconds, above: str, below: str) -> dict[str, float | None]:
    found = ratio(seconds[above], seconds[below])
    ends = (found.low, found.high) if math.isfinite(found.high) and found.low > 0 else (None, None)
    return {name: found.estimate, f"{name}_low": ends[0], f"{name}_high": ends[1]}


def _check_same(routed: Tensor | None, cut: Tensor | None) -> None:
    """Two programs whose seconds are compared must say the same."""
    assert routed is not None
    assert cut is not None
    gap, size = (routed - cut).abs().max(), cut.abs().max()
    if gap > (1e-3 if routed.dtype == torch.float32 else 0.1) * size:
        raise AdaSkipError(
            f"bench: routed and physically cut model differ by {float(gap):.2g} in logits up to {float(size):.2g}; "
            "their seconds cannot be compared. Please report this model type"
        )
