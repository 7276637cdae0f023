"""Which price of a skip makes the bound B predict the joint KL best, on inputs that nothing was fitted on.

    python scripts/compare_prices.py --run runs/digits-vlm --out benchmarks/prices.json

Every price is calibrated on the calibration split and read on test inputs, over random plans of several skip rates and,
with ``--run``, over the decisions of trained routers. Prices: ``calibrated`` (Lambda_l rho_l, skips add up), ``gates``
(the same, skips correlate as the mean gate matrix says), ``fisher`` (Lambda_l times the input's own slope).
For reference ``quadratic``, the input's own gate matrix, which needs every layer's rerun of that very input. Figures:
Spearman's rho over inputs and plans, the median of |log(B / KL)|, and the same after B is rescaled by one constant.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from adaskip.recipe import load
from adaskip.runtime.attach import RoutedModel, attach
from adaskip.survey.calibration import Kind, price_layers
from adaskip.survey.firstorder import first_order_of
from adaskip.survey.flips import survey_flips
from adaskip.survey.record import record
from adaskip.survey.skips import measure_skips
from adaskip.theory.bounds import joint_quadratic, redundancy_bound
from adaskip.theory.measures import spearman
from adaskip.theory.prices import Prices
from adaskip.training.data import Collator, loader
from adaskip.training.tracking import environment
from adaskip.verbs.run import Run, load_model, load_processor
from adaskip.verbs.splits import records


@torch.no_grad()
def joint_kl(model: RoutedModel, batches: list[Any], keep: Tensor | None) -> tuple[Tensor, Tensor]:
    """Exact KL(dense || plan) of each input, (n), and the plan (n l); ``keep`` (n l), or None: the routers decide."""
    found, plans, start = [], [], 0
    for batch in batches:
        rows = slice(start, start + len(batch))
        recorded = record(model, batch)
        routed = record(model, batch, routed=True).logits if keep is None else recorded.rerun(keep[rows].T)
        found.append(recorded.compare(routed)["kl"])
        plans.append(model.routing.keep.T)
        start = rows.stop
    return torch.cat(found), torch.cat(plans)


def score(bound: Tensor, kl: Tensor) -> dict[str, float]:
    """How well B orders and sizes the exact joint KL; both clipped at 1e-6 nats."""
    ratio = bound.double().clamp_min(1e-6).log() - kl.double().clamp_min(1e-6).log()
    return {
        "spearman": spearman(bound, kl),
        "log_error": float(ratio.abs().median()),
        "log_error_rescaled": float((ratio - ratio.median()).abs().median()),
    }


def main() -> None:
    """Measure, calibrate, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="digits-vlm")
    parser.add_argument("--run", type=Path, nargs="*", default=[], help="finished runs whose routers decide as well")
    parser.add_argument("--inputs", type=int, default=240, help="calibration and test inputs, so many each")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.1, 0.25, 0.5], help="skip rates of random plans")
    parser.add_argument("--draws", type=int, default=2, help="random plans an input and rate")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()

    recipe = load(args.recipe)
    collate = Collator(load_processor(recipe))
    model = attach(load_model(recipe), recipe.router, seed=recipe.seed)
    parts = {split: [*loader(records(recipe, split)[: args.inputs], collate, 60)] for split in ("calibration", "test")}
    none = torch.zeros(len(model.spec.layers))
    kinds: tuple[Kind, ...] = get_args(Kind)
    prices: dict[str, Prices] = {
        kind: price_layers(model, parts["calibration"], none, recipe.objective.alpha, kind) for kind in kinds
    }
    rho, own = measure_skips(model, parts["test"]).rho, survey_flips(model, parts["test"]).pairs
    slopes = first_order_of(model, parts["test"], seed=1)

    draws = torch.Generator().manual_seed(0)
    plans: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for rate in args.rates:
        for _ in range(args.draws):
            keep = torch.rand(rho.shape, generator=draws) >= rate
            plans.setdefault(f"random, {rate} skipped", []).append(joint_kl(model, parts["test"], keep))
    for folder in args.run:
        plans[f"routers of {folder.name}"] = [joint_kl(Run.open(folder).model, parts["test"], None)]

    def predicted(kind: str, keep: Tensor) -> Tensor:
        if kind == "quadratic":
            return joint_quadratic(keep.float(), own)
        found = prices[kind]
        s, u = found.first_order_costs(slopes) if kind == "fisher" else found.costs(rho)
        return redundancy_bound(keep.float(), s, u, found.correlation)

    table: dict[str, dict[str, dict[str, float]]] = {}
    for name, found in plans.items():
        kl = torch.cat([costs for costs, _ in found])
        table[name] = {
            kind: score(torch.cat([predicted(kind, keep) for _, keep in found]), kl) for kind in (*kinds, "quadratic")
        }
        table[name]["mean_kl"] = {"nats": float(kl.mean())}
        print(name, json.dumps(table[name], indent=1), flush=True)
    if args.out is not None:
        facts = {
            "recipe": args.recipe,
            "inputs": args.inputs,
            "draws": args.draws,
            "environment": environment(0, "cpu"),
        }
        args.out.write_text(json.dumps(facts | {"plans": table}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
