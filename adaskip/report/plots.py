"""The pictures of a run, as `matplotlib.figure.Figure` objects; no pyplot, no global state.

Every builder returns its figure and, given a path, also saves it as a PNG. Colours are Okabe and Ito's, which
colour-blind readers can tell apart; what colour says is also said by shape.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from adaskip.errors import DataError
from adaskip.sites import Label

Curves = dict[str, np.ndarray]
"""What was logged: name -> float64 (2 n), steps and values."""

BLUE, VERMILION, GREY, INK, FAINT = "#0072B2", "#D55E00", "#7F7F7F", "#333333", "#E4E4E4"
VERDICTS = {"admissible": (BLUE, "o"), "undecided": (GREY, "s"), "inadmissible": (VERMILION, "X")}
NOTIONS = {
    "functional": "functional: exact cost of a skip (nats), and the tolerance",
    "geometric": "geometric: 1 − cos",
    "proximal": "proximal: share of inputs moved beyond the geometric threshold",
    "cross-modal": "cross-modal: share of the text's attention that lies on vision",
}


def keep_heat_map(
    rates: dict[str, list[float]], path: Path | None = None, labels: Sequence[Label] | None = None
) -> Figure:
    """Draw how often each layer, or half of one, ran (0 to 1), one row a kind of input.

    Args:
        rates: kind -> share of its inputs that ran layer 0, 1, ...; all of one length.
        path: where to save the PNG.
        labels: what the columns are called; None: layers.

    Raises:
        DataError: no rates, or kinds of different lengths.
    """
    if len({len(row) for row in rates.values()}) != 1:
        raise DataError("keep_heat_map: expected one rate per layer for every kind, got " + repr(rates)[:60])
    table = np.array(list(rates.values()), dtype=float)
    kinds, layers = table.shape
    figure, (axes,) = _canvas(1.4 + 0.42 * kinds, 1)
    image = axes.imshow(table, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axes.set_yticks(range(kinds), list(rates))
    _layer_axis(axes, labels or range(layers), range(layers))
    axes.tick_params(length=0, labelcolor=INK, labelsize=9)
    axes.set_title("share of inputs that ran the layer", loc="left", fontsize=10, color=INK)
    axes.set_xticks(np.arange(layers + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(kinds + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="minor", length=0)
    axes.spines[:].set_visible(False)
    if layers <= 16:
        for (row, column), rate in np.ndenumerate(table):
            ink = "white" if rate > 0.55 else INK
            axes.text(column, row, f"{rate:.2f}", ha="center", va="center", color=ink, fontsize=8)
    bar = figure.colorbar(image, ax=axes, ticks=[0, 0.5, 1], pad=0.02)
    bar.ax.tick_params(labelcolor=INK, labelsize=9, color=GREY)
    bar.outline.set_visible(False)
    return _saved(figure, path)


def training_plot(curves: Curves, path: Path | None = None) -> Figure:
    """Keep rate against its target, the budget's multiplier, and KL, task loss and bound, over the steps.

    Long curves are shown as they are (faint) and as a running mean over a 40th of their points.
    """
    figure = Figure(figsize=(9, 5.2), layout="constrained")
    grid = figure.subplot_mosaic([["keep", "keep", "multiplier"], ["kl", "task", "bound"]])
    panels: dict[str, tuple[str, dict[str, str]]] = {
        "keep": ("keep rate", {"router/keep_soft": "training", "val/keep": "validation", "router/target": "target"}),
        "multiplier": ("multiplier of the budget", {"router/multiplier": ""}),
        "kl": ("KL to the dense model (nats)", {"train/kl": "training", "val/kl": "validation"}),
        "task": ("task loss (nats)", {"train/task": ""}),
        "bound": ("redundancy bound B (nats)", {"train/bound": ""}),
    }
    for key, (title, names) in panels.items():
        axes = grid[key]
        _tidy(axes)
        axes.set_title(title, loc="left", fontsize=10, color=INK)
        for name in names:
            if name in curves:
                _curve(axes, name, curves[name], names[name])
        if not axes.lines:
            axes.text(0.5, 0.5, "not logged", ha="center", va="center", color=GREY, transform=axes.transAxes)
            axes.set_axis_off()
            continue
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.margins(x=0.03)
        top = max(np.max(line.get_ydata(), initial=0.0) for line in axes.lines)
        axes.set_ylim(0, 1.08 * top or 1)
        if len(axes.get_legend_handles_labels()[0]) > 1:
            axes.legend(frameon=False, fontsize=9, labelcolor=INK)
    figure.supxlabel("step", fontsize=10, color=INK)
    return _saved(figure, path)


def conditions_plot(look: dict[str, Any], path: Path | None = None) -> Figure:
    """Draw one look at the layers: the exact cost and below it each cheap notion, with intervals and thresholds.

    Args:
        look: ``{"findings": [{"layer", "notion", "estimate", "low", "high", "threshold", "verdict"}, ...], ...}``,
            infinite interval ends as None.
        path: where to save the PNG.

    Raises:
        DataError: the look holds no findings.
    """
    notions = [notion for notion in NOTIONS if any(row["notion"] == notion for row in look.get("findings", []))]
    if not notions:
        raise DataError("conditions_plot: the look holds no findings")
    figure, panels = _canvas(0.6 + 1.75 * len(notions), len(notions))
    for notion, axes in zip(notions, panels, strict=True):
        rows = [row for row in look["findings"] if row["notion"] == notion]
        _tidy(axes)
        _notion(axes, rows, logarithmic=notion in ("functional", "geometric"))
        axes.set_title(NOTIONS[notion], loc="left", fontsize=10, color=INK)
    labels = dict.fromkeys(row["layer"] for row in look["findings"])
    _layer_axis(panels[-1], [*labels], [_place(label) for label in labels])
    handles = [
        Line2D([], [], color=color, marker=marker, linewidth=1.5, label=verdict)
        for verdict, (color, marker) in VERDICTS.items()
    ]
    handles.append(Line2D([], [], color=INK, linewidth=1.5, label="threshold"))
    figure.legend(handles=handles, loc="outside upper center", ncols=4, frameon=False, fontsize=9, labelcolor=INK)
    return _saved(figure, path)


def ladder_plot(rungs: Mapping[str, Sequence[float]], labels: Sequence[Label], path: Path | None = None) -> Figure:
    """Draw what one skip of each layer costs, and above it what bounds it, on a logarithmic axis.

    Args:
        rungs: what a rung is called -> nats per predicted token, a value a layer; the exact cost first.
        labels: what the layers are called.
        path: where to save the PNG.

    Raises:
        DataError: rungs of different lengths, or none.
    """
    if {len(values) for values in rungs.values()} != {len(labels)}:
        raise DataError(f"ladder_plot: expected one value for each of {len(labels)} layers, got {rungs!r}"[:200])
    figure, (axes,) = _canvas(3.2, 1)
    _tidy(axes)
    places = [_place(label) for label in labels]
    colors, shapes = (INK, BLUE, VERMILION, GREY), "osD^"
    for number, (name, values) in enumerate(rungs.items()):
        shown = np.maximum(np.asarray(values, dtype=float), 1e-12)  # no cost at all has no place on the axis
        axes.plot(
            places, shown, f"{shapes[number % 4]}-", color=colors[number % 4], markersize=4, linewidth=1, label=name
        )
    axes.set_yscale("log")
    axes.set_title("one skip: nats per predicted token, mean over inputs", loc="left", fontsize=10, color=INK)
    axes.legend(frameon=False, fontsize=9, labelcolor=INK)
    _layer_axis(axes, labels, places)
    return _saved(figure, path)


def _notion(axes: Axes, rows: Sequence[dict[str, Any]], logarithmic: bool) -> None:
    """Draw estimates with intervals and each layer's threshold; logarithmic axes are linear near zero."""
    layers = np.array([_place(row["layer"]) for row in rows], dtype=float)
    width = 0.52 * np.diff(layers).min(initial=1.0)
    limit, value, low, high = (
        np.array([row[key] for row in rows], dtype=float) for key in ("threshold", "estimate", "low", "high")
    )
    shown = np.concatenate([limit, value, high])
    top = 1.15 * max(shown[np.isfinite(shown)].max(initial=0.0), 1e-9)
    if logarithmic:
        linear = max(shown[shown > 0].min(initial=top), top * 1e-4)
        top *= 1.5
        axes.set_yscale("symlog", linthresh=linear, linscale=0.7)
        decades = 10.0 ** np.arange(np.ceil(np.log10(linear)), np.ceil(np.log10(top)))
        axes.yaxis.set_major_locator(FixedLocator([0.0, *decades]))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(lambda number, _: f"{number:g}")
    low, high = np.where(np.isfinite(low), low, 0), np.where(np.isfinite(high), high, top)
    for verdict, (color, marker) in VERDICTS.items():
        own = np.array([row["verdict"] == verdict for row in rows])
        if own.any():
            axes.vlines(layers[own], low[own], high[own], color=color, linewidth=1.5)
            axes.plot(layers[own], value[own], marker, color=color, markersize=5, clip_on=False, zorder=3)
    axes.hlines(limit, layers - width, layers + width, color=INK, linewidth=1.5, zorder=1.5)
    axes.set_xlim(layers.min() - 0.7, layers.max() + 0.7)
    axes.set_ylim(min(0.0, value[np.isfinite(value)].min(initial=0.0)), top)


