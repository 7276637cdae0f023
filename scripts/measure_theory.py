"""The chain of bounds on digits-vlm: slack of every link, certificates, coverage.

    python scripts/measure_theory.py && python scripts/theory_tables.py

Without ``--run`` routers are trained first, from the shipped recipe. Constants are calibrated on the calibration split
(validation scans), everything else is measured on test questions. Writes ``benchmarks/theory.json``.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adaskip.batch import Batch
from adaskip.demo.backbone import EMBEDDED, load
from adaskip.policies.learned.config import RouterConfig
from adaskip.recipe import load as load_recipe
from adaskip.runtime.attach import RoutedModel, attach
from adaskip.survey.dense_costs import SkipCosts, price_inputs
from adaskip.survey.record import record
from adaskip.survey.skips import measure_skips
from adaskip.theory import bounds
from adaskip.theory.conditions import rank_correlations
from adaskip.theory.conformal import beta_binomial_pvalue, conformal_quantile, resplit_coverage, safe_ratio
from adaskip.theory.measures import spearman
from adaskip.theory.prices import Prices, calibrate_prices
from adaskip.theory.tables import LayerMeasures
from adaskip.training.callbacks import joint_cost
from adaskip.training.data import Collator, load_records, loader
from adaskip.training.tracking import environment
from adaskip.verbs.budget import hold_budget
from adaskip.verbs.run import Run
from adaskip.verbs.train import train

OUT = Path(__file__).parents[1] / "benchmarks" / "theory.json"
ALPHA, SPLITS = 0.1, 200
BOUNDS = (
    "exact KL",
    "two-point bound",
    "Bennett bound",
    "u",
    "r²/8",
    "lower bound",
    "s²/2 (estimator)",
)


@torch.no_grad()
def links(model: RoutedModel, batches: list[Batch]) -> dict[str, Any]:
    """Every single-layer skip, token by token: exact KL, its bounds, certificates; and each input's gate matrix."""
    layers = len(model.spec.layers)
    found: dict[str, list[Tensor]] = {}
    rows: list[Tensor] = []
    matrices: list[Tensor] = []
    for batch in batches:
        recorded, where = record(model, batch), batch.supervised
        after = torch.stack([recorded.rerun(recorded.skipping([layer])).double() for layer in range(layers)], 1)
        before = recorded.logits.double().unsqueeze(1).expand_as(after)
        shift, kl = bounds.logit_shift(before, after), bounds.kl_exact(before, after)
        values = {
            "exact KL": kl,
            "two-point bound": bounds.kl_two_point(shift.s, shift.u),
            "Bennett bound": bounds.kl_bennett(shift.s, shift.u),
            "u": shift.u,
            "r²/8": bounds.kl_range(shift.r),
            "lower bound": bounds.kl_lower(shift.s, shift.b),
            "s²/2 (estimator)": bounds.kl_quadratic(shift.s),
            "unchanged": before.argmax(-1) == after.argmax(-1),
            "margin": bounds.argmax_certified_margin(before, after),
            "kl": bounds.argmax_certified_kl(before, kl),
            "limit": bounds.argmax_kl_limit(before),
        }
        for name, value in values.items():
            found.setdefault(name, []).append(value)
        row = where.nonzero()[:, 0]
        rows.append(row + (int(rows[-1].max()) + 1 if rows else 0))
        G = bounds.gate_matrix(before[:, 0], after)
        count = where.sum(1)
        matrices.append(G.new_zeros(len(where), layers, layers).index_add(0, row, G) / count[:, None, None])
    return {name: torch.cat(v) for name, v in found.items()} | {"row": torch.cat(rows), "G": torch.cat(matrices)}


def whole(flags: Tensor, row: Tensor) -> Tensor:
    """(tokens, ...) bool -> (inputs, ...): whether it holds at every token of the input."""
    wrong = torch.zeros(int(row.max()) + 1, *flags.shape[1:]).index_add(0, row, (~flags).float())
    return wrong == 0


def slack(seen: dict[str, Any], calibrated: Tensor) -> dict[str, Any]:
    """Per layer the mean of every bound, and over all layers and tokens how far it lies from the exact KL."""
    kl = seen["exact KL"]
    felt = kl > 1e-9
    below = {"lower bound", "s²/2 (estimator)", "exact KL"}
    table = {name: seen[name].mean(0).tolist() for name in BOUNDS if name in seen}
    table["calibrated bound"] = calibrated.mean(0).tolist()
    ratios = {}
    for name in (n for n in BOUNDS if n in seen and n != "exact KL"):
        ratio = (seen[name] / kl)[felt].double()
        broken = (seen[name] < kl * (1 - 1e-9)) if name not in below else (seen[name] > kl * (1 + 1e-9) + 1e-15)
        quantiles = np.quantile(ratio.numpy(), [0.5, 0.99, 0.01])
        ratios[name] = dict(zip(("median", "q99", "q01"), map(float, quantiles), strict=True))
        ratios[name]["violated"] = None if name.startswith("s²") else int(broken.sum())
        if name.startswith("s²"):
            ratios[name]["below_exact"] = float((seen[name] < kl)[felt].float().mean())
    return {"n_tokens": len(kl), "per_layer": table, "over_exact": ratios}


