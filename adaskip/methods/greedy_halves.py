"""Greedy by exact costs over halves of layers: always the attention or the MLP that costs least beside what is gone."""

from __future__ import annotations

from dataclasses import replace

from adaskip.methods import greedy
from adaskip.methods.evidence import Evidence
from adaskip.survey.greedy import Path
from adaskip.survey.refine import refine_path


def choose(evidence: Evidence, keep: float, seed: int) -> Path:
    """Return greed's plan, with what need not go given back, and halves exchanged with others where that helps."""
    path = greedy.choose(evidence, keep, seed)
    if not path:
        return path
    cost = float(evidence.costs([path], evidence.everyone).mean())
    return refine_path(
        evidence.costs,
        evidence.everyone,
        (path, cost),
        evidence.single,
        evidence.layers,
        lambda path: evidence.holds(path, keep),
        evidence.saves,
    )[0]


METHOD = replace(
    greedy.METHOD,
    name="greedy_halves",
    title="greedy by exact KL over halves of layers",
    source="after arXiv 2402.09025",
    choose=choose,
    unit="sublayers",
    ours="the cost is the KL from the dense model, and half a layer goes at a time where published are whole ones; "
    "halves are exchanged in the end",
)
