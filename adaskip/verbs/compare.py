"""`adaskip compare`: every policy at every budget on the same inputs; what each recovers, costs and saves."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast, get_args

import torch

from adaskip import sources
from adaskip.errors import ConfigError, DataError
from adaskip.methods.evidence import Evidence
from adaskip.methods.method import METHODS, Method, find
from adaskip.methods.skip_it import TOLERANCE
from adaskip.plan import KV, Group, SkipPlan
from adaskip.recipe import Recipe
from adaskip.report.pareto import comparison_table, pareto_plot
from adaskip.runfiles import COMPARISON, COMPARISON_PLOT, COMPARISON_TABLE, RECIPE, write_json, write_text
from adaskip.runtime.attach import RoutedModel, attach
from adaskip.stages import SILENT, Stages
from adaskip.survey.oracle import find_oracle
from adaskip.survey.skips import measure_skips
from adaskip.theory.admission import agree
from adaskip.training.data import Collator, NumberedBatches, Record, load_records, loader
from adaskip.training.tracking import Board, environment, wandb_logger
from adaskip.verbs.cells import Cell, DenseLogits, cell_name, measure_cell
from adaskip.verbs.entries import Entry, read_entries, read_named, with_target
from adaskip.verbs.run import Run, check_writable, load_model, load_processor, read_recipe
from adaskip.verbs.splits import check_split
from adaskip.verbs.standings import standings
from adaskip.verbs.start import check_tracking

BUDGETS = (0.9, 0.8, 0.7, 0.6, 0.5)
_CELLS = "cells"
_SETTINGS = "settings.json"
_JUDGED = 200
"""Inputs that the agreement with the theory is judged on, at most."""


@dataclass(frozen=True)
class Comparison:
    """Hold all policies at all budgets on the same inputs."""

    folder: Path
    rows: list[dict[str, Any]]  # one a policy and budget, seeds averaged; see `standings`
    left_out: list[str]  # policies that do not speak of this group, or cannot hold a budget, and why
    agreement: list[dict[str, Any]]  # what each skips against what the theory admits
    admitted: list[int]
    oracle: list[dict[str, Any]]  # a plan of each input's own, of a sample
    setting: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return what ``--json`` prints and ``compare.json`` holds."""
        return {**asdict(self), "folder": str(self.folder), "picture": str(self.folder / COMPARISON_PLOT)}


@dataclass(frozen=True)
class _Subject:
    """Hold what is compared on: a backbone without a policy, records, and how they become batches."""

    recipe: Recipe | None
    model: str
    source: str
    group: Group
    processor: Any
    backbone: Any

    def records(self, split: str, count: int) -> list[Record]:
        columns = None if self.recipe is None else self.recipe.data.columns.model_dump()
        return load_records(self.source, split, count, 0, columns)


def compare(
    target: str | Path,
    data: str | None = None,
    *,
    policies: Sequence[str] | None = None,
    budgets: Sequence[float] = BUDGETS,
    group: str | None = None,
    runs: Sequence[str | Path] = (),
    split: str = "test",
    examples: int = 600,
    fit: int = 200,
    seeds: int = 3,
    batch_size: int = 64,
    new_tokens: int = 8,
    oracle: int = 0,
    output: str | Path | None = None,
    wandb: str = "disabled",
    stages: Stages = SILENT,
) -> Comparison:
    """Choose layers by every method at every budget, run the plans and finished runs on the same inputs, and compare.

    Every cell, one policy at one budget and seed, is stored as it is done: a comparison that was stopped goes on, and
    a policy that is added later costs its own cells alone.

    Args:
        target: a Hugging Face id, a folder, ``digits-vlm``, or the folder of a run, whose model, data and group are
            then taken, and which is compared too.
        data: a folder of JSON lines, or a dataset id; default: the run's, or the demo's for the demo.
        policies: names of methods; default: all that speak of the group. ``none`` and ``random`` are always there.
        budgets: executed over dense decoder FLOPs that plans may keep, mean over the inputs that they are fitted on.
        group: ``all`` or ``vision``; default: the run's, or ``all``.
        runs: folders of finished runs on the same model and group, each compared at the budget it was trained for;
            ``LABEL=FOLDER`` gives one a name of its own, so that runs of one method stand apart.
        split: that is judged on.
        examples: inputs of it.
        fit: inputs of split ``train`` that plans are chosen by.
        seeds: draws of a method that draws.
        batch_size: inputs at once, also where seconds are taken.
        new_tokens: generated where seconds are taken.
        oracle: so many inputs also get a plan of their own at every budget; 0: none.
        output: the folder; default ``runs/compare-NAME-GROUP``.
        wandb: ``offline`` or ``online``: the rows and the picture also go to Weights & Biases.
        stages: hears what is under way.

    Raises:
        ConfigError, DataError: no such method, group, split or budget, or the folder holds another comparison.
        CheckpointError: no such run, or a file of the comparison is damaged.
    """
    chosen, named = _check(policies, budgets, group, split, seeds), read_named(runs)
    mode = check_tracking(wandb, "--wandb", "--wandb offline")
    subject = _open(target, data, group)
    folder = Path(output or f"runs/compare-{Path(subject.model).name}-{subject.group}")
    check_writable(folder, "the comparison", "choose another folder: --output DIR")
    if subject.recipe is not None:
        named = with_target(Path(target), named)
    setting = {
        "model": subject.model, "data": subject.source, "group": subject.group, "split": split, "examples": examples,
        "fit": fit, "batch_size": batch_size, "new_tokens": new_tokens,
    }  # fmt: skip
    _claim(folder, setting)
    entries = read_entries(named, subject.model, subject.group, folder / _CELLS)
    bench = _Bench(subject, folder, setting, stages)
    left_out = [text for method in chosen for text in bench.method(method, budgets, seeds)]
    for entry in entries:
        bench.run(entry)
    found = bench.conclude(left_out, oracle, budgets)
    if mode != "disabled":
        board = Board([wandb_logger(folder, mode, "adaskip", None, ["compare"], found.setting)])
        board.comparison(found.rows, folder / COMPARISON_PLOT)
        board.finish()
    return found


