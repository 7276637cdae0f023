"""How well B, the gauge, and both together tell what a finished run's decisions cost test inputs that it has not seen.

    python scripts/judge_gauge.py runs/smollm2 --calibration 96 --skip 200 --inputs 200

The gauge is calibrated anew on calibration inputs; B has the run's own prices. Half of the test inputs calibrates the
factor of B, and of both together, and the other half is told; the gauge brings its factor along. ``spearman`` of B and
of both is over inputs that skip something, ``spearman_all`` over all of them: who skips nothing pays nothing, and B
says so.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from adaskip.batch import Batch
from adaskip.survey.dense_costs import price_inputs
from adaskip.survey.gauging import gauge_routing
from adaskip.theory.conditions import judge_joint
from adaskip.theory.gauge import Reading, judge_gauge
from adaskip.theory.measures import spearman
from adaskip.training.data import Collator, load_records
from adaskip.training.looks import joint_cost
from adaskip.verbs.bank import by_length
from adaskip.verbs.prices import read_prices
from adaskip.verbs.run import Run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--calibration", type=int, default=96, help="inputs that the gauge is calibrated on")
    parser.add_argument("--skip", type=int, default=0, help="test inputs to leave out, the first ones")
    parser.add_argument("--inputs", type=int, default=200, help="test inputs to judge on")
    parser.add_argument("--rows", type=int, default=16, help="inputs a batch")
    options = parser.parse_args()
    run = Run.open(options.run)
    model, collate, prices = run.model.eval(), Collator(run.processor), read_prices(options.run)

    def read(split: str, start: int, stop: int) -> list[Batch]:
        records = by_length(load_records(run.recipe.data.source, split, stop, run.recipe.seed)[start:])
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
    print(json.dumps({"kl": float(kl.mean()), "skipping": float((~keep).any(0).double().mean())} | found, indent=1))


if __name__ == "__main__":
    main()
