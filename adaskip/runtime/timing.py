"""Measure the seconds and the memory of a call, and the bytes of a cache."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_PEAK = re.compile(r"^VmHWM:\s*(\d+) kB$", re.MULTILINE)


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """Return a call's result and its wall-clock seconds, the device's work included."""
    start = clock()
    result = call()
    return result, clock() - start


def clock() -> float:
    """Return wall-clock seconds, once every GPU in use has done all it was given."""
    if torch.cuda.is_available():
        for device in range(torch.cuda.device_count()):
            if torch.cuda.memory_reserved(device):  # one that nothing lies on would only be woken
                torch.cuda.synchronize(device)
    return time.perf_counter()


def peak_memory(call: Callable[[], Any], device: torch.device) -> tuple[int | None, str]:
    """Return the most memory in use while a call ran, in bytes, and which memory that is.

    On CUDA what torch had allocated on ``device``; on a CPU the resident set of the whole process, weights and whatever
    else it holds included (None where the system does not let a process reset its peak: this needs Linux).
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device), "allocated on the GPU"
    try:
        _CLEAR.write_text("5")  # resets the peak of the resident set
    except OSError:
        return None, "resident set (not told by this system)"
    call()
    match = _PEAK.search(_STATUS.read_text(encoding="utf-8"))
    return int(match[1]) * 1024 if match else None, "resident set of the process"


def cache_bytes(cache: Any) -> int:
    """Return the bytes of the keys and values that a cache holds."""
    if hasattr(cache, "nbytes"):
        size: int = cache.nbytes()
        return size
    return sum(x.numel() * x.element_size() for layer in cache.layers for x in (layer.keys, layer.values))