def certificates(seen: dict[str, Any], per_token: Tensor) -> dict[str, Any]:
    """Share of inputs whose every argmax provably stands when one layer is skipped, and how many such claims are false.

    ``per_token`` (n l) is a calibrated bound on each input's largest token KL.
    """
    row = seen["row"]
    truth = whole(seen["unchanged"], row)
    claims = {"margin": whole(seen["margin"], row), "exact KL": whole(seen["kl"], row)}
    claims["calibrated KL"] = whole(per_token[row] < seen["limit"], row)
    return {"unchanged": truth.float().mean(0).tolist()} | {
        name: {
            "covered": float(claim.float().mean()),
            "per_layer": claim.float().mean(0).tolist(),
            "of_unchanged": float(claim.float().sum() / truth.float().sum()),
            "false": int((claim & ~truth).sum()),
        }
        for name, claim in claims.items()
    }


def constants(measured: LayerMeasures, prices: Prices, priced: int) -> dict[str, Any]:
    """Coverage of s <= Lambda (rho + c a): per layer and for all at once, over resplits and on another split."""
    n, layers = measured.s.shape
    score = safe_ratio(measured.s.double(), measured.rho.double() + prices.c * prices.mass)
    half = n // 2
    per_layer = [asdict(resplit_coverage(column, ALPHA, half, SPLITS, i)) for i, column in enumerate(score.T)]
    draw = torch.Generator().manual_seed(0)
    shares: dict[str, list[float]] = {"alpha": [], "alpha / L": []}
    for _ in range(SPLITS):
        order = torch.randperm(n, generator=draw)
        for name, alpha in (("alpha", ALPHA), ("alpha / L", ALPHA / layers)):
            limit = conformal_quantile(score[order[:half]], alpha)
            shares[name].append(float((score[order[half:]] <= limit).all(1).double().mean()))
    joint = safe_ratio(score, prices.shift).amax(1)  # weights from other inputs
    covered = (score <= prices.shift).sum(0).tolist()
    return {
        "per_layer": per_layer,
        "mean": float(np.mean([c["mean"] for c in per_layer])),
        "expected": per_layer[0]["expected"],
        "smallest_law_p": min(c["law_p"] for c in per_layer),
        "joint_of_per_layer_constants": float(np.mean(shares["alpha"])),
        "joint_at_alpha_over_L": float(np.mean(shares["alpha / L"])),
        "joint_by_maximum": asdict(resplit_coverage(joint, ALPHA, half, SPLITS, layers)),
        "other_split": {  # constants of validation scans on test scans: new handwriting
            "covered": [c / n for c in covered],
            "p": [beta_binomial_pvalue(c, n, priced, ALPHA) for c in covered],
        },
    }


def decisions(
    model: RoutedModel,
    batches: list[Batch],
    held: list[Batch],
    seen: dict[str, Any],
    costs: SkipCosts,
    keeps: list[float],
) -> list[dict[str, Any]]:
    """What kappa B says of the routers' real decisions at several keep rates of one trained set of routers."""
    found = []
    tokens = torch.zeros(len(costs.s)).index_add(0, seen["row"], torch.ones(len(seen["row"])))
    limit = torch.full((len(costs.s),), math.inf, dtype=torch.float64)
    limit = limit.scatter_reduce(0, seen["row"], seen["limit"][:, 0], "amin")
    for keep in keeps:
        hold_budget(model, held, keep)
        cost = joint_cost(model, batches, costs)
        kl, bound = cost["kl"].double(), cost["bound"].double()
        rates = keep_rates(model, batches)
        matrix = bounds.joint_quadratic(cost["keep"].T.double(), seen["G"])
        score = safe_ratio(kl, bound)
        half = len(kl) // 2
        kappa = conformal_quantile(score[:half], ALPHA)
        ceiling = kappa * bound[half:]
        scale = conformal_quantile(safe_ratio(kl, matrix)[:half], ALPHA)
        slack_ = (ceiling / kl[half:])[kl[half:] > 1e-9]
        truth = unchanged(model, batches)[half:]
        claim = (ceiling * tokens[half:]) < limit[half:]  # each token's KL is at most their sum
        found.append(
            {
                "asked": keep,
                "keep": rates,
                "kl": float(kl.mean()),
                "kappa": float(kappa),
                "kappa_B": float(ceiling.mean()),
                "coverage": asdict(resplit_coverage(score, ALPHA, half, SPLITS)),
                "slack": {"median": float(slack_.median()), "q90": float(slack_.quantile(0.9))},
                "rho_B": spearman(bound, kl),
                "rho_gate_matrix": spearman(matrix, kl),
                "gate_matrix_level": float(safe_ratio(kl, matrix)[kl > 1e-9].median()),
                "gate_matrix_scale": float(scale),
                "gate_matrix_slack": float((scale * matrix[half:] / kl[half:])[kl[half:] > 1e-9].median()),
                "certified": float(claim.double().mean()),
                "false": int((claim & ~truth).sum()),
                "unchanged": float(truth.double().mean()),
            }
        )
        print(
            f"  keep {rates:.3f}: KL {kl.mean():.4f}, kappa {kappa:.3g}, covered {found[-1]['coverage']['mean']:.3f}, "
            f"slack {found[-1]['slack']['median']:.3g}",
            flush=True,
        )
    return found


