"""`adaskip bench`: what skipping saves, against the dense model and against the same layers physically cut out."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, get_args

import torch

from adaskip.bench.cell import PHASES, Phase, batch_cell
from adaskip.bench.forced import Path
from adaskip.bench.many import many_cell
from adaskip.bench.rounds import Seconds
from adaskip.bench.subject import Subject
from adaskip.errors import ConfigError

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
    different: int = 4,
    progress: Progress = lambda text, share: None,
    phases: Sequence[Phase] = PHASES,
) -> list[dict[str, Any]]:
    """Measure every batch size, path and skip rate, prefill and decode apart.

    Dense, routed, ideal and a second ideal (the control) take turns in one process, forth and back. Routers pool,
    think and decide in the routed time; what they decide is laid down beforehand.

    Args:
        subject: the model.
        skips: shares of the layers left out; None: what trained routers decide on the inputs themselves.
        batches: rows.
        paths: ``uniform``: all rows leave out the same layers; ``mixed``: each row others, equally many; ``many``:
            the rows are prompts of `generate_many` that go a few different paths, and the ideal decodes each path's
            prompts as one batch (layers are left out for group ``all``).
        new: tokens written per decode turn.
        budget: seconds for the rounds of all rows together; what one does not need is left to the later ones.
        width: rounds go on until the 95 % interval of efficiency (of overhead, too, where nothing is skipped) is
            narrower than this.
        different: paths that the prompts of ``many`` go, wherever something is skipped.
        progress: hears what is being done and the share that is done.
        phases: ``prefill``, ``decode`` or both, measured in the order given.

    Returns:
        One row per batch size, path, skip rate and phase. ``*_s``: medians over rounds, seconds of one prefill or of
        one decoding step; ``*_spread``: quartiles; ratios are geometric means over paired rounds with ``_low`` and
        ``_high`` of their 95 % bootstrap interval (None where rounds were too few): ``speedup`` dense over routed,
        ``ideal_speedup`` dense over ideal, ``efficiency`` ideal over routed, ``overhead`` routed over dense where
        nothing is skipped, ``control`` ideal over ideal. ``flops`` and ``kv_bytes``: what the routed batch spent in the
        phase, and holds after it; ``dense_*`` likewise. ``rounds_s``: seconds of every side, round by round.

    Raises:
        ConfigError: an option that cannot be measured; all faults at once.
        AdaSkipError: routers cannot be made to decide, or sides compute different things.
    """
    faults = _faults(subject, skips, batches, paths, new, different, phases)
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
        if path == "many":
            assert rate is not None
            cell = many_cell(subject, batch, different, rate, new)
        else:
            cell = batch_cell(subject, batch, path, rate, new)
        for place, phase in enumerate(phases):
            left = len(phases) * (len(cells) - number) - place
            share = max(0.0, end - time.perf_counter()) / left

            def told(
                seconds: Seconds, done: int = len(phases) * len(cells) - left, what: str = f"{phase}, {name}"
            ) -> None:
                progress(f"{what}: round {len(seconds['routed'])}", done / (len(phases) * len(cells)))

            rows.append(cell.measure(phase, share, width, told))
        del cell  # its caches would count as memory of the next one
    return rows


def _faults(
    subject: Subject,
    skips: Sequence[float] | None,
    batches: Sequence[int],
    paths: Sequence[Path],
    new: int,
    different: int,
    phases: Sequence[Phase],
) -> list[str]:
    routed, layers = subject.routed.runtime, len(subject.spec.layers)
    left = {rate: round(rate * layers) for rate in skips or () if 0 <= rate < 1}
    faults = [f"--skip: expected shares in [0, 1), got {x:g}" for x in skips or () if x not in left]
    faults += [f"--skip {x:g}: leaves no layer of {layers}" for x, out in left.items() if out == layers]
    faults += [f"--batch: expected whole numbers >= 1, got {x}" for x in batches if x < 1]
    kinds = get_args(Path)
    faults += [f"--path: expected {' | '.join(kinds)}, got {x!r}" for x in paths if x not in kinds]
    if not phases or len(set(phases)) < len(phases) or not set(phases) <= set(PHASES):
        faults.append(f"--phase: expected prefill, decode or both, got {','.join(phases)!r}")
    faults += [f"--new: expected a whole number >= 1, got {new}"] if new < 1 else []
    faults += [f"--paths: expected a whole number >= 1, got {different}"] if different < 1 else []
    if (routed.scope, routed.unit, routed.kv) != ("prompt", "block", "absent"):
        faults.append(
            f"routers of scope {routed.scope!r}, unit {routed.unit!r} and kv {routed.kv!r} leave no layer as a whole, "
            "so there is no model to cut out for comparison; expected scope prompt, unit block, kv absent. "
            "`adaskip eval` measures their seconds beside the dense model's"
        )
    if "many" in paths:
        if skips is None:
            faults.append("--path many: trained routers go as many paths as they like; say which share --skip leaves")
        if routed.group == "vision":
            faults.append("--path many: without vision no layer is left out of decoding; expected --group all")
        faults += [
            f"--paths {different}: expected at least so many prompts, got --batch {x}"
            for x in batches
            if 1 < x < different and any(left.values())
        ]
        faults += [
            f"--paths {different}: {out} of {layers} layers can be left out in {math.comb(layers, out)} ways only"
            for out in left.values()
            if 0 < out < layers and math.comb(layers, out) < different
        ]
    return faults


def _paths(paths: Sequence[Path], batch: int, skips: Sequence[float] | None) -> Sequence[Path]:
    """One row has one path, and trained routers have theirs."""
    if skips is None:
        return ("mixed",)
    return ("uniform",) if batch == 1 else paths
