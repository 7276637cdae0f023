"""The picture and the table of a comparison: what is recovered of the dense score against what is spent."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from adaskip.errors import DataError
from adaskip.report.plots import FAINT, GREY, INK

AXES = {
    "keep": "executed over dense decoder FLOPs",
    "prefill_ratio": "seconds of prefill over the dense model's",
    "generate_ratio": "seconds of answering over the dense model's",
}
_MARKS = "os^Dv<>Ph*Xd"


def pareto_plot(rows: Sequence[dict[str, Any]], path: Path | None = None) -> Figure:
    """Draw recovery and KL of every policy against FLOPs and measured seconds, one curve a policy.

    Args:
        rows: of `adaskip.compare`.
        path: where to save the PNG.

    Raises:
        DataError: there are none.
    """
    if not rows:
        raise DataError("pareto_plot: the comparison holds no rows")
    policies = [*dict.fromkeys(row["policy"] for row in rows if row["policy"] != "none")]
    figure = Figure(figsize=(13, 7.5), layout="constrained")
    grid = figure.subplots(2, len(AXES), sharex="col", sharey="row", squeeze=False)
    for column, (axis, label) in enumerate(AXES.items()):
        for row, (figure_name, title) in enumerate(
            (("recovery", "recovery: routed over dense score"), ("kl", "KL (nats a token)"))
        ):
            _panel(grid[row, column], rows, policies, axis, figure_name)
            if not column:
                grid[row, column].set_ylabel(title, color=INK)
        grid[1, column].set_yscale("symlog", linthresh=1e-3)
        grid[1, column].set_xlabel(label, color=INK)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=9, labelcolor=INK)
    if path is not None:
        figure.savefig(path, dpi=120, facecolor="white")
    return figure


def _panel(axes: Axes, rows: Sequence[dict[str, Any]], policies: Sequence[str], axis: str, name: str) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK, labelsize=9, color=GREY)
    axes.grid(color=FAINT, linewidth=0.8)
    for place, policy in enumerate(policies):
        points = sorted((row[axis], row[name]) for row in rows if row["policy"] == policy and row[name] is not None)
        if not points:
            continue
        style = f"{_MARKS[place % len(_MARKS)]}-"
        colour = colormaps["tab20"](place * 2 % 20 + place // 10 % 2)  # ten strong ones, then ten pale ones
        axes.plot(*zip(*points, strict=True), style, color=colour, markersize=5, linewidth=1, label=policy)


def comparison_table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    names = {
        "budget": "{:g}", "policy": "{}", "seeds": "{}", "keep": "{:.3f}", "accuracy": "{:.4f}", "recovery": "{:.3f}",
        "kl": "{:.4f}", "token_agreement": "{:.3f}", "prefill_ratio": "{:.2f}", "generate_ratio": "{:.2f}",
    }  # fmt: skip
    lines = ["| " + " | ".join(name.replace("_", " ") for name in names) + " |", "|" + "---|" * len(names)]
    for row in rows:
        values = ("n/a" if row[name] is None else form.format(row[name]) for name, form in names.items())
        lines.append(f"| {' | '.join(values)} |")
    written = [row for row in rows if row["generated"]]
    return "\n".join([*lines, *(["", *_generated(written)] if written else [])]) + "\n"


def _generated(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the lines of a table of what was answered freely."""
    names = [name for name in rows[0]["generated"] if name != "n"]
    titles = ["budget", "policy", "n", *(name.replace("_", " ") for name in names)]
    lines = ["Answers written freely:", "", f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]
    for row in rows:
        found = row["generated"]
        values = ["n/a" if found[name] is None else f"{found[name]:.4f}" for name in names]
        lines.append(f"| {row['budget']:g} | {row['policy']} | {found['n']} | {' | '.join(values)} |")
    return lines
