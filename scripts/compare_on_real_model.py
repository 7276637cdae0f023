"""Every policy on a real language model, held against greedy static plans of the same compute on test prompts.

    adaskip train smollm2 output=runs/smollm2-90
    adaskip train smollm2 output=runs/smollm2-80 objective.keep=0.8
    python scripts/compare_on_real_model.py runs/smollm2-90 runs/smollm2-80

Each run is one of method path-bank, of a keep rate of its own. On prompts of the test split, which nothing was fitted
on: the bank as it decides, really executed; the best static plan, as the run found it by exact costs; the plan of the
same length by block influence (the layers that turn the states least, mean cosine over calibration prompts), and two
random ones. Two more rows choose among the bank's own paths by what a router does not know: one path for every kind of
prompt, by the mean costs of that kind in training, and one for every prompt, by what it really costs it. Differences
are paired over prompts, with 95 % bootstrap intervals. Costs once measured stay in the first run's folder. Writes a
table, a JSON file, and a picture of KL against keep.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from adaskip.batch import Batch
from adaskip.plan import SkipPlan
from adaskip.policies.path_bank import PathBank
from adaskip.runfiles import BANK_PRICES, LEARNED, ROUTER, SUMMARY
from adaskip.runtime.attach import RoutedModel, attach
from adaskip.survey.bank import choose, lowest_price
from adaskip.survey.greedy import Path as Plan
from adaskip.survey.greedy import exact_prices
from adaskip.survey.ledger import Ledger
from adaskip.survey.record import Recorded, record
from adaskip.survey.static import whole_rows
from adaskip.theory.costs import per_input
from adaskip.theory.intervals import paired_difference
from adaskip.theory.measures import cosine_distance
from adaskip.training.data import Collator, Record, load_records
from adaskip.training.tracking import environment
from adaskip.verbs.bank import by_length
from adaskip.verbs.run import Run

TEST_PRICES = "test-prices.safetensors"
DRAWS = 2
"""Random plans of each length."""


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
    def kinds(self) -> list[str]:
        return [str(record.get("kind")) for record in self.records]


def follow(model: RoutedModel, prompts: Prompts, plans: dict[str, Plan]) -> dict[str, dict[str, Tensor]]:
    """Return KL, token agreement and keep rate of every prompt, as the model decides and under plans; float64 (n)."""
    found: dict[str, dict[str, list[Tensor]]] = {}

    def add(name: str, dense: Recorded, logits: Tensor, supervised: Tensor) -> None:
        columns = found.setdefault(name, {"kl": [], "agreement": [], "keep": []})
        same = (logits.argmax(-1) == dense.logits.argmax(-1)).double()
        columns["kl"].append(dense.compare(logits)["kl"].double())
        columns["agreement"].append(per_input(same, supervised, "mean"))
        columns["keep"].append(model.routing.keep_rate.double())

    for batch in prompts(range(len(prompts))):
        dense, supervised = record(model, batch), batch.supervised
        add("path bank", dense, record(model, batch, routed=True, states=False).logits, supervised)
        for name, plan in plans.items():
            add(name, dense, dense.rerun(dense.skipping(plan)), supervised)
    return {name: {key: torch.cat(parts) for key, parts in columns.items()} for name, columns in found.items()}


@torch.no_grad()
def influence(model: RoutedModel, prompts: Prompts, rows: int) -> list[int]:
    """Return the layers by their block influence, least first: 1 - cos of a token's state before and after, mean."""
    turned = []
    for batch in prompts(range(min(rows, len(prompts)))):
        dense = record(model, batch)
        pairs = zip(dense.entered, dense.states[1:], strict=True)
        turned.append(torch.stack([cosine_distance(a, b, dense.tokens.valid).mean() for a, b in pairs]))
    return torch.stack(turned).mean(0).argsort().tolist()


def by_kind(train: Tensor, kinds: Sequence[str], fresh: Sequence[str], share: Tensor, keep: float) -> Tensor:
    """Return the path that each fresh prompt takes by its kind alone, long (n), given training costs (m k)."""
    names = sorted({*kinds})
    means = torch.stack([train[torch.tensor([kind == name for kind in kinds])].mean(0) for name in names])
    costs = means[torch.tensor([names.index(kind) for kind in fresh])]
    return choose(costs, share, lowest_price(costs, share, keep))