@torch.no_grad()
def keep_rates(model: RoutedModel, batches: list[Batch]) -> float:
    rates = []
    for batch in batches:
        model(**batch.arguments())
        rates.append(model.routing.keep_rate)
    return float(torch.cat(rates).mean())


@torch.no_grad()
def unchanged(model: RoutedModel, batches: list[Batch]) -> Tensor:
    """bool (n): whether the routed argmax is the dense one at every predicted token."""
    same = []
    for batch in batches:
        arguments = batch.arguments()
        with model.dense():
            dense = model(**arguments).logits[:, :-1].argmax(-1)
        routed = model(**arguments).logits[:, :-1].argmax(-1)
        same.append(((dense == routed) | ~batch.supervised).all(1))
    return torch.cat(same)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="a finished run of group all; default: train one now")
    parser.add_argument("--steps", type=int, default=400, help="of that training")
    parser.add_argument("--examples", type=int, default=1200, help="test questions")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.9, 0.8, 0.7, 0.6, 0.5])
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    recipe = load_recipe("digits-vlm")
    found: dict[str, Any] = {
        "command": shlex.join(["python", "scripts/measure_theory.py", *sys.argv[1:]]),
        "environment": environment(recipe.seed, "cpu"),
        "alpha": ALPHA,
        "examples": options.examples,
        "steps": None if options.run else options.steps,
        "groups": {},
    }
    _, processor = load()
    collate, size = Collator(processor), recipe.trainer.batch_size

    def batches(split: str, count: int) -> list[Batch]:
        return [*loader(load_records(EMBEDDED, split, count, recipe.seed), collate, size)]

    calibration, test = batches("calibration", options.examples // 2), batches("test", options.examples)
    kept: dict[str, Any] = {}
    for group in ("all", "vision"):
        model = attach(load()[0], RouterConfig(group=group))  # type: ignore[arg-type]
        fresh = measure_skips(model, calibration, attention=group == "vision")
        prices = calibrate_prices(fresh, fresh.mass.mean(0), ALPHA)
        measured = measure_skips(model, test, attention=group == "vision")
        seen = links(model, test)
        s, u = prices.costs(measured.rho)
        ceiling = bounds.kl_two_point(s, u)  # of each token: Lambda prices the largest s and u of an input
        found["groups"][group] = {
            "slack": slack(seen, ceiling),
            "certificates": certificates(seen, ceiling),
            "constants": constants(measured, prices, len(fresh)),
            "calibrated_bound_covers_kl": float((ceiling >= measured.kl).double().mean()),
            "rank_correlation": rank_correlations(measured),
        }
        kept[group] = prices, seen
        ratio = found["groups"][group]["slack"]["over_exact"]["two-point bound"]
        print(
            f"group {group}: two-point over exact KL, median {ratio['median']:.3f}, 99 % {ratio['q99']:.3g}", flush=True
        )
    with tempfile.TemporaryDirectory() as scratch:
        run = options.run or Path(scratch) / "run"
        if options.run is None:
            train(
                load_recipe(
                    "digits-vlm",
                    [
                        f"output={run}",
                        f"trainer.steps={options.steps}",
                        "tracking.wandb=disabled",
                        "trainer.progress=false",
                        "objective.keep=0.6",
                    ],
                )
            )
        loaded = Run.open(run)
        prices, seen = kept["all"]
        costs = price_inputs(loaded.model, test, prices)
        found["decisions"] = decisions(loaded.model, test, batches("validation", 300), seen, costs, options.keep)
    if options.out.is_file():  # what time_conditions.py put there stays
        found |= {k: v for k, v in json.loads(options.out.read_text(encoding="utf-8")).items() if k not in found}
    options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
