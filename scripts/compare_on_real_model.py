"""A plan for each class of tokens on a real language model, against plans for all tokens, on test prompts.

    adaskip train smollm2
    python scripts/compare_on_real_model.py runs/smollm2 --keep 0.9 0.8 0.7

Takes finished runs of method token-plan, and goes on with their search as far as the lowest keep rate asks; greedy
static plans of the same keep rates are found by exact costs on the same training prompts. On prompts of the test split,
which nothing was fitted on, it then really executes, for every keep rate: the plan by token class, the greedy static
plan, the static plan of as many layers by block influence (those that turn the states least, mean cosine), and a random
one. Differences are paired over prompts, with 95 % bootstrap intervals. Costs once measured stay in the run's folder.
Tells apart the tokens that all prompts begin with, such as a system prompt's, the prompt's own, and the answer's: their
keep rates, and their shares of what is skipped. Writes a table, a JSON file, and a picture of the mean KL of all runs
against keep.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from adaskip.batch import Batch
from adaskip.plan import SkipPlan, Target
from adaskip.runfiles import SUMMARY, TOKEN_PRICES
from adaskip.runtime.attach import RoutedModel, attach
from adaskip.stages import LineStages
from adaskip.survey.greedy import Path as Plan
from adaskip.survey.greedy import exact_prices, greedy_paths
from adaskip.survey.ledger import Ledger
from adaskip.survey.price_file import PriceFile, find_origin
from adaskip.survey.record import Recorded, record
from adaskip.survey.static import layer_savings
from adaskip.survey.token_plan import TokenPlans, find_token_plans
from adaskip.theory.costs import per_input
from adaskip.theory.intervals import paired_difference
from adaskip.theory.measures import cosine_distance
from adaskip.training.data import Collator, Record
from adaskip.training.tracking import environment
from adaskip.verbs.bank import by_length
from adaskip.verbs.run import Run
from adaskip.verbs.splits import fitting, read_split

STATIC_PRICES = "static-prices.safetensors"
WIDTH = 5
"""Layers tried each time one more goes."""
FIRST = 2
"""The first layer that a random plan may leave out; nor may it leave out the last, as the field does."""


@dataclass(frozen=True)
class Side:
    """Hold one policy's figures of every test prompt, float64 (n) each."""

    kl: Tensor  # nats per predicted token
    agreement: Tensor  # share of the answer's tokens with the dense model's argmax
    keep: Tensor  # of the dense decoder's FLOPs

    def line(self, static: Side) -> dict[str, Any]:
        """Return means, and how much less it costs than the static plan."""
        gap = paired_difference(static.kl, self.kl)
        means = {name: float(getattr(self, name).mean()) for name in ("keep", "kl", "agreement")}
        ratio = means["kl"] / float(static.kl.mean())
        return means | {"ratio": ratio, "less": gap.estimate, "low": gap.low, "high": gap.high}


class Prompts:
    """Hold records, and make batches of them by number."""

    def __init__(self, records: Sequence[Record], collate: Collator, size: int) -> None:
        self.records, self.collate, self.size = by_length(records), collate, size

    def __len__(self) -> int:
        return len(self.records)

    def __call__(self, rows: Sequence[int]) -> list[Batch]:
        parts = [rows[start : start + self.size] for start in range(0, len(rows), self.size)]
        return [self.collate([self.records[row] for row in part]) for part in parts]

    @property
    def batches(self) -> list[Batch]:
        return self(range(len(self)))


@torch.no_grad()
def follow(model: RoutedModel, prompts: Prompts, plans: dict[str, Plan] | None = None) -> dict[str, Side]:
    """Run the prompts as the model decides, or under plans."""
    found: dict[str, list[tuple[Tensor, ...]]] = {}

    def add(name: str, dense: Recorded, logits: Tensor) -> None:
        same = per_input((logits.argmax(-1) == dense.logits.argmax(-1)).double(), dense.batch.supervised, "mean")
        figures = dense.compare(logits)["kl"].double(), same, model.routing.keep_rate.double()
        found.setdefault(name, []).append(figures)

    for batch in prompts.batches:
        dense = record(model, batch)
        if plans is None:
            add("token classes", dense, record(model, batch, routed=True, states=False).logits)
        for name, plan in (plans or {}).items():
            add(name, dense, dense.rerun(dense.skipping(plan)))
    return {name: Side(*(torch.cat(column) for column in zip(*rows, strict=True))) for name, rows in found.items()}


