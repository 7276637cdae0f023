"""Routers from bounds against routers trained end to end: accuracy at the same keep rate, and what the training took.

    python scripts/compare_from_bounds.py --out benchmarks/from-bounds.json

For each keep rate and seed three runs follow one another in one process: method from-bounds, method end-to-end, and as
a control end-to-end with fewer steps (``--control``, a share of them), so that what is cheap because it is short can be
told from what is cheap because nothing is back-propagated. A finished run folder is used again. Thresholds hold the
keep rate on validation scans; test scans only report. Seconds are those of the parts ``fit`` and ``train`` of a run;
pricing, threshold and the final check are the same for all and left out. Processor seconds are less moved by whatever
else the machine does.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adaskip.batch import exact_match
from adaskip.recipe import Recipe, load
from adaskip.theory.intervals import paired_difference
from adaskip.training.data import Collator, loader
from adaskip.training.tracking import environment
from adaskip.verbs.run import Run
from adaskip.verbs.splits import records
from adaskip.verbs.train import train


def finished(name: str, method: str, settings: list[str], folder: Path) -> Path:
    """The run folder; trained unless it is there."""
    if not (folder / "summary.json").exists():
        recipe: Recipe = load(
            name, [*settings, f"output={folder}", "tracking.wandb=disabled", "trainer.progress=false"]
        )
        assert recipe.method == method, f"{name}: expected method {method}, got {recipe.method}"
        train(recipe, resume=(folder / "recipe.resolved.yaml").exists())
    return folder


@torch.no_grad()
def answers(folder: Path) -> tuple[Tensor, Tensor, Tensor]:
    """Test questions: whether the routed and the dense answer are right (teacher-forced), and the keep rates."""
    run = Run.open(folder)
    routed, dense, rates = [], [], []
    for batch in loader(records(run.recipe, "test"), Collator(run.processor), 100):
        arguments = batch.arguments()
        routed.append(exact_match(run.model(**arguments).logits, batch.labels))
        rates.append(run.model.routing.keep_rate)
        with run.model.dense():
            dense.append(exact_match(run.model(**arguments).logits, batch.labels))
    return torch.cat(routed).double(), torch.cat(dense).double(), torch.cat(rates).double()


def spent(folder: Path) -> dict[str, float]:
    """Seconds of a run's training parts."""
    parts = json.loads((folder / "summary.json").read_text(encoding="utf-8"))["parts"]
    trained = [parts[name] for name in ("fit", "train") if name in parts]
    return {key: round(sum(part[key] for part in trained), 1) for key in ("seconds", "processor_s")}


def main() -> None:
    """Train, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.6, 0.5])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--control", type=float, default=0.35, help="share of the steps of the short end-to-end run")
    parser.add_argument("--test", type=int, default=3000, help="test questions")
    parser.add_argument("--runs", type=Path, default=Path("runs/from-bounds"))
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--set", nargs="*", default=[], metavar="key.path=value", help="overrides of every recipe")
    args = parser.parse_args()

    steps = round(args.control * load("digits-vlm", args.set).trainer.steps)
    methods = {
        "from-bounds": ("digits-vlm-from-bounds", "from-bounds", []),
        "end-to-end": ("digits-vlm", "end-to-end", []),
        "short": ("digits-vlm", "end-to-end", [f"trainer.steps={steps}"]),
    }
    rows: list[dict[str, Any]] = []
    for keep in args.keep:
        for seed in args.seeds:
            row: dict[str, Any] = {"target_keep": keep, "seed": seed}
            right: dict[str, Tensor] = {}
            for label, (name, method, extra) in methods.items():
                settings = [
                    *args.set,
                    *extra,
                    f"objective.keep={keep}",
                    f"seed={seed}",
                    f"data.examples.test={args.test}",
                ]
                folder = finished(name, method, settings, args.runs / f"{label}-keep{keep}-seed{seed}")
                right[label], dense, rates = answers(folder)
                row["dense"] = float(dense.mean())
                row[label] = {"accuracy": float(right[label].mean()), "keep": float(rates.mean()), **spent(folder)}
                print(keep, seed, label, row[label], flush=True)
            for label in ("from-bounds", "short"):
                found = paired_difference(right["end-to-end"], right[label])
                row[label]["behind_end_to_end"] = [found.estimate, found.low, found.high]
                for key in ("seconds", "processor_s"):
                    row[label][f"share_of_{key}"] = round(row[label][key] / row["end-to-end"][key], 3)
            rows.append(row)
            print(json.dumps(row, indent=1), flush=True)
            if args.out is not None:
                facts = {"questions": args.test, "overrides": args.set, "threads": torch.get_num_threads()}
                found_all = {**facts, "environment": environment(seed, "cpu"), "rows": rows}
                args.out.write_text(json.dumps(found_all, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
