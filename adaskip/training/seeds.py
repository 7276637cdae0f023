"""Random draws of training as a pure function of where it stands, so that a resumed run repeats them."""

from __future__ import annotations


def seed_at(seed: int, step: int, micro: int = 0, rank: int = 0, stream: int = 0) -> int:
    """Return a seed for the draws of one kind (``stream``) in one micro-batch of an optimiser step on one rank."""
    mixed = (seed * 1_000_003 + step) * 4096 + rank + 2048 * stream + micro * 0x9E3779B97F4A7C15
    # the large odd factor keeps micro-batches apart from steps; seeds have 64 bits
    return mixed if micro == 0 else mixed % 2**64