@torch.no_grad()
def influence(model: RoutedModel, batches: Sequence[Batch]) -> list[int]:
    """Return the layers by their block influence, least first: 1 - cos of a token's state before and after, mean."""
    turned = []
    for batch in batches:
        dense = record(model, batch)
        pairs = zip(dense.entered, dense.states[1:], strict=True)
        turned.append(torch.stack([cosine_distance(a, b, dense.tokens.valid).mean() for a, b in pairs]))
    return torch.stack(turned).mean(0).argsort().tolist()


def greedy_plans(model: RoutedModel, train: Prompts, keeps: Sequence[float], file: Path) -> dict[float, Plan]:
    """Return the shortest of nested greedy plans that hold each keep rate, by exact costs."""
    layers, rows = len(model.spec.layers), range(len(train))
    price = Ledger(exact_prices(model, train), len(train), PriceFile(file, find_origin(model, train.batches)))
    single = price([(layer,) for layer in range(layers)], rows).mean(0)
    saves = layer_savings(model, train.batches).mean(0)

    def kept(path: Plan) -> float:
        return 1 - float(saves[list(path)].sum())

    nested = greedy_paths(price, rows, single, layers, WIDTH, lambda path: kept(path) <= min(keeps) + 1e-9)
    return {keep: next(path for path, _ in nested if kept(path) <= keep + 1e-9) for keep in keeps}


@torch.no_grad()
def roles(model: RoutedModel, batches: Sequence[Batch], shared: int) -> dict[str, dict[str, float]]:
    """Return, by the sort of token, its keep rate and its share of all skipped (token, layer) pairs.

    They are the ``shared`` first of every prompt, which are the same in all, the prompt's own, and the answer's.
    """
    counts = {name: torch.zeros(2) for name in ("shared", "own", "answer")}  # pairs, and those skipped
    for batch in batches:
        model(**batch.arguments())
        routing = model.routing
        skipped = (~routing.keep & routing.tokens).sum(0)  # (b t)
        prompt = batch.prompt_mask & routing.tokens
        first = prompt & (prompt.cumsum(1) <= shared)
        masks = {"shared": first, "own": prompt & ~first, "answer": routing.tokens & ~prompt}
        for name, mask in masks.items():
            counts[name] += torch.tensor([int(mask.sum()) * len(routing.keep), int(skipped[mask].sum())])
    gone = max(1.0, sum(float(count[1]) for count in counts.values()))
    parts = {"own and answer": counts["own"] + counts["answer"]} | counts
    return {
        name: {"keep": 1 - float(count[1] / count[0].clamp_min(1)), "of_skipped": float(count[1]) / gone}
        for name, count in parts.items()
    }


def shared_prefix(batches: Sequence[Batch]) -> int:
    """Return how many first tokens all prompts have in common."""
    rows = [row[mask] for b in batches for row, mask in zip(b.inputs["input_ids"], b.prompt_mask, strict=True)]
    least = min(map(len, rows))
    same = (torch.stack([row[:least] for row in rows]) == rows[0][:least]).all(0)
    return int(same.long().cumprod(0).sum())


