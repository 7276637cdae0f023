"""One line of the benchmark's table: the dense, routed, cut and control model of one batch, and their seconds."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from adaskip.bench.forced import force, spread_out
from adaskip.bench.rounds import Seconds, bounded_ratio, interleave, ratio, spread
from adaskip.bench.settings import Path, Phase
from adaskip.bench.sides import Side, ideal
from adaskip.bench.subject import Subject
from adaskip.errors import AdaSkipError
from adaskip.plan import Routing
from adaskip.runtime.timing import cache_bytes, peak_memory


class Timed(Protocol):
    """Take a turn in a round of timings."""

    def prefill_seconds(self) -> float:
        """Take the seconds of one prefill."""
        ...

    def decode_seconds(self) -> float:
        """Take the seconds of writing one token."""
        ...


@dataclass(frozen=True)
class Cell:
    """Hold four sides that do the same work, and all figures of theirs that need no clock."""

    facts: dict[str, Any]  # what is measured
    sides: dict[str, Timed]  # dense, routed, ideal, control
    spent: dict[str, tuple[float, float]]  # of a phase: decoder FLOPs executed, and with every layer run
    kv_bytes: dict[str, dict[str, int]]  # of a phase: bytes of keys and values after it
    memory: dict[str, Any]

    def measure(self, phase: Phase, budget: float, width: float, on_round: Callable[[Seconds], None]) -> dict[str, Any]:
        """Run the rounds of a phase, and return their row of the table, as `adaskip.bench.table.bench` says."""
        skips_nothing = self.facts["skip"] == 0  # then routed over dense is the overhead of routing itself
        pairs = [("ideal", "routed"), *([("routed", "dense")] if skips_nothing else [])]
        seconds = interleave(
            {name: getattr(side, f"{phase}_seconds") for name, side in self.sides.items()},
            lambda so_far: all(_width(so_far, *pair) < width for pair in pairs),
            budget,
            on_round,
        )
        executed, dense = self.spent[phase]
        row: dict[str, Any] = {"phase": phase, **self.facts}
        row |= {f"{name}_s": statistics.median(seconds[name]) for name in ("dense", "routed", "ideal")}
        row |= _ratio("speedup", seconds, "dense", "routed")
        row |= _ratio("ideal_speedup", seconds, "dense", "ideal")
        row |= _ratio("efficiency", seconds, "ideal", "routed")
        unmeasured = {"overhead": None, "overhead_low": None, "overhead_high": None}
        row |= _ratio("overhead", seconds, "routed", "dense") if skips_nothing else unmeasured
        row |= _ratio("control", seconds, "control", "ideal")
        row |= {f"{name}_spread": spread(seconds[name]) for name in ("dense", "routed", "ideal")}
        row |= {
            "rounds": len(seconds["routed"]),
            "rounds_s": seconds,
            "keep": executed / dense,
            "flops": executed,
            "dense_flops": dense,
        }
        return row | self.kv_bytes[phase] | self.memory


def batch_cell(subject: Subject, batch: int, path: Path, rate: float | None, new: int) -> Cell:
    """Make the cell of one batch that is prefilled and decoded as it is, its rows going one path or several.

    Raises:
        AdaSkipError: on a uniform path sides answer differently.
    """
    inputs, routed = subject.batch(batch), subject.routed
    if rate is not None:
        keep = spread_out(len(subject.spec.layers), rate, batch, path)
        routed = force(subject, keep)
    dense, side = Side(subject.spec.model, inputs, new), Side(routed, inputs, new)
    memory = peaks(subject, side.prefill, dense.prefill)
    side.settle()
    dense.settle()
    prompt = routed.routing
    keep = prompt.keep.cpu()
    # the control is a second copy of the same cut model: their ratio shows how far equal programs differ by chance
    cut, control = (ideal(subject, inputs, keep, new) for _ in range(2))
    cut.settle()
    control.settle()
    if rate is not None and path == "uniform" and len(cut.parts) == 1:
        _check_same(side.logits, cut.parts[0].logits)
    kv_bytes = {"prefill": _kv_bytes(side, dense)}
    for each in (dense, side):
        each.decode()
    kv_bytes["decode"] = _kv_bytes(side, dense)
    before, after = _spent(prompt), _spent(routed.routing)  # the routing counts on, so what decoding spent is the rest
    for each in (dense, side):
        each.cache.crop(-new)
    return Cell(
        describe(subject, inputs, keep, path if rate is not None else "own", rate),
        {"dense": dense, "routed": side, "ideal": cut, "control": control},
        {"prefill": before, "decode": ((after[0] - before[0]) / new, (after[1] - before[1]) / new)},
        kv_bytes,
        memory,
    )


def describe(
    subject: Subject, inputs: dict[str, Tensor], keep: Tensor, path: str, rate: float | None
) -> dict[str, Any]:
    """Describe what is measured: the model and its inputs, and the decisions (l b) that its rows take."""
    batch, tokens = inputs["input_ids"].shape
    return {
        "backbone": subject.name,
        "group": subject.routed.runtime.group,
        "batch": batch,
        "path": path,
        "paths": len(set(map(tuple, keep.T.tolist()))),
        "skip": rate,
        "tokens": tokens,
    }


def peaks(subject: Subject, routed: Callable[[], Any], dense: Callable[[], Any]) -> dict[str, Any]:
    """Measure the most memory, bytes, that the routed and the dense call held, and name which memory that is.

    Both are called once before, and neither should keep anything.
    """
    device: torch.device = subject.spec.device
    for call in (routed, dense):
        call()
    peak, kind = peak_memory(routed, device)
    return {"peak_bytes": peak, "peak_is": kind, "dense_peak_bytes": peak_memory(dense, device)[0]}


def _kv_bytes(routed: Side, dense: Side) -> dict[str, int]:
    return {"kv_bytes": cache_bytes(routed.cache), "dense_kv_bytes": cache_bytes(dense.cache)}


def _spent(routing: Routing) -> tuple[float, float]:
    assert routing.executed is not None
    assert routing.dense is not None
    return float(routing.executed.sum()), float(routing.dense.sum())


def _width(seconds: Seconds, above: str, below: str) -> float:
    interval = ratio(seconds[above], seconds[below])
    return interval.high - interval.low


def _ratio(name: str, seconds: Seconds, above: str, below: str) -> dict[str, float | None]:
    values = bounded_ratio(seconds[above], seconds[below])
    return dict(zip((name, f"{name}_low", f"{name}_high"), values, strict=True))


def _check_same(routed: Tensor | None, cut: Tensor | None) -> None:
    """Refuse to compare the seconds of two programs whose logits differ."""
    assert routed is not None
    assert cut is not None
    gap, size = (routed - cut).abs().max(), cut.abs().max()
    if gap > (1e-3 if routed.dtype == torch.float32 else 0.1) * size:
        raise AdaSkipError(
            f"bench: routed and physically cut model differ by {float(gap):.2g} in logits up to {float(size):.2g}; "
            "their seconds cannot be compared. Please report this model type"
        )
