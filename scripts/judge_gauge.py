"""How well B, the gauge, and both together tell what a finished run's decisions cost test inputs that it has not seen.

    python scripts/judge_gauge.py runs/smollm2 --calibration 96 --skip 200 --inputs 200

The gauge is calibrated anew on calibration inputs; B has the run's own prices. Half of the test inputs calibrates the
factor of B, and of both together, and the other half is told; the gauge brings its factor along. ``spearman`` of B and
of both is over inputs that skip something, ``spearman_all`` over all of them: who skips nothing pays nothing, and B
says so. With ``--draws N`` the gauge is also calibrated and judged on N further draws of both splits, where the run's
data are drawn by a seed: what one draw covers spreads around the law.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

import torch

from adaskip.batch import Batch
from adaskip.runtime.attach import RoutedModel
from adaskip.survey.dense_costs import price_inputs
from adaskip.survey.gauging import gauge_routing, observe
from adaskip.theory.conditions import judge_joint
from adaskip.theory.gauge import Reading, judge_gauge
from adaskip.theory.measures import spearman
from adaskip.training.data import Collator
from adaskip.training.looks import joint_cost
from adaskip.verbs.bank import by_length
from adaskip.verbs.prices import read_prices
from adaskip.verbs.run import Run
from adaskip.verbs.splits import fitting, read_split

DRAWS_APART = 10_000
"""Between the seeds of two draws: a split's own draws start at most 3,000 above the seed."""
NAMES = ("spearman", "coverage", "coverage_p", "slack_median", "slack_90")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--calibration", type=int, default=96, help="inputs that the gauge is calibrated on")
    parser.add_argument("--skip", type=int, default=0, help="test inputs to leave out, the first ones")
    parser.add_argument("--inputs", type=int, default=200, help="test inputs to judge on")
    parser.add_argument("--rows", type=int, default=16, help="inputs a batch")
    parser.add_argument("--draws", type=int, default=0, help="further draws of calibration and test inputs")
    options = parser.parse_args()
    run = Run.open(options.run)
    model, collate, prices = run.model.eval(), Collator(run.processor), read_prices(options.run)

    def read(split: str, start: int, stop: int, draw: int = 0) -> list[Batch]:
        found = read_split(run.recipe.data, split, stop, run.recipe.seed + draw, lambda: fitting(run.recipe))
        records = by_length(found[start:])
        return [collate(records[at : at + options.rows]) for at in range(0, len(records), options.rows)]

    gauge = model.gauge = gauge_routing(model, read("calibration", 0, options.calibration), prices.alpha)
    test = read("test", options.skip, options.skip + options.inputs)
    costs = joint_cost(model, test, price_inputs(model, test, prices))
    order = torch.randperm(len(costs["kl"]), generator=torch.Generator().manual_seed(0))
    kl, bound, keep = costs["kl"][order].double(), costs["bound"][order], costs["keep"][:, order]
    told = {"B": Reading.of(judge_joint(kl, bound, keep, {}, prices.alpha))}
    ranks = {"B": spearman(bound, kl)}
    if gauge is not None:
        predicted = costs["told"][order]
        both = (predicted * bound).sqrt()
        told["gauge"] = judge_gauge(gauge, predicted, kl)
        told["together"] = Reading.of(judge_joint(kl, both, keep, {}, prices.alpha))
        ranks |= {"gauge": spearman(predicted, kl), "together": spearman(both, kl)}
    found = {name: reading.to_dict() | {"spearman_all": ranks[name]} for name, reading in told.items()}
    if options.draws:
        found["draws"] = judge_draws(model, read, options, prices.alpha)
    print(json.dumps({"kl": float(kl.mean()), "skipping": float((~keep).any(0).double().mean())} | found, indent=1))


def judge_draws(
    model: RoutedModel, read: Callable[[str, int, int, int], list[Batch]], options: argparse.Namespace, alpha: float
) -> dict[str, object]:
    """Calibrate and judge a gauge on each of several draws; return the figures of all, and shares below p = .05."""
    readings = []
    for draw in range(1, options.draws + 1):
        seed = draw * DRAWS_APART
        gauge = gauge_routing(model, read("calibration", 0, options.calibration, seed), alpha)
        outcome, kl = observe(model, read("test", options.skip, options.skip + options.inputs, seed))
        if gauge is not None:
            readings.append(judge_gauge(gauge, gauge.predict(outcome), outcome.mean(kl)))
    columns = {name: [getattr(reading, name) for reading in readings] for name in NAMES}
    low = sum(p < 0.05 for p in columns["coverage_p"])
    return {"n": len(readings), "low": low, "mean": {name: fmean(columns[name]) for name in NAMES}} | columns


if __name__ == "__main__":
    main()
