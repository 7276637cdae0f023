"""The paper's claims about layer skipping, put to this model: each holds, fails, or stays undecided."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from adaskip.theory.intervals import Interval, bonferroni, bootstrap_mean


@dataclass(frozen=True)
class Claim:
    """Hold one claim with what was measured; ``holds`` is None where the interval does not tell."""

    claim: str
    holds: bool | None
    estimate: float | None  # nats per predicted token
    low: float | None
    high: float | None
    threshold: float  # nats per predicted token
    n: int
    about: str  # which layers

    def to_dict(self) -> dict[str, Any]:
        """Return it JSON-ready."""
        return asdict(self)


def judge_claims(
    group: str,
    bands: dict[str, Tensor],
    single: Tensor,
    joint: Tensor,
    sets: dict[str, list[bool]],
    tolerance: float,
    level: float = 0.95,
) -> list[Claim]:
    """Read every claim off exact costs. Intervals are over inputs and hold at once with probability `level`.

    Early and late mean the first and the last third of the layers. What is said of the admissible set is measured on
    inputs that the verdicts have not seen.

    Args:
        group: the tokens that leave layers.
        bands: ``late_entry`` and ``early_exit`` -> (n l+1) exact KL with the group absent before / after k layers.
        single: (m l) exact KL of single skips, on fresh inputs.
        joint: (m) exact KL with all admissible layers skipped at once, on fresh inputs.
        sets: ``admissible`` and ``inadmissible`` by all notions, ``cheap`` admissible by the cheap ones alone: bool per
            layer each.
        tolerance: nats per predicted token that one skipped layer may cost.
        level: of all intervals together.
    """
    layers = single.shape[1]
    third = max(1, layers // 3)
    each = bonferroni(level, 6)
    tokens = "vision tokens" if group == "vision" else "all tokens"

    def at_most(claim: str, values: Tensor, about: str) -> Claim:
        return _claim(claim, values, tolerance, each, about, below=True)

    inside, outside, cheap = (torch.tensor(sets[name]) for name in ("admissible", "inadmissible", "cheap"))
    return [
        at_most(
            f"late layers are redundant for {tokens}: they may leave for good",
            bands["early_exit"][:, layers - third],
            f"{tokens} absent from the last {third} of {layers} layers",
        ),
        at_most(
            f"early layers are redundant for {tokens}: they may enter late",
            bands["late_entry"][:, third],
            f"{tokens} absent from the first {third} of {layers} layers",
        ),
        at_most("one skip inside the admissible set costs at most the tolerance", _of(single, inside), _names(inside)),
        _claim(
            "one skip of an inadmissible layer costs clearly more",
            _of(single, outside),
            tolerance,
            each,
            _names(outside),
        ),
        at_most(
            "a skip that the cheap notions alone admit costs at most the tolerance", _of(single, cheap), _names(cheap)
        ),
        at_most(
            "all admissible layers skipped at once cost at most the tolerance",
            joint if inside.any() else joint[:0],
            _names(inside),
        ),
    ]


def _of(single: Tensor, chosen: Tensor) -> Tensor:
    return single[:, chosen].mean(1) if chosen.any() else single[:0, 0]


def _names(chosen: Tensor) -> str:
    return "layers " + ", ".join(map(str, chosen.nonzero()[:, 0].tolist())) if chosen.any() else "no layer"


def _claim(claim: str, values: Tensor, threshold: float, level: float, about: str, below: bool = False) -> Claim:
    if not len(values):
        return Claim(claim, None, None, None, None, threshold, 0, about)
    interval: Interval = bootstrap_mean(values, level)
    under, over = interval.high <= threshold, interval.low > threshold
    holds = None if not (under or over) else under if below else over
    low, high = (end if math.isfinite(end) else None for end in (interval.low, interval.high))
    return Claim(claim, holds, interval.estimate, low, high, threshold, interval.n, about)
