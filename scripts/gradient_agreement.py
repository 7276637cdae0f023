"""Which gradient of router training agrees with the truth: the straight-through one, or that of exact flips.

    python scripts/gradient_agreement.py digits-vlm --inputs 96 --out benchmarks/gradient-agreement.json
    python scripts/gradient_agreement.py models/smollm2 --data data/smollm2 --inputs 8 --rates 0.95 0.9 0.8

Every layer of every input runs with the probability ``--rates``, independently, and paths are drawn by that. Along each
path the cost (KL to the dense model, and ``--task-weight`` times the cross-entropy) is measured with each decision
flipped. ``soft`` is the derivative by a soft gate, which straight-through takes for it; ``exact`` is the exact change,
and ``drawn`` the same where only ``--flips`` layers are flipped, as training does. Each is compared along its own path,
where ``exact`` is the truth, and with the mean over the other paths of the same input, which stands for the gradient of
the expected cost; how close ``exact`` comes to that is what one path can tell.

``layers`` and ``inputs`` are Spearman's rank correlations over the layers of an input and over the inputs at a layer,
``cosine`` is between the means over inputs, and ``wrong sign`` the share of inputs whose dearest layer the estimate
would rather leave out.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import torch

from adaskip.backbone.load import load_backbone, load_processor
from adaskip.runtime.attach import RoutedModel, attach
from adaskip.training.agreement import Agreement, measure_slopes
from adaskip.training.data import Collator, load_records, loader
from adaskip.training.objective import Objective
from adaskip.training.tracking import environment


@torch.no_grad()
def set_law(model: RoutedModel, rate: float) -> None:
    """Let every layer run for every input with this probability, whatever it looks at."""
    assert model.routers is not None
    for head in model.routers:
        head.outer.weight.zero_()
        head.outer.bias.fill_(math.log(rate / (1 - rate)))


def main() -> None:
    """Draw, flip, compare, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="digits-vlm, a folder, or a Hugging Face id")
    parser.add_argument("--data", default=None, help="default: the shipped model's own")
    parser.add_argument("--inputs", type=int, default=96)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.9, 0.75, 0.6])
    parser.add_argument("--paths", type=int, default=6, help="of each input and rate")
    parser.add_argument("--flips", type=int, default=4)
    parser.add_argument("--task-weight", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()

    model = attach(load_backbone(args.model), seed=args.seed)
    collate = Collator(load_processor(args.model))
    records = load_records(args.data or args.model, "validation", args.inputs, args.seed)
    batches = [*loader(records, collate, args.batch_size)]
    goal = Objective(task_weight=args.task_weight, flips=args.flips)
    rows: list[dict[str, Any]] = []
    print(f"{'rate':>5} {'truth':9} {'estimate':9} {'layers':>7} {'inputs':>7} {'cosine':>7} {'wrong sign':>10}")
    for rate in args.rates:
        set_law(model, rate)
        start = time.process_time()
        found = measure_slopes(model, batches, goal, args.paths, args.seed)
        row: dict[str, Any] = {"rate": rate, "processor_s": round(time.process_time() - start, 1)}
        for truth, exact in (("own path", found.exact), ("others", found.fresh)):
            estimates = {"soft": found.soft, "drawn": found.drawn, "exact": found.exact}
            row[truth] = {name: Agreement.of(value, exact).to_dict() for name, value in estimates.items()}
            for name, figures in row[truth].items():
                print(f"{rate:5g} {truth:9} {name:9} " + " ".join(f"{x:7.2f}" for x in figures.values()), flush=True)
        rows.append(row)
    if args.out is not None:
        command = shlex.join(["python", "scripts/gradient_agreement.py", *sys.argv[1:]])
        result = {"command": command, "environment": environment(args.seed, "cpu"), "rows": rows}
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
