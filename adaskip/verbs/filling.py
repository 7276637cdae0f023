"""Fill the cells of one comparison, those that its folder does not hold, and put them together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from adaskip.errors import BackboneError, ConfigError, DataError
from adaskip.methods.evidence import Evidence
from adaskip.methods.method import Method
from adaskip.methods.skip_it import TOLERANCE
from adaskip.plan import KV, SkipPlan
from adaskip.report.pareto import comparison_table, pareto_plot
from adaskip.runfiles import COMPARISON, COMPARISON_PLOT, COMPARISON_TABLE, write_json, write_text
from adaskip.runtime.attach import RoutedModel, attach
from adaskip.sites import Label, Unit
from adaskip.stages import Stages
from adaskip.survey.oracle import find_oracle
from adaskip.survey.skips import measure_skips
from adaskip.theory.admission import agree
from adaskip.training.data import Collator, NumberedBatches, Record, loader
from adaskip.training.tracking import environment
from adaskip.verbs.cells import CELLS, Cell, DenseLogits, cell_name, measure_cell
from adaskip.verbs.entries import Entry, Named, read_entries
from adaskip.verbs.run import Run
from adaskip.verbs.sample import Sample
from adaskip.verbs.standings import standings
from adaskip.verbs.subject import Subject
from adaskip.verbs.trained import Training

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
class _Verdicts:
    """Hold which sites may be left out, and what leaving out each alone costs other inputs."""

    admitted: list[int]
    labels: list[Label]
    cost: torch.Tensor  # (n s) nats per predicted token


class Filling:
    """Fill the cells of one comparison."""

    def __init__(
        self, subject: Subject, test: Sequence[Record], fitted: Sequence[Record], folder: Path, setting: dict[str, Any],
        stages: Stages,
    ) -> None:  # fmt: skip
        self.subject, self.folder, self.setting, self.stages = subject, folder, setting, stages
        self.size, collate = setting["batch_size"], Collator(subject.processor)
        self.test = test
        self.device = subject.backbone.device
        self.dense = DenseLogits([batch.to(self.device) for batch in loader(self.test, collate, self.size)])
        prompts = next(iter(loader(self.test, Collator(subject.processor, answers=False), self.size)))
        self.prompts = prompts.to(self.device)
        self.sample = Sample(self.test[: setting["generate"]], subject.processor, self.size, self.device)
        self.fitted, self.count = NumberedBatches(fitted, collate, self.device, self.size), len(fitted)
        self.cells: list[Cell] = []
        self._evidence: dict[tuple[Unit, KV], Evidence] = {}

    def method(self, method: Method, budgets: Sequence[float], seeds: int) -> list[str]:
        """Fill a method's cells; return why not, for each budget that it cannot hold."""
        reasons: dict[str, list[float]] = {}
        wanted = [
            (budget, seed)
            for budget in (budgets if method.name != "none" else (1.0,))
            for seed in range(seeds if method.draws else 1)
        ]
        with self.stages(f"{method.name}: {len(wanted)} cells", len(wanted)) as advance:
            for place, (budget, seed) in enumerate(wanted, 1):
                try:
                    self._cell(method, budget, seed)
                except (ConfigError, DataError, BackboneError) as error:  # the model may refuse to be split into halves
                    reasons.setdefault(str(error), []).append(budget)
                advance(place)
        return [
            f"{method.name} at keep {', '.join(f'{keep:g}' for keep in at)}: {text}" for text, at in reasons.items()
        ]

    def run(self, entry: Entry) -> None:
        """Fill the cell of a finished run."""
        if entry.file.is_file():
            self.cells.append(Cell.read(entry.file))
            return
        with self.stages(f"{entry.folder}: the policy of keep {entry.keep:g}", len(self.test)) as advance:
            model = Run.open(entry.folder).model
            self._measure(model, entry.policy, entry.keep, entry.seed, entry.origin, entry.recipe, advance)

    def train(self, training: Training) -> list[str]:
        """Train a run and fill its cell; return why not, where that is known."""
        cells = self.folder / CELLS
        if not training.cell(cells).is_file():
            try:
                training.run(self.stages)
            except (ConfigError, DataError) as error:
                return [f"{training.policy} at keep {training.recipe.objective.keep:g}: {error}"]
        named = [Named(training.folder, training.policy)]
        (entry,) = read_entries(named, self.subject, cells)
        self.run(entry)
        return []

    def conclude(self, left_out: list[str], oracle: int, budgets: Sequence[float]) -> Comparison:
        """Read all cells that the folder holds, also of earlier calls, and write table, picture and JSON."""
        known = {cell.name: cell for cell in self.cells}  # each once, however often it was asked for
        others = [Cell.read(file) for file in sorted((self.folder / CELLS).glob("*.json")) if file.stem not in known]
        cells = [*known.values(), *others]
        rows = standings(cells)
        admitted, agreement = self._agreement(cells)
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
        key = empty.unit, empty.kv
        if key not in self._evidence:
            folder = self.folder / "-".join(["prices", *([empty.unit] if empty.unit != "block" else []), empty.kv])
            folder.mkdir(exist_ok=True)
            self._evidence[key] = Evidence(model, self.fitted, self.count, folder)
        evidence = self._evidence[key]
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
        self, model: RoutedModel, policy: str, budget: float, seed: int, origin: str = "", recipe: str = "",
        advance: Any = lambda n: None,
    ) -> None:  # fmt: skip
        cell = measure_cell(
            model, self.dense, self.prompts, self.sample, policy=policy, budget=budget, seed=seed,
            new_tokens=self.setting["new_tokens"], origin=origin, recipe=recipe, advance=advance,
        )  # fmt: skip
        cell.write(self.folder / CELLS)
        self.cells.append(cell)

    def _file(self, policy: str, budget: float, seed: int) -> Path:
        return self.folder / CELLS / f"{cell_name(policy, budget, seed)}.json"

    def _agreement(self, cells: Sequence[Cell]) -> tuple[list[int], list[dict[str, Any]]]:
        """Hold every cell against the verdicts on what it leaves out, on inputs that neither was fitted on."""
        try:
            layers = self._verdicts(SkipPlan(group=self.subject.group))
        except DataError as error:
            self.stages.note(f"no agreement with the theory is told: {error}")
            return [], []
        known, rows = {("block", "absent"): layers}, []
        for cell in cells:
            if cell.policy == "none":
                continue
            if (key := (cell.unit, cell.kv)) not in known:
                known[key] = self._verdicts(SkipPlan(group=self.subject.group, unit=cell.unit, kv=cell.kv))
            verdicts = known[key]
            if len(cell.runs) == verdicts.cost.shape[1]:  # a cell of an earlier version does not say what it leaves out
                found = agree(1 - torch.tensor(cell.runs), verdicts.admitted, verdicts.cost)
                said = {"policy": cell.policy, "budget": cell.budget, "seed": cell.seed, "unit": cell.unit}
                rows.append(said | {"kv": cell.kv, "admitted": verdicts.labels, **found.to_dict()})
        return layers.admitted, rows

    def _verdicts(self, empty: SkipPlan) -> _Verdicts:
        """Judge what an empty plan could leave out.

        Raises:
            DataError: too few inputs.
        """
        what = "layer" if empty.unit == "block" else f"site of unit {empty.unit}"
        with self.stages(f"verdicts on every {what}, keys {empty.kv}"), self._attached(empty) as evidence:
            verdicts = evidence.findings(TOLERANCE).layers
            some = self.dense.batches[: max(1, _JUDGED // self.size)]
            cost = measure_skips(evidence.model, some).kl
            admitted = [site for site, verdict in verdicts.items() if verdict == "admissible"]
            return _Verdicts(admitted, [*evidence.model.sites.labels(admitted)], cost)

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
