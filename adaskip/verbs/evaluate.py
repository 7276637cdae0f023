"""`adaskip eval`: what a trained run is worth beside the dense model: accuracy, agreement, keep rate, seconds."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adaskip.batch import Batch
from adaskip.runfiles import EVALUATION, write_json
from adaskip.runtime.attach import RoutedModel
from adaskip.runtime.timing import timed
from adaskip.stages import SILENT, Stages
from adaskip.theory.costs import compare_predicted, per_input, predicted
from adaskip.training.data import Collator, Record, loader
from adaskip.verbs.generate import texts
from adaskip.verbs.lengths import check_room, longest_answer, reached_limit, tell_if_endless, warn_of_cuts
from adaskip.verbs.run import Run, check_writable, read_recipe
from adaskip.verbs.splits import check_split, split_of

_Figures = dict[str, list[float]]
"""Numbers by name: one an input, and of seconds and cut answers one a batch."""


@dataclass(frozen=True)
class KindFigures:
    """Hold the figures of the dense and the routed model on the inputs of one kind."""

    kind: str
    n: int
    dense_accuracy: float  # share of generated answers that are the data's own, word for word
    routed_accuracy: float
    agreement: float  # share of routed answers that are the dense ones
    dense_cut: int  # answers that ran into the limit
    routed_cut: int
    keep: float  # executed over dense decoder FLOPs, mean over inputs
    dense_s: float  # seconds of generation, sum over the kind's batches
    routed_s: float
    prefill_dense_s: float  # seconds of reading the prompts
    prefill_routed_s: float
    kl: float  # nats per predicted token of the data's own answers, which are read by teacher forcing
    dense_log_likelihood: float
    routed_log_likelihood: float
    flops_saved: float


@dataclass(frozen=True)
class EvaluationResult:
    """Hold a split answered by the dense and the routed model; ``evaluation.json`` holds `to_dict`."""

    split: str
    kinds: tuple[KindFigures, ...]
    batch_size: int
    max_new_tokens: int
    warnings: tuple[str, ...] = ()  # of answers that were cut
    example: dict[str, Any] | None = None  # one that `generate --example` has put there before

    @property
    def mean(self) -> dict[str, float]:
        """Average each figure over the kinds."""
        names = [field.name for field in fields(KindFigures) if field.name not in ("kind", "n")]
        return {name: statistics.fmean(getattr(row, name) for row in self.kinds) for name in names}

    def to_dict(self) -> dict[str, Any]:
        """Return what ``--json`` prints."""
        values = {
            "split": self.split,
            "kinds": [asdict(row) for row in self.kinds],
            "mean": self.mean,
            "batch_size": self.batch_size,
            "max_new_tokens": self.max_new_tokens,
            "warnings": list(self.warnings),
        }
        return values | ({"example": self.example} if self.example else {})


@torch.no_grad()
def evaluate(
    run: str | Path,
    split: str = "test",
    per_kind: int | None = None,
    batch_size: int = 64,
    max_new_tokens: int | None = None,
    stages: Stages = SILENT,
) -> EvaluationResult:
    """Answer a split with the dense and the routed model, kind by kind, interleaved in one process.

    Every batch holds one kind of question, so that seconds can be told apart by kind. Dense and routed runs of the same
    batch follow one another, in alternating order. The result is written into the run's folder, and its report made
    anew.

    Args:
        run: the run's folder.
        split: of its data.
        per_kind: at most so many inputs of each kind.
        batch_size: inputs at once.
        max_new_tokens: longest answer; default: the longest of the inputs' own, with its end token.
        stages: hears what is under way, and of answers that were cut.

    Raises:
        CheckpointError: the folder is no finished run, or cannot be written to.
        ConfigError, DataError: there is no such split, or no room for so long an answer.

    Example:
        ``adaskip.evaluate("runs/digits-vlm", per_kind=200).mean["routed_accuracy"]``
    """
    from adaskip import report

    folder = Path(run)
    recipe = read_recipe(folder)
    check_split(split)
    check_writable(folder, EVALUATION)
    previous = report.read(folder).evaluation  # a damaged file is said before the work
    groups = _by_kind(split_of(recipe, split, per_kind), per_kind)
    loaded = Run.open(folder, stages)
    chosen = [record for members in groups.values() for record in members]
    prompts = loader(chosen, Collator(loaded.processor, answers=False), batch_size)
    check_room(loaded.model, max_new_tokens, (batch.inputs["input_ids"] for batch in prompts))
    limit = max_new_tokens or longest_answer(chosen, loaded.processor)
    tell_if_endless(loaded.model, limit, stages)
    rows = _measure(loaded, groups, batch_size, limit, stages)
    counts = {"dense": sum(row.dense_cut for row in rows), "routed": sum(row.routed_cut for row in rows)}
    warnings = warn_of_cuts(counts, len(chosen), limit)
    for text in warnings:
        stages.note(text)
    result = EvaluationResult(split, tuple(rows), batch_size, limit, tuple(warnings), previous.get("example"))
    write_json(folder / EVALUATION, result.to_dict(), indent=2)
    report.write(folder)
    return result


def _by_kind(records: list[Record], per_kind: int | None) -> dict[str, list[Record]]:
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record.get("kind") or "all", []).append(record)
    return {kind: members[:per_kind] for kind, members in groups.items()}


def _measure(
    run: Run, groups: dict[str, list[Record]], batch_size: int, limit: int, stages: Stages
) -> list[KindFigures]:
    """Answer each kind by generation, then read its own answers by teacher forcing."""
    total, done = sum(map(len, groups.values())), 0
    rows = []
    with stages(f"answering {total} inputs, dense and routed", total) as advance:
        for kind, members in groups.items():
            figures: _Figures = {}
            # prompts alone, for an answer behind a prompt would be read as a part of it
            for place, batch in enumerate(loader(members, Collator(run.processor, answers=False), batch_size)):
                _extend(figures, _answer(run, batch.to(run.model.spec.device), limit, place))
                advance(done := done + len(batch))
            for batch in loader(members, Collator(run.processor), batch_size):
                _extend(figures, _teacher_forced(run.model, batch.to(run.model.spec.device)))
            rows.append(_summed(kind, len(members), figures))
    return rows


def _extend(figures: _Figures, more: _Figures) -> None:
    for name, values in more.items():
        figures.setdefault(name, []).extend(values)


def _summed(kind: str, n: int, figures: _Figures) -> KindFigures:
    values: dict[str, Any] = {
        name: sum(each) if name.endswith(("_s", "_cut")) else statistics.fmean(each) for name, each in figures.items()
    }
    return KindFigures(kind=kind, n=n, flops_saved=1 - values["keep"], **values)


def _answer(run: Run, batch: Batch, limit: int, place: int) -> _Figures:
    """Generate the answers of the ``place``-th batch, dense and routed, and take the seconds."""
    model, width = run.model, batch.inputs["input_ids"].shape[1]
    calls = _calls(model, batch, limit)
    if place == 0:  # the first call of a shape pays for allocation; it is not timed
        calls["dense"]()
        calls["routed"]()
    outputs, figures = {}, {}
    # every other batch goes through the calls backwards, so that a machine that slows down slows both sides alike
    for name in reversed(calls) if place % 2 else calls:
        outputs[name], seconds = timed(calls[name])
        figures[f"{name}_s"] = [seconds]
        if name == "routed":
            figures["keep"] = model.routing.keep_rate.tolist()
    answers = {}
    for name in ("dense", "routed"):
        tokens = outputs[name][:, width:]
        answers[name] = texts(run.processor, tokens)
        pairs = zip(batch.answer, answers[name], strict=True)
        figures[f"{name}_accuracy"] = [float(expected.strip() == answer) for expected, answer in pairs]
        figures[f"{name}_cut"] = [int(reached_limit(model, tokens, limit).sum())]
    figures["agreement"] = [float(a == b) for a, b in zip(answers["dense"], answers["routed"], strict=True)]
    return figures


def _calls(model: RoutedModel, batch: Batch, limit: int) -> dict[str, Callable[[], Any]]:
    """Name what is timed: generation and prefill, each dense and routed."""

    def generate() -> Any:
        return model.generate(**batch.inputs, max_new_tokens=limit, do_sample=False)

    def prefill() -> Any:
        return model(**batch.inputs, use_cache=True)

    def dense(call: Callable[[], Any]) -> Callable[[], Any]:
        def inside() -> Any:
            with model.dense():
                return call()

        return inside

    return {
        "dense": dense(generate),
        "routed": generate,
        "prefill_dense": dense(prefill),
        "prefill_routed": prefill,
    }


def _teacher_forced(model: RoutedModel, batch: Batch) -> _Figures:
    """Read the data's own answers: KL and log-likelihoods of each input, nats per predicted token."""
    supervised = batch.supervised
    targets = batch.labels[:, 1:][supervised]

    def likelihood(logits: Tensor) -> Tensor:
        log_p = logits.float().log_softmax(-1).gather(1, targets[:, None])[:, 0]
        return per_input(log_p, supervised, "mean").double()

    with model.dense():
        dense = predicted(model(**batch.arguments()).logits, supervised)
    routed = predicted(model(**batch.arguments()).logits, supervised)
    columns = {
        "kl": compare_predicted(dense, routed, supervised)["kl"].double(),
        "dense_log_likelihood": likelihood(dense),
        "routed_log_likelihood": likelihood(routed),
    }
    return {name: column.tolist() for name, column in columns.items()}