def line(values: dict[str, Tensor], static: dict[str, Tensor]) -> dict[str, Any]:
    """Return the means of a policy, and how much less it costs than the static plan."""
    gap = paired_difference(static["kl"], values["kl"])
    means = {name: float(column.mean()) for name, column in values.items()}
    ratio = means["kl"] / float(static["kl"].mean())
    return means | {"ratio": ratio, "less": gap.estimate, "low": gap.low, "high": gap.high}


def judge(run: Run, first: Path, examples: int) -> dict[str, Any]:
    """Return the lines of one run's keep rate."""
    recipe, size = run.recipe, run.recipe.trainer.batch_size
    collate = Collator(run.processor)
    keep, section = recipe.objective.keep, recipe.bank
    test = Prompts(load_records(recipe.data.source, "test", examples, recipe.seed), collate, size)
    train = Prompts(load_records(recipe.data.source, "train", section.examples, recipe.seed), collate, size)
    fresh = Prompts(load_records(recipe.data.source, "calibration", size, recipe.seed), collate, size)
    summary = json.loads((run.folder / SUMMARY).read_text())
    static = tuple(summary["static"]["skip"])
    learned = run.folder / (LEARNED if (run.folder / LEARNED).is_dir() else ROUTER)
    model = RoutedModel.from_pretrained(learned, run.model.detach())
    policy = model.policy
    assert isinstance(policy, PathBank)
    layers = len(model.spec.layers)
    ranked = influence(model, fresh, size)[: len(static)]
    plans = {"greedy static": static, "block influence": tuple(sorted(ranked))}
    for draw in range(DRAWS):  # as the field does, of the layers between the first and the last
        chosen = random.Random(draw).sample(range(2, layers - 1), len(static))
        plans[f"random {draw + 1}"] = tuple(sorted(chosen))
    rows = follow(model, test, plans)

    share = policy.share.double()
    paths = [tuple(path) for path in policy.paths]
    plain = attach(model.detach(), SkipPlan(**whole_rows(policy.target)))
    costs = Ledger(exact_prices(plain, test), len(test), first / TEST_PRICES)(paths, range(len(test)))
    known = Ledger(exact_prices(plain, train), len(train), run.folder / BANK_PRICES)(paths, range(len(train)))
    everyone = torch.arange(len(test))
    chosen = {
        "path by kind": by_kind(known, train.kinds, test.kinds, share, keep),
        "bank with hindsight": choose(costs, share, lowest_price(costs, share, keep)),
    }
    for name, path in chosen.items():
        rows[name] = {"kl": costs[everyone, path], "keep": share[path]}
    print(f"\nkeep {keep:g}, {len(test)} test prompts, {len(paths)} paths, static plan {static}")
    lines = {name: line(values, rows["greedy static"]) for name, values in rows.items()}
    for name, row in lines.items():
        agreement = f"{row['agreement']:.3f}" if "agreement" in row else "-"
        gap = f"{row['less']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]"
        figures = f"keep {row['keep']:.3f}  KL {row['kl']:.3f}  ratio {row['ratio']:.2f}"
        print(f"  {name:22} {figures}  less {gap}  agreement {agreement}")
    found = {"run": run.folder.name, "keep": keep, "examples": len(test), "static": static, "paths": paths}
    return found | {"lines": lines}


def plot(results: Sequence[dict[str, Any]], file: Path) -> None:
    """Draw KL against keep, one curve a policy."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for place, name in enumerate(results[0]["lines"]):
        points = sorted((r["lines"][name]["keep"], r["lines"][name]["kl"]) for r in results if name in r["lines"])
        axes.plot(*zip(*points, strict=True), "osv^DPX*"[place % 8] + "-", label=name)
    axes.set_xlabel("keep: executed over dense decoder FLOPs")
    axes.set_ylabel("KL to the dense model (nats a token)")
    axes.set_ylim(0)
    axes.legend(frameon=False)
    figure.savefig(file, dpi=144, facecolor="white")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--examples", type=int, default=240)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/real-model.json"))
    parser.add_argument("--picture", type=Path, default=Path("docs/images/kl_by_keep.png"))
    options = parser.parse_args()
    results = [judge(Run.open(folder), options.runs[0], options.examples) for folder in options.runs]
    setting = environment(0, "cpu") | {"command": shlex.join(["python", *sys.argv])}
    options.out.write_text(json.dumps({"environment": setting, "keeps": results}, indent=1) + "\n")
    plot(results, options.picture)
    print(f"\n{options.out}, {options.picture}")


if __name__ == "__main__":
    main()
