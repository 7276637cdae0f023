"""Does the redundancy bound help routers? Train them with several of its weights and seeds, all to one keep rate.

    python scripts/compare_bound_weights.py --price functional --steps 150 --out benchmarks/bound_weights.json

Every run is the shipped recipe of digits-vlm without a static plan and without held layers. Its routers are read on
test questions at the threshold that holds the budget on validation: accuracy, KL to the dense model, the share of skips
on layers that were found admissible, how B ranks and how loose kappa B is (half of the questions calibrates kappa, the
other half is told), and the share of inputs whose every argmax kappa B certifies. Runs that ``--folder`` holds are not
trained again.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adaskip.recipe import load
from adaskip.survey.dense_costs import price_inputs
from adaskip.survey.record import record
from adaskip.theory.bounds import argmax_kl_limit
from adaskip.theory.conditions import judge_joint
from adaskip.theory.costs import per_input
from adaskip.training.data import Collator, loader
from adaskip.training.looks import joint_cost
from adaskip.training.tracking import environment
from adaskip.verbs.prices import read_prices
from adaskip.verbs.run import Run
from adaskip.verbs.splits import records
from adaskip.verbs.train import train

FIXED = ["static.width=0", "conditions.hold_above=null", "tracking.wandb=disabled", "trainer.progress=false"]


@torch.no_grad()
def judge(folder: Path, inputs: int) -> dict[str, float]:
    """Read a finished run on test questions."""
    run = Run.open(folder)
    model, alpha = run.model, run.recipe.objective.alpha
    batches = [*loader(records(run.recipe, "test")[:inputs], Collator(run.processor), 60)]
    costs = price_inputs(model, batches, read_prices(folder))
    found = joint_cost(model, batches, costs)
    kl, bound = found["kl"].double(), found["bound"].double()
    joint = judge_joint(kl, bound, found["keep"], {}, alpha)
    right, rates, limits, tokens, same = [], [], [], [], []
    for batch in batches:
        dense, routed = record(model, batch, states=False), record(model, batch, routed=True, states=False)
        rates.append(model.routing.keep_rate)
        right.append(routed.match(routed.logits))
        where = batch.supervised
        limits.append(-per_input(-argmax_kl_limit(dense.logits.double()), where, "max"))
        agrees = (dense.logits.argmax(-1) == routed.logits.argmax(-1)).double()
        same.append(per_input(agrees, where, "mean") == 1)
        tokens.append(where.sum(1))

    def told(values: list[Tensor]) -> Tensor:
        return torch.cat(values)[len(kl) // 2 :]

    # each token's KL is at most the sum of all of them
    claims = joint.kappa * bound[len(kl) // 2 :] * told(tokens) < told(limits)
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return {
        "accuracy": float(torch.cat(right).double().mean()),
        "kl": float(kl.mean()),
        "keep": float(torch.cat(rates).mean()),
        "admissible_skips": summary["conditions"]["joint"]["admissible_skips"],
        "spearman": joint.spearman,
        "slack_median": joint.slack_median,
        "slack_90": joint.slack_90,
        "coverage": joint.coverage,
        "coverage_p": joint.coverage_p,
        "certified": float(claims.double().mean()),
        "certified_falsely": int((claims & ~told(same)).sum()),
        "unchanged": float(told(same).double().mean()),
    }


def main() -> None:
    """Train, judge, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--price", default="functional")
    parser.add_argument("--weights", type=float, nargs="+", default=[0.0, 0.01, 0.1])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--inputs", type=int, default=1200, help="test questions")
    parser.add_argument("--folder", type=Path, help="of the runs; default: a temporary one")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for seed in options.seeds:
            for weight in options.weights:
                run = (options.folder or Path(scratch)) / f"{options.price}-{weight:g}-{seed}"
                if not (run / "summary.json").is_file():
                    settings = {"bound_weight": weight, "keep": options.keep, "price": options.price}
                    own = [f"output={run}", f"seed={seed}", f"trainer.steps={options.steps}"]
                    own += [f"objective.{name}={value}" for name, value in settings.items()]
                    train(load("digits-vlm", [*FIXED, *own]))
                rows.append({"weight": weight, "seed": seed} | judge(run, options.inputs))
                print(json.dumps(rows[-1]), flush=True)
    if options.out is not None:
        found = {
            "command": shlex.join(["python", "scripts/compare_bound_weights.py", *sys.argv[1:]]),
            "environment": environment(0, "cpu"),
            "steps": options.steps,
            "price": options.price,
            "runs": [
                {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in row.items()}
                for row in rows
            ],
        }
        options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
