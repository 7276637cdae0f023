"""Verdicts for bands of layers: late entry and early exit, measured from entry to exit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from adaskip.batch import Batch
from adaskip.errors import ConfigError
from adaskip.runtime.attach import RoutedModel
from adaskip.survey.crossmodal import read_attention
from adaskip.theory import measures
from adaskip.theory.conditions import Finding, Findings, Verdict, judge
from adaskip.theory.costs import compare
from adaskip.theory.prices import Prices
from adaskip.theory.tables import LayerMeasures


@dataclass(frozen=True, order=True)
class Band:
    """Neighbouring layers that a group leaves out together, ``first`` to ``last``, both included."""

    first: int
    last: int

    def name(self, layers: int) -> str:
        """``late entry k`` or ``early exit k`` as `SkipPlan` counts, else ``layers first-last``."""
        if self.first == 0:
            return f"late entry {self.last + 1}"
        return f"early exit {self.first}" if self.last == layers - 1 else f"layers {self.first}-{self.last}"


def late_entries(layers: int) -> list[Band]:
    """Absent from the first 1, 2, ... layers; one layer at least stays."""
    return [Band(0, last) for last in range(layers - 1)]


def early_exits(layers: int) -> list[Band]:
    """Absent after the first 1, 2, ... layers."""
    return [Band(first, layers - 1) for first in range(1, layers)]


@torch.no_grad()
def measure_bands(
    model: RoutedModel, batches: Iterable[Batch], bands: Sequence[Band], attention: bool = False
) -> LayerMeasures:
    """What `profile.measure` reads of layers, of bands: column i is band i, its states those at entry and at exit.

    The single layers of a band say little about it: cosine distances may grow like the square of its length (link 6b),
    and costs neither add up nor bound one another. Costs a dense pass a batch and a suffix from its entry per band.
    ``mass`` is the mean over the band's layers.

    Raises:
        ConfigError: no band, or one outside the model.
    """
    n_layers = len(model.spec.layers)
    if not bands or any(not 0 <= band.first <= band.last < n_layers for band in bands):
        raise ConfigError(f"bands: expected bands within layers 0 to {n_layers - 1}, got {list(bands)}")
    rows: list[dict[str, Tensor]] = []
    for batch in batches:
        states: list[Tensor] = []
        groups: list[Tensor] = []

        def watch(index: int, before: Tensor, after: Tensor) -> None:
            states.extend([after] if states else [before, after])  # noqa: B023 - read within this very batch
            groups.append(model.group_mask())  # noqa: B023

        arguments = batch.arguments()
        reading = read_attention(model, model.read_tokens(batch.inputs)) if attention else nullcontext()
        with model.dense(), model.observe(watch), reading as read:
            dense = model(**arguments).logits
        found: dict[str, list[Tensor]] = {name: [] for name in ("cosine", "rho", "mass", "kl", "s", "u")}
        for band in bands:
            entry, leave = states[band.first], states[band.last + 1]
            found["cosine"].append(measures.cosine_distance(entry, leave, groups[0]))
            found["rho"].append(measures.relative_change(entry, leave, groups[0]))
            span = slice(band.first, band.last + 1)
            found["mass"].append(torch.zeros_like(found["rho"][-1]) if read is None else read.mass[:, span].mean(1))
            keep = torch.ones(n_layers, len(dense), dtype=torch.bool, device=dense.device)
            keep[span] = False
            with model.replay(states[: band.first + 1]):
                out = model(**arguments, routing=keep, use_cache=False)
            for name, value in compare(dense, out.logits, batch.supervised).items():
                found[name].append(value)
        rows.append({name: torch.stack(values, 1).float().cpu() for name, values in found.items()})
    names = [f.name for f in fields(LayerMeasures) if f.name != "layers"]
    columns = {name: torch.cat([row[name] for row in rows]) for name in names}
    return LayerMeasures(tuple(range(len(bands))), **columns)


@dataclass(frozen=True)
class BandFinding:
    """One band, judged."""

    band: Band
    verdict: Verdict
    rows: tuple[Finding, ...]  # `layer` is the band's first

    def to_dict(self, layers: int) -> dict[str, Any]:
        """JSON-ready: the band's name in a model of so many layers, its exact cost, and every notion."""
        cost = next(row for row in self.rows if row.notion == "functional").to_dict()
        told = {name: cost[name] for name in ("estimate", "low", "high", "threshold", "margin", "n")}
        notions = [row.to_dict() for row in self.rows]
        return {"band": self.band.name(layers), "verdict": self.verdict, **told, "notions": notions}


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
    found: Findings = judge(measured, prices, group, tolerance, level, looks)
    judged = []
    for column, band in enumerate(bands):
        rows = tuple(replace(row, layer=band.first) for row in found.rows if row.layer == column)
        judged.append(BandFinding(band, found.verdict(column), rows))
    return judged
