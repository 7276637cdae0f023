"""Verdicts for bands of layers: late entry and early exit, measured from entry to exit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from adaskip.theory.conditions import Finding, Findings, Verdict, judge
from adaskip.theory.prices import Prices
from adaskip.theory.tables import LayerMeasures


@dataclass(frozen=True, order=True)
class Band:
    """Hold neighbouring layers that a group leaves out together, ``first`` to ``last``, both included."""

    first: int
    last: int

    def name(self, layers: int) -> str:
        """Return ``late entry k`` or ``early exit k`` as `SkipPlan` counts, else ``layers first-last``."""
        if self.first == 0:
            return f"late entry {self.last + 1}"
        return f"early exit {self.first}" if self.last == layers - 1 else f"layers {self.first}-{self.last}"


def late_entries(layers: int) -> list[Band]:
    """Return the bands that are absent from the first 1, 2, ... layers; one layer at least stays."""
    return [Band(0, last) for last in range(layers - 1)]


def early_exits(layers: int) -> list[Band]:
    """Return the bands that are absent after the first 1, 2, ... layers."""
    return [Band(first, layers - 1) for first in range(1, layers)]


@dataclass(frozen=True)
class BandFinding:
    """Hold one band, judged."""

    band: Band
    verdict: Verdict
    rows: tuple[Finding, ...]  # `layer` is the band's first

    def to_dict(self, layers: int) -> dict[str, Any]:
        """Return it JSON-ready: the band's name in a model of so many layers, its exact cost, and every notion."""
        cost = next(row for row in self.rows if row.notion == "functional").to_dict()
        figures = {name: cost[name] for name in ("estimate", "low", "high", "threshold", "margin", "n")}
        notions = [row.to_dict() for row in self.rows]
        return {"band": self.band.name(layers), "verdict": self.verdict, **figures, "notions": notions}


def judge_bands(
    measured: LayerMeasures,
    bands: Sequence[Band],
    prices: Prices,
    group: str,
    tolerance: float,
    level: float = 0.95,
    looks: int = 1,
) -> list[BandFinding]:
    """Read the four notions of every band against the tolerance, which speaks of the whole band.

    Args:
        measured: from `measure_bands`, on inputs that the prices were not calibrated on.
        bands: the same, in the same order.
        prices: `calibrate_prices` of the same bands on other inputs.
        group: the tokens that leave.
        tolerance: nats per predicted token that the band may cost.
        level: that all intervals of all bands and looks hold at once (Bonferroni).
        looks: how often this question is asked.
    """
    findings: Findings = judge(measured, prices, group, tolerance, level, looks)
    judged = []
    for column, band in enumerate(bands):
        rows = tuple(replace(row, layer=band.first) for row in findings.rows if row.layer == column)
        judged.append(BandFinding(band, findings.verdict(column), rows))
    return judged
