"""What the notions cost, in forward passes of the same batch: rounds interleaved in one process, ABBA.

    python scripts/cost_of_notions.py digits-vlm

Cheap are geometry (cosine, rho, proximal) and the text's attention on vision, read in one dense pass; the rest is shown
for comparison. Writes benchmarks/notions.json.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from adaskip.backbone.load import load_backbone, load_processor
from adaskip.plan import SkipPlan
from adaskip.runtime.attach import attach
from adaskip.survey.crossmodal import read_attention
from adaskip.survey.firstorder import logit_tangent, score_products
from adaskip.survey.record import record
from adaskip.theory import measures
from adaskip.theory.intervals import bootstrap_mean
from adaskip.training.data import Collator, load_records, loader


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", default="digits-vlm")
    parser.add_argument("--group", default="vision", choices=("all", "vision"))
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/notions.json"))
    options = parser.parse_args()

    model = attach(load_backbone(options.model), SkipPlan(group=options.group))
    records = load_records(options.data, "validation", options.batch_size, 0)
    batch = next(iter(loader(records, Collator(load_processor(options.model)), options.batch_size)))
    inputs, tokens = batch.inputs, model.read_tokens(batch.inputs)
    vision = options.group == "vision"
    layers = len(model.spec.layers)

    def dense() -> None:
        with model.dense():
            model(**inputs, use_cache=False)

    def geometry() -> None:
        found = []

        def watch(index: int, before: torch.Tensor, after: torch.Tensor) -> None:
            group = model.group_mask()
            found.append(measures.cosine_distance(before, after, group))
            found.append(measures.relative_change(before, after, group))

        with model.dense(), model.observe(watch):
            model(**inputs, use_cache=False)

    def cheap() -> None:
        with read_attention(model, tokens) if vision else nullcontext():
            geometry()

    recorded = record(model, batch)
    shifts = [recorded.states[layer] - recorded.states[layer + 1] for layer in range(layers)]

    def exact() -> None:
        for layer in range(layers):
            recorded.rerun(recorded.skipping([layer]))

    def first_order() -> None:
        for layer in range(layers):
            logit_tangent(recorded, layer, shifts[layer])

    def score() -> None:
        score_products(recorded, shifts)

    calls: dict[str, Callable[[], None]] = {"dense again": dense, "geometry": geometry, "cheap notions": cheap}
    slow = {"exact, all layers": exact, "first order, all layers": first_order, "one backward pass": score}
    rows: list[dict[str, Any]] = []
    for name, call in (calls | slow).items():
        rounds = options.rounds if name in calls else max(3, options.rounds // 6)
        ratios = [_ratio(dense, call) for _ in range(rounds + 2)][2:]
        found = bootstrap_mean(torch.tensor(ratios))
        rows.append(
            {
                "what": name,
                "passes": found.estimate,
                "low": found.low if math.isfinite(found.low) else None,
                "high": found.high if math.isfinite(found.high) else None,
                "median": statistics.median(ratios),
                "rounds": rounds,
            }
        )
        print(
            f"{name:26} {statistics.median(ratios):7.2f} passes (mean {found.low:.2f} to {found.high:.2f})", flush=True
        )
    command = shlex.join(["python", "scripts/cost_of_notions.py", *sys.argv[1:]])
    settings = {
        "layers": layers,
        "group": options.group,
        "batch_size": len(records),
        "threads": torch.get_num_threads(),
    }
    options.out.write_text(
        json.dumps({"command": command, **settings, "rows": rows}, indent=2) + "\n", encoding="utf-8"
    )


def _ratio(base: Callable[[], None], call: Callable[[], None]) -> float:
    """CPU seconds of call over base, ABBA; process time, which other processes do not stretch."""
    seconds = []
    for run in (base, call, call, base):
        start = time.process_time()
        run()
        seconds.append(time.process_time() - start)
    return (seconds[1] + seconds[2]) / (seconds[0] + seconds[3])


if __name__ == "__main__":
    main()
