"""Write the tables and the picture of docs/theory.md from benchmarks/theory.json: python scripts/theory_tables.py"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"(<!-- measured -->\n).*?(<!-- /measured -->)", re.DOTALL)
STYLES = {  # name -> colour, line style
    "exact KL": ("#333333", "-"),
    "two-point bound": ("#0072B2", "-"),
    "Bennett bound": ("#56B4E9", "--"),
    "u": ("#E69F00", ":"),
    "r²/8": ("#7F7F7F", ":"),
    "lower bound": ("#009E73", "-."),
    "s²/2 (estimator)": ("#CC79A7", "-"),
    "calibrated bound": ("#D55E00", "--"),
}


def picture(groups: dict[str, Any], path: Path) -> None:
    """Per layer the exact KL of skipping it and each bound on it, means over tokens; a panel a group."""
    figure = Figure(figsize=(5.2 * len(groups), 4.2), layout="constrained")
    for axes, (group, found) in zip(
        np.atleast_1d(figure.subplots(1, len(groups), sharey=True)), groups.items(), strict=True
    ):
        for name, values in found["slack"]["per_layer"].items():
            colour, style = STYLES[name]
            thick = 2.4 if name == "exact KL" else 1.3
            axes.plot(values, style, color=colour, label=name, linewidth=thick, marker="." if thick > 2 else None)
        axes.set_yscale("log")
        axes.set_title(f"skipping one layer, group {group}", fontsize=10)
        axes.set_xlabel("layer")
        axes.grid(color="#E4E4E4", linewidth=0.6)
        axes.set_axisbelow(True)
    figure.axes[0].set_ylabel("nats per predicted token (mean)")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, loc="outside right center")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def tables(found: dict[str, Any]) -> str:
    """The measured part of docs/theory.md."""
    lines = [
        f"{found['examples']} test questions; routers of "
        + ("a given run." if found["steps"] is None else f"{found['steps']} training steps."),
        "",
        "| group | bound | median over exact KL | 1 % | 99 % | violated |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for group, part in found["groups"].items():
        for name, r in part["slack"]["over_exact"].items():
            broken = (
                r["violated"] if r["violated"] is not None else f"no bound: below on {100 * r['below_exact']:.0f} %"
            )
            lines.append(f"| {group} | {name} | {r['median']:.3g} | {r['q01']:.3g} | {r['q99']:.3g} | {broken} |")
    lines += [
        "",
        "| group | certificate | inputs x layers covered | of those unchanged | false |",
        "| --- | --- | --- | --- | --- |",
    ]
    for group, part in found["groups"].items():
        for name, c in part["certificates"].items():
            if isinstance(c, dict):
                lines.append(f"| {group} | {name} | {c['covered']:.3f} | {c['of_unchanged']:.3f} | {c['false']} |")
    lines += [
        "",
        "| group | per layer (law says) | smallest p | all layers, each at α | at α/L | by the maximum (p) "
        "| other scans: worst layer |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for group, part in found["groups"].items():
        c = part["constants"]
        top = c["joint_by_maximum"]
        lines.append(
            f"| {group} | {c['mean']:.4f} ({c['expected']:.4f}) | {c['smallest_law_p']:.2g} | "
            f"{c['joint_of_per_layer_constants']:.3f} | {c['joint_at_alpha_over_L']:.3f} | "
            f"{top['mean']:.4f} ({top['law_p']:.2g}) | {min(c['other_split']['covered']):.3f} |"
        )
    lines += [
        "",
        "| keep | joint KL | κ | κB covers (law says) | κB over KL, median | scaled G over KL, median "
        "| ρ of B | ρ of G | certified by κB (false) | unchanged |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for d in found["decisions"]:
        c = d["coverage"]
        lines.append(
            f"| {d['keep']:.3f} | {d['kl']:.4f} | {d['kappa']:.3g} | {c['mean']:.4f} ({c['expected']:.4f}) | "
            f"{d['slack']['median']:.3g} | {d['gate_matrix_slack']:.3g} | {d['rho_B']:.2f} | "
            f"{d['rho_gate_matrix']:.2f} | {d['certified']:.3f} ({d['false']}) | {d['unchanged']:.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Draw, and replace the block between the two comments."""
    found = json.loads((ROOT / "benchmarks" / "theory.json").read_text(encoding="utf-8"))
    picture(found["groups"], ROOT / "docs" / "images" / "chain.png")
    document, shown = ROOT / "docs" / "theory.md", tables(found)
    text = document.read_text(encoding="utf-8")
    document.write_text(BLOCK.sub(lambda block: block[1] + shown + "\n" + block[2], text), encoding="utf-8")


if __name__ == "__main__":
    main()
