"""Make the rows of a comparison: seeds averaged, intervals paired over inputs, and who stands on the Pareto front."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from adaskip.theory.intervals import bootstrap_mean, paired_difference
from adaskip.theory.notions import plain
from adaskip.verbs.cells import Cell

PHASES = ("prefill", "generate")
"""Which calls of a cell seconds were taken of."""
TOLERANCE = 0.005
"""Keep rates so near to one another count as equal."""


def standings(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Return one row a policy and budget, by budget and then by cost.

    ``loss_to_dense`` is how many more answers the dense model has right, ``recovery`` the share of its right answers,
    ``kl`` nats per predicted token; the last two are None where they are not defined. ``front`` says whether no other
    row that keeps as little costs less, ``front_prefill`` and ``front_generate`` whether no other that took as few
    seconds does. ``rival`` is the other policy that costs least, each by its lightest plan that keeps no less. Losses
    and the differences from the rival, ``kl_less`` and ``accuracy_more``, are paired over inputs, with 95 % intervals.
    """
    groups: dict[tuple[float, str], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.budget, cell.policy), []).append(cell)
    rows = [_row(budget, policy, members) for (budget, policy), members in groups.items()]
    finite = [row for row in rows if row["kl"] is not None]
    for row in finite:
        row["front"] = not any(
            other["kl"] < row["kl"] and other["keep"] <= row["keep"] + TOLERANCE for other in finite if other is not row
        )
        for name in PHASES:
            row[f"front_{name}"] = not any(
                other["kl"] < row["kl"] and other[f"{name}_ratio"] <= row[f"{name}_ratio"] for other in finite
            )
        _beside(row, [other for other in finite if other["policy"] not in (row["policy"], "none")], groups)
    return sorted(rows, key=lambda row: (-row["budget"], row["kl"] is None, row["kl"] or 0.0))


def _row(budget: float, policy: str, cells: Sequence[Cell]) -> dict[str, Any]:
    first = cells[0]
    means = {name: float(_mean(cells, name).mean()) for name in ("keep", "kl", "hit", "dense_hit", "same")}
    ratios = {
        f"{name}_ratio": statistics.fmean(cell.seconds[name] / cell.seconds[f"dense_{name}"] for cell in cells)
        for name in PHASES
    }
    return {
        "policy": policy,
        "budget": budget,
        "seeds": len(cells),
        "n": len(first.kind),
        "keep": means["keep"],
        "accuracy": means["hit"],
        "accuracy_interval": plain(bootstrap_mean(_mean(cells, "hit"))),
        "dense_accuracy": means["dense_hit"],
        "dense_interval": plain(bootstrap_mean(_mean(cells, "dense_hit"))),
        "loss_to_dense": plain(paired_difference(_mean(cells, "dense_hit"), _mean(cells, "hit"))),
        "recovery": means["hit"] / means["dense_hit"] if means["dense_hit"] else None,
        "kl": _finite(means["kl"]),
        "token_agreement": means["same"],
        **ratios,
        "generated": _generated(cells),
        "plans": [cell.plan for cell in cells],
        "by_seed": [
            {"seed": cell.seed} | {name: _finite(_mean([cell], name).mean()) for name in ("keep", "hit", "kl")}
            for cell in cells
        ],
        "kinds": _kinds(cells),
        "front": False,
        **{f"front_{name}": False for name in PHASES},
        "rival": None,
    }


def _kinds(cells: Sequence[Cell]) -> dict[str, dict[str, Any]]:
    """Return accuracy, KL and keep rate of each kind of input, the last with an interval and by seed."""
    names, kinds = cells[0].kind, sorted({*cells[0].kind})
    chosen = {kind: torch.tensor([name == kind for name in names]) for kind in kinds}
    return {
        kind: {name: _finite(_mean(cells, name)[mask].mean()) for name in ("hit", "dense_hit", "kl", "keep")}
        | {
            "keep_interval": plain(bootstrap_mean(_mean(cells, "keep")[mask])),
            "keep_by_seed": [float(_mean([cell], "keep")[mask].mean()) for cell in cells],
        }
        for kind, mask in chosen.items()
    }


def _generated(cells: Sequence[Cell]) -> dict[str, float | int | None]:
    """Return means over the inputs that were answered freely, and over seeds; nothing where none was."""
    answered = [cell.generated for cell in cells if cell.generated]
    if not answered:
        return {}
    found: dict[str, float | int | None] = {"n": len(answered[0]["exact"])}
    for name in answered[0]:
        known = [value for figures in answered for value in figures[name] if value is not None]
        found[name] = statistics.fmean(known) if known else None
    return found


def _beside(row: dict[str, Any], others: Sequence[dict[str, Any]], groups: dict[tuple[float, str], list[Cell]]) -> None:
    nearest: dict[str, dict[str, Any]] = {}  # of each other policy its lightest row that keeps no less
    for other in sorted(others, key=lambda other: -float(other["keep"])):
        if other["keep"] >= row["keep"] - TOLERANCE:
            nearest[other["policy"]] = other
    if not nearest:
        return
    rival = min(nearest.values(), key=lambda other: float(other["kl"]))
    own, its = groups[row["budget"], row["policy"]], groups[rival["budget"], rival["policy"]]
    row["rival"], row["rival_keep"] = rival["policy"], rival["keep"]
    row["kl_less"] = plain(paired_difference(_mean(its, "kl"), _mean(own, "kl")))
    row["accuracy_more"] = plain(paired_difference(_mean(own, "hit"), _mean(its, "hit")))


def _finite(value: Tensor | float) -> float | None:
    """Return a number that JSON can hold, or None: a skipped path may overflow."""
    return float(value) if math.isfinite(value) else None


def _mean(cells: Sequence[Cell], name: str) -> Tensor:
    """Return the mean over seeds of one figure of every input, float64 (n)."""
    return torch.tensor([getattr(cell, name) for cell in cells], dtype=torch.float64).mean(0)
