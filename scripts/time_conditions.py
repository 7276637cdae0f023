"""What watching the conditions costs: training on digits-vlm with and without `ConditionCheck(every=50)`.

    python scripts/time_conditions.py

Segments of 50 steps and the look that ends them, with and without, in ABBA order in one process, and an A/A control.
What happens once a run, the measurement of the layers before the first step and the dense pass that all looks compare
with, is timed apart and spread over the recipe's steps. Processor seconds
(all threads) stand beside wall-clock seconds. Writes the key ``condition_check`` of ``benchmarks/theory.json``.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import lightning
from torch.utils.data import DataLoader

from adaskip.bench.rounds import ratio
from adaskip.demo.backbone import EMBEDDED, load
from adaskip.recipe import load as load_recipe
from adaskip.runtime.attach import attach
from adaskip.survey.skips import measure_skips
from adaskip.theory.prices import calibrate_prices
from adaskip.training.callbacks import ConditionCheck
from adaskip.training.data import Collator, load_records, loader
from adaskip.training.module import RouterTuner

EVERY = 50
OUT = Path(__file__).parents[1] / "benchmarks" / "theory.json"


def clock() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def main() -> None:
    """Time, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4, help="of four segments each")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    recipe = load_recipe("digits-vlm")
    backbone, processor = load()
    collate, size, looked_at = Collator(processor), recipe.trainer.batch_size, recipe.conditions.examples
    model = attach(backbone, recipe.router)
    records = {split: load_records(EMBEDDED, split, 1600, 0) for split in ("train", "validation", "calibration")}
    held = [*loader(records["validation"][:looked_at], collate, size)]
    fresh = measure_skips(model, [*loader(records["calibration"][: 2 * looked_at], collate, size)])
    prices = calibrate_prices(fresh, fresh.mass.mean(0), recipe.objective.alpha)
    start = clock()
    measured = measure_skips(model, held)
    check = ConditionCheck(EVERY, batches=held, measured=measured)
    check.on_train_end = lambda *_: None  # type: ignore[method-assign]  # the look at the very end is not part of it
    check.inspect(model, prices, 0)
    before = [b - a for a, b in zip(start, clock(), strict=True)]

    def segment(watch: bool) -> tuple[float, ...]:
        """Seconds of 50 training steps, with the one look that belongs to them or without."""
        tuner = RouterTuner(model, recipe.objective, prices, steps=recipe.trainer.steps)
        trainer = lightning.Trainer(
            max_steps=EVERY,
            accelerator="cpu",
            callbacks=[check] if watch else [],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        batches: DataLoader[Any] = loader(records["train"][: EVERY * size], collate, size)
        began = clock()
        trainer.fit(tuner, batches)
        return tuple(b - a for a, b in zip(began, clock(), strict=True))

    segment(True)
    ratios: dict[str, list[list[float]]] = {"with over without": [[], []], "without over without": [[], []]}
    plain = []
    for _ in range(options.rounds):
        for name, watch in (("with over without", True), ("without over without", False)):
            a, b, c, d = segment(watch), segment(False), segment(False), segment(watch)
            plain.append(b[1])
            for i in range(2):
                ratios[name][i].append((a[i] + d[i]) / (b[i] + c[i]))
    command = shlex.join(["python", "scripts/time_conditions.py", *sys.argv[1:]])
    found: dict[str, Any] = {"command": command, "every": EVERY, "examples": looked_at}
    for name, (wall, processor_) in ratios.items():
        for kind, values in (("wall", wall), ("processor", processor_)):
            interval = ratio(values, [1.0] * len(values))
            found[f"{name}, {kind}"] = {
                "ratio": interval.estimate,
                "low": interval.low if math.isfinite(interval.low) else None,
                "high": interval.high if math.isfinite(interval.high) else None,
                "rounds": values,
            }
    steps = recipe.trainer.steps
    once = before[1] / (statistics.median(plain) / EVERY * steps)
    found["measured_once_share"] = once
    print(json.dumps(found, indent=1))
    total = json.loads(options.out.read_text(encoding="utf-8")) if options.out.is_file() else {}
    options.out.write_text(json.dumps(total | {"condition_check": found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
