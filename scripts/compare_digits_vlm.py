"""Learned routers against the best static plan of the same compute, on digits-vlm test scans.

    python scripts/compare_digits_vlm.py --group all --keep 0.7 0.5 --out benchmarks/digits-vlm-all.json
    python scripts/compare_digits_vlm.py --group vision --out benchmarks/digits-vlm-vision.json

For each keep rate and seed the shipped recipe is trained (a finished run folder is used again). Static plans are found
on validation scans: greedy layer removal for group ``all``, late entry and early exit for ``vision``; the cheapest plan
that computes at least as much as the routers is the one compared. Test scans only report. Accuracy is the exact match
of whole answers (teacher-forced: right exactly when greedy decoding is right); intervals are paired over questions,
router accuracies averaged over seeds first.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adaskip.batch import exact_match
from adaskip.demo.digits import KINDS
from adaskip.recipe import load
from adaskip.runtime.attach import RoutedModel
from adaskip.survey.search import Scored, Search, best
from adaskip.theory.intervals import bootstrap_mean, paired_difference
from adaskip.training.data import Collator, load_records, loader
from adaskip.training.tracking import environment
from adaskip.verbs.run import Run
from adaskip.verbs.train import train

TEXT_ONLY = ("arithmetic", "repeat")
RECIPES = {"all": "digits-vlm", "vision": "digits-vlm-vision"}


@torch.no_grad()
def answers(
    model: RoutedModel, batches: list[Any], keep: Tensor | None = None, dense: bool = False
) -> dict[str, Tensor]:
    """Per question: whether the answer is right, and the keep rate; under the routers, a fixed keep (l), or densely."""
    right, rates = [], []
    for batch in batches:
        arguments = batch.arguments()
        if dense:
            with model.dense():
                logits = model(**arguments).logits
            rates.append(torch.ones(len(logits)))
        else:
            fixed = None if keep is None else keep[:, None].expand(-1, len(batch))
            logits = model(**arguments, routing=fixed).logits
            rates.append(model.routing.keep_rate)
        right.append(exact_match(logits, batch.labels))
    return {"right": torch.cat(right).double(), "keep": torch.cat(rates).double()}


def by_kind(values: Tensor, kinds: list[str]) -> dict[str, float]:
    """Mean per kind of question."""
    return {k: float(values[torch.tensor([x == k for x in kinds])].mean()) for k in KINDS}


def below_digit(rates: Tensor, kinds: list[str]) -> dict[str, dict[str, Any]]:
    """How much less the questions without a picture keep than `digit`: over all seeds with an interval, and by seed.

    Args:
        rates: keep rates (s n) of each seed and question.
        kinds: of each question, as many of each; two kinds' questions are independent, so any pairing will do.
    """
    found = {}
    digit, *others = (torch.tensor([x == kind for x in kinds]) for kind in ("digit", *TEXT_ONLY))
    for kind, chosen in zip(TEXT_ONLY, others, strict=True):
        less = paired_difference(rates[:, digit].mean(0), rates[:, chosen].mean(0))
        by_seed = (rates[:, digit].mean(1) - rates[:, chosen].mean(1)).tolist()
        found[kind] = {"less": [less.estimate, less.low, less.high], "by_seed": by_seed}
    return found


def trained(group: str, keep: float, seed: int, runs: Path, overrides: list[str]) -> Path:
    """The run folder of one recipe, keep rate and seed; trained unless it is there."""
    folder = runs / f"{group}-keep{keep}-seed{seed}"
    if not (folder / "summary.json").exists():
        settings = [f"objective.keep={keep}", f"seed={seed}", f"output={folder}", "tracking.wandb=disabled"]
        train(load(RECIPES[group], [*overrides, *settings]), resume=(folder / "recipe.resolved.yaml").exists())
    return folder


def static_plans(model: RoutedModel, batches: list[Any], group: str) -> list[Scored]:
    """The best static plan of each amount of compute, by validation accuracy."""
    search = Search(model, batches)
    if group == "all":
        return search.greedy(7)
    return [best(search.bands(absent)) for absent in range(search.layers)]


def main() -> None:
    """Train, search, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--group", choices=RECIPES, default="all")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.7, 0.5])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--per-kind", type=int, default=500, help="test questions of each kind")
    parser.add_argument("--runs", type=Path, default=Path("runs/compare"))
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--set", nargs="*", default=[], metavar="key.path=value", help="overrides of the recipe")
    args = parser.parse_args()

    rows, plans, dense = [], None, None
    for keep in args.keep:
        folders = [trained(args.group, keep, seed, args.runs, args.set) for seed in args.seeds]
        results = []
        for folder in folders:
            run = Run.open(folder)
            collate = Collator(run.processor)
            test = load_records("digits-vlm", "test", args.per_kind * len(KINDS), seed=0)
            batches = [*loader(test, collate, 100)]
            kinds = [record["kind"] for record in test]
            if plans is None:
                validation = load_records("digits-vlm", "validation", 1200, seed=0)
                plans = static_plans(run.model, [*loader(validation, collate, 100)], args.group)
            dense = answers(run.model, batches, dense=True) if dense is None else dense
            results.append(answers(run.model, batches))
            print(
                f"{folder.name}: keep {results[-1]['keep'].mean():.3f} accuracy {results[-1]['right'].mean():.4f}",
                flush=True,
            )
        assert dense is not None
        routed = torch.stack([r["right"] for r in results]).mean(0)
        spent = statistics.fmean(float(r["keep"].mean()) for r in results)
        affordable = [plan for plan in plans if plan.keep >= spent - 0.005]
        rival = min(affordable, key=lambda plan: plan.keep)
        static = answers(run.model, batches, keep=rival.plan.keep(len(run.model.spec.layers)))
        gain, loss = paired_difference(routed, static["right"]), paired_difference(dense["right"], routed)
        rates = torch.stack([r["keep"] for r in results])
        rows.append(
            {
                "target_keep": keep,
                "keep": spent,
                "keep_by_kind": by_kind(rates.mean(0), kinds),
                "keep_below_digit": below_digit(rates, kinds),
                "routed": float(routed.mean()),
                "routed_by_seed": [float(r["right"].mean()) for r in results],
                "routed_by_kind": by_kind(routed, kinds),
                "static": float(static["right"].mean()),
                "static_keep": float(static["keep"].mean()),
                "static_plan": str(rival.plan),
                "dense": float(dense["right"].mean()),
                "dense_by_kind": by_kind(dense["right"], kinds),
                "gain_over_static": [gain.estimate, gain.low, gain.high],
                "loss_to_dense": [loss.estimate, loss.low, loss.high],
                "dense_interval": [bootstrap_mean(dense["right"]).low, bootstrap_mean(dense["right"]).high],
            }
        )
        print(json.dumps(rows[-1], indent=1), flush=True)
    if args.out is not None:
        found = {
            "group": args.group,
            "seeds": args.seeds,
            "questions": len(kinds),
            "overrides": args.set,
            "environment": environment(0, "cpu"),
            "rows": rows,
        }
        args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