class _Bench:
    """Fill the cells of one comparison."""

    def __init__(self, subject: _Subject, folder: Path, setting: dict[str, Any], stages: Stages) -> None:
        self.subject, self.folder, self.setting, self.stages = subject, folder, setting, stages
        self.size, collate = setting["batch_size"], Collator(subject.processor)
        self.test = subject.records(setting["split"], setting["examples"])
        self.device = subject.backbone.device
        self.dense = DenseLogits([batch.to(self.device) for batch in loader(self.test, collate, self.size)])
        prompts = next(iter(loader(self.test, Collator(subject.processor, answers=False), self.size)))
        self.prompts = prompts.to(self.device)
        fitted = subject.records("train", setting["fit"])
        self.fitted, self.count = NumberedBatches(fitted, collate, self.device, self.size), len(fitted)
        self.cells: list[Cell] = []
        self._evidence: dict[KV, Evidence] = {}

    def method(self, method: Method, budgets: Sequence[float], seeds: int) -> list[str]:
        """Fill a method's cells; return why not, for each budget that it cannot hold."""
        reasons: dict[str, None] = {}
        wanted = [
            (budget, seed)
            for budget in (budgets if method.name != "none" else (1.0,))
            for seed in range(seeds if method.draws else 1)
        ]
        with self.stages(f"{method.name}: {len(wanted)} cells", len(wanted)) as advance:
            for place, (budget, seed) in enumerate(wanted, 1):
                try:
                    self._cell(method, budget, seed)
                except ConfigError as error:
                    reasons[str(error)] = None
                advance(place)
        return [*reasons]

    def run(self, entry: Entry) -> None:
        """Fill the cell of a finished run."""
        if entry.file.is_file():
            self.cells.append(Cell.read(entry.file))
            return
        with self.stages(f"{entry.folder}: the policy of keep {entry.keep:g}", len(self.test)) as advance:
            model = Run.open(entry.folder).model
            self._measure(model, entry.policy, entry.keep, entry.seed, entry.origin, advance)

    def conclude(self, left_out: list[str], oracle: int, budgets: Sequence[float]) -> Comparison:
        """Read all cells that the folder holds, also of earlier calls, and write table, picture and JSON."""
        known = {cell.name for cell in self.cells}
        others = [Cell.read(file) for file in sorted((self.folder / _CELLS).glob("*.json")) if file.stem not in known]
        rows = standings([*self.cells, *others])
        admitted, agreement = self._agreement([*self.cells, *others])
        found = Comparison(
            self.folder, rows, left_out, agreement, admitted, self._oracle(oracle, budgets),
            self.setting | {"environment": environment(0, str(self.device))},
        )  # fmt: skip
        write_json(self.folder / COMPARISON, found.to_dict(), indent=1)
        write_text(self.folder / COMPARISON_TABLE, comparison_table(rows))
        pareto_plot(rows, self.folder / COMPARISON_PLOT)
        return found

    @contextmanager
    def _attached(self, empty: SkipPlan) -> Iterator[Evidence]:
        """Attach what evidence is measured through for as long as the context lasts; what was measured stays known."""
        model = attach(self.subject.backbone, empty)
        if empty.kv not in self._evidence:
            folder = self.folder / f"prices-{empty.kv}"
            folder.mkdir(exist_ok=True)
            self._evidence[empty.kv] = Evidence(model, self.fitted, self.count, folder)
        evidence = self._evidence[empty.kv]
        evidence.model = model
        try:
            yield evidence
        finally:
            model.detach()

    def _cell(self, method: Method, budget: float, seed: int) -> None:
        file = self._file(method.name, budget, seed)
        if file.is_file():
            self.cells.append(Cell.read(file))
            return
        with self._attached(method.empty(self.subject.group)) as evidence:
            policy = method.policy(evidence, budget, seed)
        model = attach(self.subject.backbone, policy)
        try:
            self._measure(model, method.name, budget, seed)
        finally:
            model.detach()

    def _measure(
        self, model: RoutedModel, policy: str, budget: float, seed: int, origin: str = "", advance: Any = lambda n: None
    ) -> None:
        cell = measure_cell(
            model, self.dense, self.prompts, policy=policy, budget=budget, seed=seed,
            new_tokens=self.setting["new_tokens"], origin=origin, advance=advance,
        )  # fmt: skip
        cell.write(self.folder / _CELLS)
        self.cells.append(cell)

    def _file(self, policy: str, budget: float, seed: int) -> Path:
        return self.folder / _CELLS / f"{cell_name(policy, budget, seed)}.json"

    def _agreement(self, cells: Sequence[Cell]) -> tuple[list[int], list[dict[str, Any]]]:
        """Hold every cell against the verdicts, on inputs that neither was fitted on."""
        try:
            with self.stages("verdicts on every layer"), self._attached(SkipPlan(group=self.subject.group)) as evidence:
                verdicts = evidence.findings(TOLERANCE).layers
                some = self.dense.batches[: max(1, _JUDGED // self.size)]
                cost = measure_skips(evidence.model, some).kl
        except DataError as error:
            self.stages.note(f"no agreement with the theory is told: {error}")
            return [], []
        admitted = [layer for layer, verdict in verdicts.items() if verdict == "admissible"]
        rows = []
        for cell in cells:
            if cell.policy != "none":
                found = agree(1 - torch.tensor(cell.runs), admitted, cost)
                rows.append({"policy": cell.policy, "budget": cell.budget, "seed": cell.seed, **found.to_dict()})
        return admitted, rows

    def _oracle(self, inputs: int, budgets: Sequence[float]) -> list[dict[str, Any]]:
        """Search a plan of each input's own, at every budget."""
        if not inputs:
            return []
        some = NumberedBatches(self.test, Collator(self.subject.processor), self.device, self.size)
        found = []
        with self._attached(SkipPlan(group=self.subject.group)) as evidence:
            saved = float(evidence.saves.mean())
            for budget in budgets:
                skips = min(evidence.layers, max(1, round((1 - budget) / saved)))
                found.append({"budget": budget} | find_oracle(
                    evidence.model, some, min(inputs, len(self.test)), skips=skips, stages=self.stages
                ).to_dict())  # fmt: skip
        return found


def read_budgets(text: str) -> tuple[float, ...]:
    """Read budgets out of what was typed.

    Raises:
        ConfigError: no list of numbers.

    >>> read_budgets("0.9, 0.5")
    (0.9, 0.5)
    """
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"compare: expected --budgets as numbers, such as 0.9,0.7, got {text!r}") from None


def _check(
    policies: Sequence[str] | None, budgets: Sequence[float], group: str | None, split: str, seeds: int
) -> list[Method]:
    """Refuse what cannot be compared, before anything is loaded; return the methods, the controls among them."""
    check_split(split)
    if split == "train":
        raise ConfigError("compare: --split train: plans are chosen by it; judge on test or validation")
    if group not in (None, *get_args(Group)):
        raise ConfigError(f"compare: expected --group all or vision, got {group!r}")
    if wrong := [budget for budget in budgets if not 0 < budget <= 1]:
        raise ConfigError(f"compare: expected --budgets in (0, 1], such as 0.9,0.7, got {wrong[0]:g}")
    if seeds < 1:
        raise ConfigError(f"compare: expected --seeds of at least 1, got {seeds}")
    names = METHODS if policies is None else ("none", "random", *policies)
    return [find(name) for name in dict.fromkeys(names)]


def _open(target: str | Path, data: str | None, group: str | None) -> _Subject:
    """Load the model that is compared on, and find its data."""
    if (Path(target) / RECIPE).is_file():
        recipe = read_recipe(Path(target))
        own = recipe.router.group
        if group not in (None, own):
            raise ConfigError(f"compare: {target} routes group {own}; leave --group out, or name a model instead")
        source = data or recipe.data.source
        backbone = load_model(recipe)
        if torch.cuda.is_available() and not recipe.backbone.device_map:
            torch.nn.Module.cuda(backbone)
        return _Subject(recipe, recipe.backbone.path, source, own, load_processor(recipe), backbone)
    from adaskip.backbone import load

    name = str(target)
    if data is None and not sources.is_shipped(name):
        raise ConfigError(f"compare: {name} needs prompts with answers; name them: --data DIR (or a dataset id)")
    backbone = load.load_backbone(name)
    if torch.cuda.is_available():
        torch.nn.Module.cuda(backbone)
    return _Subject(None, name, data or name, cast(Group, group or "all"), load.load_processor(name), backbone)


def _claim(folder: Path, setting: dict[str, Any]) -> None:
    """Make the folder this comparison's, and refuse one that holds another."""
    file = folder / _SETTINGS
    (folder / _CELLS).mkdir(parents=True, exist_ok=True)
    if not file.is_file():
        write_json(file, setting, indent=1)
        return
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file}: cannot be read ({error}); choose another folder: --output {folder}-2") from error
    if differs := [f"{key}={stored.get(key)!r}" for key in setting if stored.get(key) != setting[key]]:
        raise ConfigError(
            f"{folder}: holds a comparison with {', '.join(differs)}; choose another folder: --output {folder}-2"
        )
