"""Comparing two sides of an inequality in float64."""

from __future__ import annotations

import torch

F64 = torch.float64
RELATIVE = 1e-9  # rounding allowance of a float64 evaluation; no inequality gets more than this


def no_more_than(low, high, slack=1e-25):
    """low <= high up to rounding, and no NaN on either side."""
    return bool((low <= high * (1 + RELATIVE) + slack).all())
