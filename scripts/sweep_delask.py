"""What DeLask does to answers on the demo model: its unpublished coefficient and range swept, written freely.

    python scripts/sweep_delask.py --out benchmarks/delask.json

Test questions of all kinds, greedy: exact match, edit distance, and hallucinated content, digits that are not in the
picture or the question, each beside the dense model's with a 95 % interval paired over questions. It saves no compute.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from adaskip.demo.backbone import load
from adaskip.demo.digits import examples
from adaskip.policies import DeLask
from adaskip.runtime.attach import attach
from adaskip.theory.intervals import paired_difference
from adaskip.training.tracking import environment
from adaskip.verbs.sample import Sample

FIGURES = ("exact", "edit_distance", "hallucinated")


def main() -> None:
    """Sweep, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--per-kind", type=int, default=100, help="test questions of each kind")
    parser.add_argument("--alpha", type=float, nargs="+", default=[0.1, 0.25, 0.5, 1.0])
    parser.add_argument("--first", type=int, nargs="+", default=[6, 9])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    backbone, processor = load()
    records = examples("test", options.per_kind, seed=0)
    sample = Sample(records, processor, 100, torch.device("cpu"))
    rows: list[dict[str, Any]] = []
    for first in options.first:
        for alpha in options.alpha:
            model = attach(backbone, DeLask(alpha=alpha, first=first))
            found = sample(model)
            model.detach()
            row: dict[str, Any] = {
                "first": first,
                "alpha": alpha,
                "same": statistics.fmean(map(_number, found["same"])),
            }
            for name in FIGURES:
                pairs = [*zip(found[name], found[f"dense_{name}"], strict=True)]
                sides = torch.tensor([pair for pair in pairs if None not in pair], dtype=torch.float64)
                gap = paired_difference(sides[:, 0], sides[:, 1])
                row[name] = {"value": float(sides[:, 0].mean()), "dense": float(sides[:, 1].mean()), "n": len(sides)}
                row[name] |= {"more": gap.estimate, "low": gap.low, "high": gap.high}
            rows.append(row)
            told = (f"{name} {row[name]['value']:.3f} (dense {row[name]['dense']:.3f})" for name in FIGURES)
            print(f"first {first}, alpha {alpha:g}: same {row['same']:.3f},", ", ".join(told), flush=True)
    if options.out:
        command = shlex.join(["python", "scripts/sweep_delask.py", *sys.argv[1:]])
        values = {"command": command, "environment": environment(0, "cpu"), "questions": len(records), "rows": rows}
        options.out.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def _number(value: float | None) -> float:
    return 0.0 if value is None else value


if __name__ == "__main__":
    main()
