"""`adaskip eval`: what a trained run is worth beside the dense model: accuracy, agreement, keep rate, seconds."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adaskip.batch import Batch
from adaskip.demo.backbone import EMBEDDED
from adaskip.recipe import Recipe
from adaskip.runtime.attach import RoutedModel
from adaskip.runtime.measure import timed
from adaskip.stages import SILENT, Advance, Stages
from adaskip.theory.costs import compare_predicted, per_input, predicted
from adaskip.training.data import Collator, Record, load_records, loader
from adaskip.training.tracking import write_text
from adaskip.verbs.generate import texts
from adaskip.verbs.lengths import cut, longest_answer, warn_of_cuts
from adaskip.verbs.run import Run, check_split, check_writable, open_run, read_recipe, split_of

EVALUATION = "evaluation.json"


@torch.no_grad()
def evaluate(
    run: Path,
    split: str = "test",
    per_kind: int | None = None,
    batch_size: int = 64,
    max_new_tokens: int | None = None,
    stages: Stages = SILENT,
) -> dict[str, Any]:
    """Answer a split with the dense and the routed model, kind by kind, interleaved in one process.

    Every batch holds one kind of question, so that seconds can be told apart by kind. Dense and routed runs of the same
    batch follow one another, in alternating order. Accuracy is the exact match of the whole generated answer, agreement
    that of the routed with the dense one. Apart from generation, the answers of the data are read by teacher forcing:
    what the routed model's predictions differ from the dense ones, and how likely each finds them.

    Args:
        run: the run's folder.
        split: of its data.
        per_kind: at most so many inputs of each kind.
        batch_size: inputs at once.
        max_new_tokens: longest answer; default: the longest of the inputs' own, with its end token.
        stages: hears what is under way, and of answers that were cut.

    Returns:
        ``kinds``: rows with ``kind, n``; of generation ``dense_accuracy, routed_accuracy, agreement, dense_cut,
        routed_cut, keep, flops_saved`` and the seconds ``dense_s, routed_s, prefill_dense_s, prefill_routed_s`` (sums
        over the kind's batches); teacher-forced ``kl`` and ``dense_log_likelihood, routed_log_likelihood`` (nats per
        predicted token); ``mean``: over kinds; ``warnings``. Also written to ``evaluation.json`` in the run folder, and
        the report is made anew.
    """
    from adaskip import report

    folder = Path(run)
    recipe = read_recipe(folder)
    check_split(split)
    check_writable(folder, EVALUATION)
    previous = report.read(folder).evaluation  # a damaged file is said before the work
    groups = _by_kind(_enough(recipe, split, per_kind), per_kind)
    loaded = open_run(folder, stages)
    chosen = [record for members in groups.values() for record in members]
    limit = max_new_tokens or longest_answer(chosen, loaded.processor)
    rows, done = [], 0
    with stages(f"answering {len(chosen)} inputs, dense and routed", len(chosen)) as advance:
        for kind, members in groups.items():
            rows.append(_evaluate_kind(loaded, kind, members, batch_size, limit, partial(_ahead, advance, done)))
            done += len(members)
    mean = {k: statistics.fmean(r[k] for r in rows) for k in rows[0] if k not in ("kind", "n")}
    counts = {side: sum(row[f"{side}_cut"] for row in rows) for side in ("dense", "routed")}
    warnings = warn_of_cuts(counts, len(chosen), limit)
    for text in warnings:
        stages.note(text)
    found = {"split": split, "kinds": rows, "mean": mean, "batch_size": batch_size}
    found |= {"max_new_tokens": limit, "warnings": warnings}
    found |= {"example": previous["example"]} if previous.get("example") else {}
    write_text(folder / EVALUATION, json.dumps(found, indent=2) + "\n")
    report.write(folder)
    return found


def _ahead(advance: Advance, before: int, done: int) -> None:
    advance(before + done)


def _evaluate_kind(
    run: Run, kind: str, members: list[Record], batch_size: int, limit: int, advance: Callable[[int], None]
) -> dict[str, Any]:
    """The row of one kind of question."""
    model, device = run.model, run.model.spec.device
    each: dict[str, list[float]] = {}  # one number an input, and one a batch for seconds
    done = 0
    for place, batch in enumerate(loader(members, Collator(run.processor, answers=False), batch_size)):
        figures = _generate(run, batch.to(device), limit, place)
        for name, values in figures.items():
            each.setdefault(name, []).extend(values)
        advance(done := done + len(batch))
    for batch in loader(members, Collator(run.processor), batch_size):
        for name, column in _teacher_forced(model, batch.to(device)).items():
            each.setdefault(name, []).extend(column.tolist())
    row: dict[str, Any] = {"kind": kind, "n": len(members)}
    for name, values in each.items():
        row[name] = sum(values) if name.endswith(("_s", "_cut")) else statistics.fmean(values)
    return row | {"flops_saved": 1 - row["keep"]}


def _generate(run: Run, batch: Batch, limit: int, place: int) -> dict[str, list[float]]:
    """Generated answers of one batch, dense and routed in alternating order, with their seconds."""
    model, inputs = run.model, batch.inputs
    options: dict[str, Any] = {"max_new_tokens": limit, "do_sample": False}

    def dense() -> Any:
        with model.dense():
            return model.generate(**inputs, **options)

    def routed() -> Any:
        return model.generate(**inputs, **options)

    def prefill() -> Any:
        return model(**inputs, use_cache=True)

    def prefill_dense() -> Any:
        with model.dense():
            return model(**inputs, use_cache=True)

    if place == 0:  # the first call of a shape pays for allocation; it is not timed
        dense(), routed()
    calls = [("dense", dense), ("routed", routed), ("prefill_dense", prefill_dense), ("prefill_routed", prefill)]
    found: dict[str, list[float]] = {}
    told: dict[str, Tensor] = {}
    for name, call in reversed(calls) if place % 2 else calls:
        out, seconds = timed(call)
        found[f"{name}_s"] = [seconds]
        if not name.startswith("prefill"):
            told[name] = out[:, inputs["input_ids"].shape[1] :]
        if name == "routed":
            found["keep"] = model.routing.keep_rate.tolist()
    answers = {name: texts(run.processor, ids) for name, ids in told.items()}
    for name, given in answers.items():
        right = [a == b.strip() for a, b in zip(given, batch.answer, strict=True)]
        found[f"{name}_accuracy"] = [float(hit) for hit in right]
        found[f"{name}_cut"] = [int(cut(model, told[name], limit).sum())]
    found["agreement"] = [float(a == b) for a, b in zip(answers["dense"], answers["routed"], strict=True)]
    order = ("dense_accuracy", "routed_accuracy", "agreement", "dense_cut", "routed_cut", "keep")
    return {name: found[name] for name in (*order, *(f"{name}_s" for name, _ in calls))}


def _teacher_forced(model: RoutedModel, batch: Batch) -> dict[str, Tensor]:
    """KL and log-likelihood (b) of the data's own answers, nats per predicted token."""
    where = batch.supervised
    wanted = batch.labels[:, 1:][where]

    def read() -> Tensor:
        logits = model(**batch.arguments()).logits
        return predicted(logits, where)

    def likelihood(logits: Tensor) -> Tensor:
        log_p = logits.float().log_softmax(-1).gather(1, wanted[:, None])[:, 0]
        return per_input(log_p, where, "mean").double()

    with model.dense():
        before = read()
    after = read()
    return {
        "kl": compare_predicted(before, after, where)["kl"].double(),
        "dense_log_likelihood": likelihood(before),
        "routed_log_likelihood": likelihood(after),
    }


def _by_kind(records: list[Record], per_kind: int | None) -> dict[str, list[Record]]:
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record.get("kind") or "all", []).append(record)
    return {kind: members[:per_kind] for kind, members in groups.items()}


def _enough(recipe: Recipe, split: str, per_kind: int | None) -> list[Record]:
    if per_kind is not None and recipe.data.source == EMBEDDED:
        from adaskip.demo.digits import KINDS

        return load_records(EMBEDDED, split, per_kind * len(KINDS), recipe.seed)
    return split_of(recipe, split)