def _curve(axes: Axes, name: str, curve: np.ndarray, label: str) -> None:
    steps, values = curve[:, np.isfinite(curve[1])]
    if name.startswith("val/"):
        axes.plot(steps, values, "D-", color=VERMILION, markersize=4, linewidth=1, label=label, clip_on=False)
    elif name.startswith("router/target"):
        axes.plot(steps, values, linestyle=(0, (3, 2)), color=INK, linewidth=1.3, label=label)
    else:
        window = np.ones(max(1, len(values) // 40))
        if len(window) > 1:
            axes.plot(steps, values, color=BLUE, linewidth=0.7, alpha=0.3)
            values = np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")
        axes.plot(steps, values, "." if len(values) < 2 else "-", color=BLUE, linewidth=1.8, label=label)


def _canvas(height: float, rows: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(9, height), layout="constrained")
    return figure, list(figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0])


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(colors=INK, labelsize=9, color=GREY)
    axes.grid(axis="y", color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)


def _place(label: Label) -> float:
    """Return where a layer stands on an axis of layers; its halves stand beside one another."""
    layer, _, part = str(label).partition(".")
    return int(layer) + {"attention": -0.25, "mlp": 0.25}.get(part, 0.0)


def _layer_axis(axes: Axes, labels: Sequence[Label], places: Sequence[float]) -> None:
    """Name layers along the axis, where they have halves at the first of these."""
    first: dict[str, float] = {}
    for label, place in zip(labels, places, strict=True):
        first.setdefault(str(label).partition(".")[0], place)
    halves = len(first) < len({*labels})
    every = 1 if len(first) <= 32 else 4
    axes.set_xticks([*first.values()][::every], [*first][::every])
    axes.set_xlabel("layer: its attention, and right of it its MLP" if halves else "layer", color=INK)


def _saved(figure: Figure, path: Path | None) -> Figure:
    if path is not None:
        figure.savefig(path, dpi=144, facecolor="white")
    return figure
