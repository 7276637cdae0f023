"""Rank correlation of a cheap notion with what a skip really costs, over layers and over inputs."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from adaskip.theory.intervals import Interval
from adaskip.theory.measures import spearman

RANKS = 0.7
"""The rank correlation from which on a notion is said to rank."""


def describe_ranks(layers: Mapping[str, float | None], inputs: Mapping[str, float | None]) -> str:
    """Say in a sentence which notions rank layers, and which rank inputs, by the cut `RANKS`.

    Args:
        layers: notion -> rho over layers with the exact cost; None or NaN: undecided.
        inputs: notion -> mean rho over inputs at one layer.

    >>> describe_ranks({"cosine": 0.731, "rho": 0.47}, {"cosine": 0.1, "rho": 0.3})
    'ranks layers: cosine .73; none ranks inputs (best: rho .30); cut: .70'
    """
    return f"{_ranking('layers', layers)}; {_ranking('inputs', inputs)}; cut: {_short(RANKS)}"


def _ranking(what: str, notions: Mapping[str, float | None]) -> str:
    known = {name: rho for name, rho in notions.items() if rho is not None and math.isfinite(rho)}
    ordered = sorted(known, key=known.__getitem__, reverse=True)
    good = [f"{name} {_short(known[name])}" for name in ordered if known[name] >= RANKS]
    if good:
        return f"ranks {what}: {', '.join(good)}"
    best = f"best: {ordered[0]} {_short(known[ordered[0]])}" if ordered else "undecided"
    return f"none ranks {what} ({best})"


def _short(rho: float) -> str:
    """Write two digits, without the 0 before the point."""
    return f"{rho:.2f}".replace("0.", ".", 1)


def rank_over_layers(
    notion: Tensor, cost: Tensor, level: float = 0.95, resamples: int = 400, seed: int = 0
) -> Interval | None:
    """Return Spearman's rho over layers between the mean notion and the mean exact cost; estimator.

    The interval is the percentile bootstrap over inputs, for these very layers: it says how sure the ranks are, not how
    another model would rank. Inputs where either is NaN are left out. (n l) twice.

    Returns:
        None where it is undecided: fewer than 3 layers, no input, or a notion that is the same at every layer.

    >>> interval = rank_over_layers(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[1.0, 4.0, 9.0]]))
    >>> interval.estimate, interval.n
    (1.0, 1)
    """
    both = (notion.isfinite() & cost.isfinite()).all(1)
    x, y = notion[both].double(), cost[both].double()
    if not len(x) or x.shape[1] < 3:
        return None
    estimate = spearman(x.mean(0), y.mean(0))
    if math.isnan(estimate):
        return None
    draw = torch.Generator().manual_seed(seed)
    # a resample of inputs is a row of counts, and its mean over inputs a product with them
    weights = torch.stack(
        [torch.bincount(torch.randint(len(x), (len(x),), generator=draw), minlength=len(x)) for _ in range(resamples)]
    ).double()
    again = torch.tensor([spearman(a, b) for a, b in zip(weights @ x, weights @ y, strict=True)], dtype=torch.float64)
    again = again[~again.isnan()]
    tail = (1.0 - level) / 2.0
    low, high = again.quantile(torch.tensor([tail, 1.0 - tail], dtype=torch.float64)).tolist()
    return Interval(estimate, min(low, estimate), max(high, estimate), len(x))


def rank_over_inputs(notion: Tensor, cost: Tensor) -> float | None:
    """Return Spearman's rho over inputs at one layer, mean over layers; estimator. (n l) twice.

    It asks whether the notion tells inputs apart, which a router must. None where no layer has three inputs that
    differ in both.
    """
    correlations = []
    for x, y in zip(notion.T, cost.T, strict=True):
        both = x.isfinite() & y.isfinite()
        if both.sum() >= 3 and not math.isnan(rho := spearman(x[both], y[both])):
            correlations.append(rho)
    return sum(correlations) / len(correlations) if correlations else None