def compare(run: Run, keeps: Sequence[float], examples: int) -> list[dict[str, Any]]:
    """Return the lines of every keep rate, and print them."""
    recipe, held = run.recipe, json.loads((run.folder / SUMMARY).read_text())["conditions"]["held"]
    section, size, collate = recipe.tokens, recipe.trainer.batch_size, Collator(run.processor)

    def load(split: str, count: int) -> Prompts:
        return Prompts(read_split(recipe.data, split, count, recipe.seed, lambda: fitting(recipe)), collate, size)

    test, train = load("test", examples), load("train", section.examples)
    plain = attach(run.model.detach(), SkipPlan())
    static = greedy_plans(plain, train, keeps, run.folder / STATIC_PRICES)
    ranked, layers = influence(plain, train.batches), len(plain.spec.layers)
    plans: dict[str, Plan] = {}
    for keep, plan in static.items():
        chosen = random.Random(0).sample(range(FIRST, layers - 1), len(plan))
        found = {"greedy static": plan, "block influence": ranked[: len(plan)], "random": chosen}
        plans |= {f"{name} {keep:g}": tuple(sorted(path)) for name, path in found.items()}
    sides = follow(plain, test, plans)

    model = attach(plain.detach(), recipe.router)
    model.hold(held)
    settings = {"classes": (section.prompt, section.answer), "entry": section.entry, "band": section.band}
    found = find_token_plans(
        model, train.batches, keep=min(keeps), width=section.width, seed=recipe.seed,
        file=run.folder / TOKEN_PRICES, stages=LineStages(), **settings,
    )  # fmt: skip
    target, backbone = Target(scope="token", kv=model.target.kv), model.detach()
    return [judge(attach(backbone, SkipPlan()), found, target, test, keep, static[keep], sides) for keep in keeps]


def judge(
    model: RoutedModel,
    found: TokenPlans,
    target: Target,
    test: Prompts,
    keep: float,
    static: Plan,
    sides: dict[str, Side],
) -> dict[str, Any]:
    """Return the lines of one keep rate; the model's backbone is free again afterwards."""
    count = next(n for n, step in enumerate(found.steps, 1) if step.keep <= keep + 1e-9)
    model = attach(model.detach(), found.policy(count, target))
    found.load(model.policy)  # type: ignore[arg-type]
    own = follow(model, test) | {k.rsplit(" ", 1)[0]: side for k, side in sides.items() if k.endswith(f" {keep:g}")}
    by_role = roles(model, test.batches, shared_prefix(test.batches))
    model.detach()
    lines = {name: side.line(own["greedy static"]) for name, side in own.items()}
    gone = sum(len(step.parts) for step in found.steps[:count])
    print(f"\nkeep {keep:g}, {len(test)} test prompts; static plan {static}; {gone} parts")
    for name, row in by_role.items():
        print(f"  tokens {name}: keep {row['keep']:.3f}, {row['of_skipped']:.0%} of what is skipped")
    for name, row in lines.items():
        figures = f"keep {row['keep']:.3f}  KL {row['kl']:.3f}  agreement {row['agreement']:.3f}"
        gap = f"{row['less']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]"
        print(f"  {name:16} {figures}  ratio {row['ratio']:.2f}  less {gap}")
    return {"keep": keep, "examples": len(test), "static": static, "skips": found.skips(count), "lines": lines,
            "tokens": by_role}  # fmt: skip


def plot(runs: Sequence[Sequence[dict[str, Any]]], file: Path) -> None:
    """Draw the runs' mean KL against keep, one curve a policy, and the single runs as small dots."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for place, name in enumerate(runs[0][0]["lines"]):
        points = torch.tensor([[[r["lines"][name][axis] for axis in ("keep", "kl")] for r in run] for run in runs])
        keep, kl = points.mean(0).T
        colour, marker = f"C{place}", "os^D"[place % 4]
        axes.plot(keep, kl, f"{marker}-", color=colour, label=name)
        axes.plot(*points.flatten(0, 1).T, ".", color=colour, markersize=4)
    axes.set_xlabel("keep: executed over dense decoder FLOPs")
    axes.set_ylabel("KL to the dense model (nats a token)")
    axes.set_ylim(0)
    axes.legend(frameon=False)
    figure.savefig(file, dpi=144, facecolor="white")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--keep", nargs="+", type=float, default=[0.9, 0.8, 0.7])
    parser.add_argument("--examples", type=int, default=240)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/smollm2.json"))
    parser.add_argument("--picture", type=Path, default=Path("docs/images/kl_by_keep.png"))
    options = parser.parse_args()
    results = {folder.name: compare(Run.open(folder), options.keep, options.examples) for folder in options.runs}
    setting = environment(0, "cpu") | {"command": shlex.join(["python", *sys.argv])}
    options.out.write_text(json.dumps({"environment": setting, "runs": results}, indent=1) + "\n")
    plot([*results.values()], options.picture)
    print(f"\n{options.out}, {options.picture}")


if __name__ == "__main__":
    main()
