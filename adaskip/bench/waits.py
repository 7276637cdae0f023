"""How often the host waits for what a GPU computes."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

EVENTS = ("aten::_local_scalar_dense", "aten::nonzero", "cudaStreamSynchronize", "cudaDeviceSynchronize")


def count_waits(call: Callable[[], Any], device: torch.device) -> dict[str, Any]:
    """Run a call three times: to warm up, with torch's warnings of a wait, and under its profiler.

    Returns:
        ``warned``: waits that torch warned of (None on a CPU), ``places`` of them, most frequent first; and how often
        each of `EVENTS` happened, which on a CPU are the same operations without a wait.
    """
    call()
    places: Counter[str] = Counter()
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        waits = [warning for warning in caught if "synchroniz" in str(warning.message)]
        places.update(f"{'/'.join(Path(wait.filename).parts[-3:])}:{wait.lineno}" for wait in waits)
    with torch.profiler.profile(activities=kinds) as profile:
        call()
    counted = {event.key: event.count for event in profile.key_averages()}
    events = {name.removeprefix("aten::"): counted.get(name, 0) for name in EVENTS}
    return {"warned": places.total() if device.type == "cuda" else None, **events, "places": dict(places.most_common())}
