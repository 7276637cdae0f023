"""Which price of a skip makes the bound B predict the joint KL best, on inputs that nothing was fitted on.

    python scripts/compare_prices.py --run runs/digits-vlm --keep 0.8 0.65 0.5 --out benchmarks/prices.json

Every price is calibrated on the calibration split and read on test inputs, over random plans of several skip rates and,
with ``--run``, over the decisions of trained routers, whose thresholds hold each ``--keep`` on validation inputs.
Prices: ``calibrated`` (Lambda_l rho_l, skips add up), ``gates`` (the same, skips correlate as the mean gate matrix
says), ``fisher`` (Lambda_l times the input's own slope), ``functional`` (the exact cost of each skip, predicted).
For reference two that need every layer's rerun of the very input: ``exact``, its own costs of single skips where
functional has predictions, and ``quadratic``, its own gate matrix. Figures: Spearman's rho over inputs (and plans) that
skip something; kappa, calibrated on the first half; on the second half the coverage of kappa B, and its slack
kappa B / KL, median and 90 %; the median of |log(B / KL)|, and the same after B is rescaled by one constant.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from adaskip.recipe import load
from adaskip.runtime.attach import RoutedModel, attach
from adaskip.survey.calibration import price_layers
from adaskip.survey.dense_costs import SkipCosts, price_inputs
from adaskip.survey.flips import survey_flips
from adaskip.survey.record import record
from adaskip.survey.skips import measure_skips
from adaskip.theory.bounds import joint_quadratic
from adaskip.theory.conditions import judge_joint
from adaskip.theory.prices import Kind, Prices
from adaskip.training.data import Collator, loader
from adaskip.training.tracking import environment
from adaskip.verbs.budget import hold_budget
from adaskip.verbs.run import Run, load_model, load_processor
from adaskip.verbs.splits import records

REFERENCES = ("exact", "quadratic")


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


def score(bound: Tensor, kl: Tensor, keep: Tensor, alpha: float) -> dict[str, float]:
    """How well B orders, covers and sizes the exact joint KL of inputs in an order at random."""
    order = torch.randperm(len(kl), generator=torch.Generator().manual_seed(0))
    joint = judge_joint(kl[order], bound[order], keep[order].T, {}, alpha)
    ratio = bound.double().clamp_min(1e-6).log() - kl.double().clamp_min(1e-6).log()
    names = ("spearman", "kappa", "coverage", "coverage_p", "slack_median", "slack_90")
    return {name: getattr(joint, name) for name in names} | {
        "log_error": float(ratio.abs().median()),
        "log_error_rescaled": float((ratio - ratio.median()).abs().median()),
    }


def main() -> None:
    """Measure, calibrate, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="digits-vlm")
    parser.add_argument("--run", type=Path, nargs="*", default=[], help="finished runs whose routers decide as well")
    parser.add_argument("--keep", type=float, nargs="*", default=[], help="of those routers; default: as they are")
    parser.add_argument("--inputs", type=int, default=240, help="calibration and test inputs, so many each")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.1, 0.25, 0.5], help="skip rates of random plans")
    parser.add_argument("--draws", type=int, default=2, help="random plans an input and rate")
    parser.add_argument("--kinds", nargs="+", default=[*get_args(Kind), *REFERENCES], help="prices and references")
    parser.add_argument("--among", type=int, help="plans leave out some of so many cheapest layers alone; default: any")
    parser.add_argument("--static", type=int, default=0, help="also the plan without so many cheapest layers")
    parser.add_argument("--rows", type=int, default=60, help="inputs a batch")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()

    recipe = load(args.recipe)
    collate = Collator(load_processor(recipe))
    model = attach(load_model(recipe), recipe.router, seed=recipe.seed)
    parts = {
        split: [*loader(records(recipe, split)[: args.inputs], collate, args.rows)] for split in ("calibration", "test")
    }
    none, alpha, layers = torch.zeros(len(model.spec.layers)), recipe.objective.alpha, len(model.spec.layers)
    kinds: list[Kind] = [kind for kind in get_args(Kind) if kind in args.kinds]
    functional = price_layers(model, parts["calibration"], none, alpha, "functional")
    # those of rho are calibrated with every kind
    prices: dict[str, Prices] = {
        "functional": functional,
        "calibrated": replace(functional, functional=None, correlation=None),
    }
    for kind in ("gates", "fisher"):
        if kind in kinds:
            prices[kind] = price_layers(model, parts["calibration"], none, alpha, kind)
    own = survey_flips(model, parts["test"]).pairs if "quadratic" in args.kinds else none
    exact = measure_skips(model, parts["test"]).kl.double() if "exact" in args.kinds else none
    costs = {kind: price_inputs(model, parts["test"], prices[kind], seed=1) for kind in kinds}

    order = price_inputs(model, parts["calibration"], functional).s.square().mean(0).argsort()
    dearest = order[args.among :] if args.among else order[:0]
    draws = torch.Generator().manual_seed(0)
    plans: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for rate in args.rates:
        for _ in range(args.draws):
            keep = torch.rand(sum(map(len, parts["test"])), layers, generator=draws) >= rate
            keep[:, dearest] = True
            plans.setdefault(f"random, {rate} skipped", []).append(joint_kl(model, parts["test"], keep))
    if args.static:
        keep = torch.ones(sum(map(len, parts["test"])), layers).bool()
        keep[:, order[: args.static]] = False
        name = f"static, without {order[: args.static].tolist()}"
        plans[name] = [joint_kl(model, parts["test"], keep)]
    for folder in args.run:
        routed = Run.open(folder).model
        held = [*loader(records(recipe, "validation")[: args.inputs], collate, args.rows)] if args.keep else []
        for rate in args.keep or [None]:
            if rate is not None:
                hold_budget(routed, held, rate)
            plans[f"routers of {folder.name}, {rate or 'all'} kept"] = [joint_kl(routed, parts["test"], None)]

    def predicted(kind: str, keep: Tensor) -> Tensor:
        if kind == "quadratic":
            return joint_quadratic(keep.float(), own)
        if kind == "exact":
            return SkipCosts((2 * exact).sqrt(), None, functional.correlation).bound(keep.float())
        return costs[kind].bound(keep.float())

    table: dict[str, dict[str, dict[str, float]]] = {}
    for name, found in plans.items():
        kl, keep = torch.cat([kl for kl, _ in found]), torch.cat([keep for _, keep in found])
        table[name] = {
            kind: score(torch.cat([predicted(kind, plan) for _, plan in found]), kl, keep, recipe.objective.alpha)
            for kind in (*kinds, *(name for name in REFERENCES if name in args.kinds))
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
