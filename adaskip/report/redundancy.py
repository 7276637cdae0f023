"""The picture of a profile: which layers a group may leave, which of the paper's claims hold, which notions predict."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from adaskip.errors import DataError
from adaskip.report.plots import BLUE, FAINT, GREY, INK, VERDICTS, VERMILION

LABELS = {
    "cosine": "cosine distance",
    "rho": "relative change ρ",
    "proximal": "proximal tail",
    "cka": "1 − linear CKA",
    "svcca": "1 − SVCCA",
    "usable_information_lost": "usable information",
    "code_entropy": "code entropy",
    "attention_mass": "attention mass",
    "value_weighted_mass": "value-weighted mass",
    "key_removal": "key removal (exact)",
    "score": "one backward pass",
    "first_order": "first order",
    "bound": "bound B (calibrated)",
}
PREDICTS = 0.9
"""The rank correlation from which on a notion counts as a predictor in the picture."""


def profile_plot(found: dict[str, Any], path: Path | None = None) -> Figure:
    """Draw one row a token group: exact cost per layer, late entry and early exit, rank correlations; claims below.

    Args:
        found: `Profile.to_dict`.
        path: where to save the PNG.

    Raises:
        DataError: the profile holds no layers.
    """
    if not found.get("layers"):
        raise DataError("profile_plot: the profile holds no layers")
    groups = found["groups"]
    claims = sum(len(group["claims"]) for group in groups.values())
    figure = Figure(figsize=(13, 3.9 * len(groups) + 0.4 + 0.21 * (claims + len(groups))), layout="constrained")
    heights = [3.9] * len(groups) + [0.21 * (claims + len(groups))]
    grid = figure.add_gridspec(len(groups) + 1, 3, height_ratios=heights)
    for place, (name, group) in enumerate(groups.items()):
        rows = [row for row in found["layers"] if row["group"] == name]
        cost, band, rank = (figure.add_subplot(grid[place, column]) for column in range(3))
        _costs(cost, rows, found["tolerance"], name)
        _bands(band, group, found)
        _ranks(rank, group)
    _claims(figure.add_subplot(grid[-1, :]), groups)
    figure.legend(
        handles=[
            Line2D([], [], color=BLUE, linewidth=5, label=f"ρ over layers ≥ {PREDICTS:g}, interval over inputs"),
            Line2D([], [], color=GREY, linewidth=5, label="ρ over layers, fails to predict"),
            Line2D(
                [], [], color=VERMILION, marker="D", linewidth=0, markersize=4, label="ρ over inputs, mean of layers"
            ),
        ],
        frameon=False,
        fontsize=8,
        labelcolor=INK,
        ncols=3,
        loc="outside lower right",
    )
    figure.suptitle(
        f"{found['model']}: {found['n']} inputs, {len(rows)} layers; a skip may cost {found['tolerance']:g} nats "
        f"per predicted token; violations of the chain of bounds: {found['chain_violations']}",
        fontsize=11,
        color=INK,
    )
    if path is not None:
        figure.savefig(path, dpi=110, facecolor="white")
    return figure


def _costs(axes: Axes, rows: list[dict[str, Any]], tolerance: float, group: str) -> None:
    layers = np.array([row["layer"] for row in rows])
    for key, marker, label in (
        ("bound", "^", "bound B, calibrated"),
        ("first_order", "d", "first order"),
        ("key_removal", "+", "vision keys removed"),
    ):
        values = np.array([_end(row.get(key), "estimate") for row in rows])
        if np.isfinite(values).any():
            axes.plot(layers, values, marker, color=GREY, markersize=5, label=label, fillstyle="none", zorder=2)
    values, low, high = (np.array([_end(row["functional"], k) for row in rows]) for k in ("estimate", "low", "high"))
    low, high = np.where(np.isfinite(low), low, values), np.where(np.isfinite(high), high, values)
    for verdict, (color, marker) in VERDICTS.items():
        own = np.array([row["verdict"] == verdict for row in rows])
        axes.vlines(layers[own], low[own], high[own], color=color, linewidth=1.5)
        axes.plot(layers[own], values[own], marker, color=color, markersize=6, zorder=3, label=verdict)
    axes.axhline(tolerance, color=INK, linewidth=1.2, label="tolerance")
    axes.set_yscale("log")
    axes.set_ylim(top=axes.get_ylim()[1] * 30)
    axes.set_xticks(layers[:: max(1, len(layers) // 12)])
    axes.legend(frameon=False, fontsize=7, labelcolor=INK, ncols=2)
    _dress(axes, f"group {group}: exact cost of one skip (nats)", "layer")


def _bands(axes: Axes, group: dict[str, Any], found: dict[str, Any]) -> None:
    accuracy = axes.twinx()
    for name, color, marker, label in (
        ("late_entry", VERMILION, "v", "late entry: absent before layer k"),
        ("early_exit", BLUE, "o", "early exit: absent from layer k on"),
    ):
        rows = group[name]
        ks = [row["k"] for row in rows]
        values = np.array([_end(row["kl"], "estimate") for row in rows])
        axes.plot(ks, np.where(values > 0, values, np.nan), marker=marker, color=color, markersize=4, label=label)
        right = [_end(row["accuracy"], "estimate") for row in rows]
        accuracy.plot(ks, right, color=color, linewidth=1, linestyle=(0, (2, 2)))
    axes.axhline(found["tolerance"], color=INK, linewidth=1.2)
    axes.set_yscale("log")
    accuracy.set_ylim(0, 1.02)
    accuracy.set_ylabel("accuracy (dashed)", color=INK, fontsize=8)
    accuracy.tick_params(labelsize=8, color=GREY, labelcolor=INK)
    accuracy.spines[["top", "left"]].set_visible(False)
    axes.legend(frameon=False, fontsize=7, labelcolor=INK, loc="best")
    _dress(axes, f"bands: exact cost (nats); dense accuracy {found['dense_accuracy']:.3f}", "k")


def _ranks(axes: Axes, group: dict[str, Any]) -> None:
    """Draw Spearman's rho with the exact cost: bars over layers, with intervals; diamonds over inputs."""
    names = [name for name in LABELS if name in group["rank_correlation"]]
    for place, name in enumerate(reversed(names)):
        over_layers, over_inputs = group["rank_correlation"][name], group["rank_correlation_inputs"].get(name)
        if over_layers is None:
            axes.text(0.02, place, "undecided", va="center", fontsize=7, color=GREY)
        else:
            rho = over_layers["estimate"]
            axes.barh(place, rho, color=BLUE if rho >= PREDICTS else GREY, height=0.6, alpha=0.85)
            axes.hlines(place, over_layers["low"], over_layers["high"], color=INK, linewidth=1)
            side = "left" if rho >= 0 else "right"
            axes.text(0.02 if rho >= 0 else -0.02, place, f"{rho:.2f}", va="center", ha=side, fontsize=7, color="white")
        if over_inputs is not None:
            axes.plot(over_inputs, place, "D", color=VERMILION, markersize=4, zorder=3)
    axes.set_yticks(range(len(names)), [LABELS[name] for name in reversed(names)])
    axes.axvline(PREDICTS, color=INK, linewidth=1, linestyle=(0, (3, 2)))
    axes.set_xlim(-1, 1.02)
    _dress(axes, "Spearman's ρ with the exact cost", "")


def _claims(axes: Axes, groups: dict[str, Any]) -> None:
    axes.set_axis_off()
    lines: list[tuple[str, str]] = []
    for name, group in groups.items():
        lines.append((f"group {name}", INK))
        for claim in group["claims"]:
            word, color = {True: ("holds", BLUE), False: ("FAILS", VERMILION), None: ("undecided", GREY)}[
                claim["holds"]
            ]
            figures = "" if claim["estimate"] is None else f": {claim['estimate']:.3g} nats"
            if claim["low"] is not None and claim["high"] is not None:
                figures += f" [{claim['low']:.3g}, {claim['high']:.3g}]"
            about = textwrap.shorten(claim["about"], 60)
            lines.append((f"    {word:9}  {claim['claim']}{figures} (n={claim['n']}; {about})", color))
    for place, (text, color) in enumerate(lines):
        axes.text(
            0, 1 - (place + 0.5) / len(lines), text, color=color, fontsize=8, va="center", transform=axes.transAxes
        )


def _end(interval: dict[str, Any] | None, key: str) -> float:
    value = None if interval is None else interval[key]
    return np.nan if value is None else value


def _dress(axes: Axes, title: str, below: str) -> None:
    axes.set_title(title, loc="left", fontsize=9, color=INK)
    axes.set_xlabel(below, fontsize=8, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(labelsize=8, color=GREY, labelcolor=INK)
    axes.grid(axis="both", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
