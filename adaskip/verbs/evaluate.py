"""`adaskip eval`: what a run is worth beside the dense model and the best static plan: answers, KL, keep, seconds."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch

from adaskip.batch import Batch
from adaskip.runfiles import EVALUATION, write_json
from adaskip.runtime.attach import RoutedModel
from adaskip.runtime.timing import timed
from adaskip.stages import SILENT, Stages
from adaskip.training.data import Collator, Record, in_order, loader
from adaskip.verbs.generate import texts
from adaskip.verbs.lengths import check_room, longest_answer, reached_limit, tell_if_endless, warn_of_cuts
from adaskip.verbs.rival import Duel, Rival, duel, find_rival, missing
from adaskip.verbs.run import Run, check_writable, read_recipe
from adaskip.verbs.splits import check_split, split_of
from adaskip.verbs.teacher import Forced, join, read_answers, rows_at_once
from adaskip.verbs.wording import Content, edit_distances

_Figures = dict[str, list[float]]
"""Numbers by name: one an input that has one, and of seconds and cut answers one a batch."""


@dataclass(frozen=True)
class KindFigures:
    """Hold the figures of the dense model, the routed one and a static plan on the inputs of one kind.

    Those of the static plan are None where there is none, and of hallucination where the data do not say what is there.
    """

    kind: str
    n: int
    dense_accuracy: float  # share of generated answers that are the data's own, word for word
    routed_accuracy: float
    static_accuracy: float | None
    agreement: float  # share of routed answers that are the dense ones
    static_agreement: float | None
    dense_edit_distance: float  # characters to change for the data's own answer, over its length; see `edit_distances`
    routed_edit_distance: float
    static_edit_distance: float | None
    dense_hallucinated: (
        float | None
    )  # share of answers that name what is not there, where records say so; see `Content`
    routed_hallucinated: float | None
    static_hallucinated: float | None
    dense_cut: int  # answers that ran into the limit
    routed_cut: int
    static_cut: int | None
    keep: float  # executed over dense decoder FLOPs, mean over inputs
    static_keep: float | None
    dense_s: float  # seconds of generation, sum over the kind's batches
    routed_s: float
    static_s: float | None
    prefill_dense_s: float  # seconds of reading the prompts
    prefill_routed_s: float
    kl: float  # routed; nats per predicted token of the data's own answers, which are read by teacher forcing
    static_kl: float | None
    token_agreement: float  # share of predicted tokens whose argmax, routed, is the dense model's
    static_token_agreement: float | None
    dense_log_likelihood: float
    routed_log_likelihood: float
    static_log_likelihood: float | None
    dense_perplexity: float  # exp of the mean negative log-likelihood of a token
    routed_perplexity: float
    static_perplexity: float | None
    flops_saved: float


@dataclass(frozen=True)
class EvaluationResult:
    """Hold a split answered by all sides; ``evaluation.json`` holds `to_dict`."""

    split: str
    kinds: tuple[KindFigures, ...]
    batch_size: int
    max_new_tokens: int
    static: Duel | None = None  # the routers beside the static plan, if there is one
    warnings: tuple[str, ...] = ()  # of answers that were cut
    example: dict[str, Any] | None = None  # one that `generate --example` has put there before

    @property
    def mean(self) -> dict[str, float | None]:
        """Average each figure over the kinds that have it; perplexities, which multiply, by their geometric mean."""
        names = [field.name for field in fields(KindFigures) if field.name not in ("kind", "n")]
        return {name: _mean(name, [getattr(row, name) for row in self.kinds]) for name in names}

    def to_dict(self) -> dict[str, Any]:
        """Return what ``--json`` prints."""
        values = {
            "split": self.split,
            "kinds": [asdict(row) for row in self.kinds],
            "mean": self.mean,
            "batch_size": self.batch_size,
            "max_new_tokens": self.max_new_tokens,
            "static": None if self.static is None else asdict(self.static) | {"skip": list(self.static.skip)},
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
    static: str | Sequence[int] | None = None,
    stages: Stages = SILENT,
) -> EvaluationResult:
    """Answer a split with the dense model, the routed one and along a static plan, interleaved in one process.

    Every batch holds one kind of question, so that seconds can be told apart by kind. The runs of the same batch follow
    one another, in alternating order. Then every side reads the data's own answers by teacher forcing. The result is
    written into the run's folder, and its report made anew.

    Args:
        run: the run's folder.
        split: of its data.
        per_kind: at most so many inputs of each kind.
        batch_size: inputs at once.
        max_new_tokens: longest answer; default: the longest of the inputs' own, with its end token.
        static: layers that the static plan leaves out, as ``4,5,6`` or a list, of unit ``sublayers`` also halves, as
            ``4.attention``; default: the plan that training found
            (``static.skip`` of ``summary.json``); without one nothing static is measured.
        stages: hears what is under way, of answers that were cut, and of a static plan that is missing.

    Raises:
        CheckpointError: the folder is no finished run, or cannot be written to.
        ConfigError, DataError: there is no such split, no room for so long an answer, or no such layers.

    Example:
        ``adaskip.evaluate("runs/digits-vlm", per_kind=200).mean["routed_accuracy"]``
    """
    from adaskip import report

    folder = Path(run)
    recipe = read_recipe(folder)
    check_split(split)
    check_writable(folder, EVALUATION)
    previous = report.read(folder)  # a damaged file is said before the work
    rival = find_rival(previous.summary, static, folder, recipe.router.unit)
    groups = _by_kind(split_of(recipe, split, per_kind), per_kind)
    loaded = Run.open(folder, stages)
    if rival is None:
        stages.note(missing(folder))
    else:
        rival.check(len(loaded.model.spec.layers))
    chosen = [record for members in groups.values() for record in members]
    prompts = loader(chosen, Collator(loaded.processor, answers=False), batch_size)
    check_room(loaded.model, max_new_tokens, (batch.inputs["input_ids"] for batch in prompts))
    limit = max_new_tokens or longest_answer(chosen, loaded.processor)
    tell_if_endless(loaded.model, limit, stages)
    rows, forced = _measure(loaded, groups, batch_size, limit, rival, stages)
    sides = ("dense", "routed", "static")
    counts = {side: sum(getattr(row, f"{side}_cut") or 0 for row in rows) for side in sides}
    warnings = warn_of_cuts(counts, len(chosen), limit)
    for text in warnings:
        stages.note(text)
    result = EvaluationResult(
        split,
        tuple(rows),
        batch_size,
        limit,
        None if rival is None else _compare(rival, rows, forced),
        tuple(warnings),
        previous.evaluation.get("example"),
    )
    write_json(folder / EVALUATION, result.to_dict(), indent=2)
    report.write(folder)
    return result


def _mean(name: str, values: list[float | None]) -> float | None:
    numbers = [value for value in values if value is not None]
    # a static plan has its figures of all kinds or of none; what is hallucinated is known of some
    if not numbers:
        return None
    return statistics.geometric_mean(numbers) if name.endswith("_perplexity") else statistics.fmean(numbers)


def _compare(rival: Rival, rows: list[KindFigures], forced: dict[str, Forced]) -> Duel:
    """Put routers and plan side by side over all inputs of all kinds."""
    inputs = sum(row.n for row in rows)
    keeps = [sum(row.n * (getattr(row, name) or 0) for row in rows) / inputs for name in ("keep", "static_keep")]
    return duel(rival, forced["routed"].kl, forced["static"].kl, (keeps[0], keeps[1]))


def _by_kind(records: list[Record], per_kind: int | None) -> dict[str, list[Record]]:
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record.get("kind") or "all", []).append(record)
    return {kind: members[:per_kind] for kind, members in groups.items()}


def _measure(
    run: Run, groups: dict[str, list[Record]], batch_size: int, limit: int, rival: Rival | None, stages: Stages
) -> tuple[list[KindFigures], dict[str, Forced]]:
    """Answer each kind by generation, then read its own answers by teacher forcing; also return all that was read."""
    total, done, device = sum(map(len, groups.values())), 0, run.model.spec.device
    collate = Collator(run.processor, answers=False)
    content = Content([record for members in groups.values() for record in members])
    skip = None if rival is None else rival.sites
    rows, read = [], []
    with stages(f"answering {total} inputs, side by side", total) as advance:
        for kind, members in groups.items():
            figures: _Figures = {}
            # prompts alone, for an answer behind a prompt would be read as a part of it
            for place, chosen in enumerate(in_order(members, batch_size)):
                asked = [members[number] for number in chosen]
                found, said = _answer(run, collate(asked).to(device), limit, place, skip)
                _extend(figures, found)
                _extend(figures, _worded(said, asked, content))
                advance(done := done + len(asked))
            whole = loader(members, Collator(run.processor), rows_at_once(run.model, batch_size))
            read.append(read_answers(run.model, whole, skip))
            rows.append(_summed(kind, len(members), figures, read[-1]))
    return rows, {side: join([part[side] for part in read]) for side in read[0]}


def _extend(figures: _Figures, more: _Figures) -> None:
    for name, values in more.items():
        figures.setdefault(name, []).extend(values)


def _summed(kind: str, n: int, figures: _Figures, forced: dict[str, Forced]) -> KindFigures:
    values: dict[str, Any] = {
        name: sum(each) if name.endswith(("_s", "_cut")) else statistics.fmean(each) for name, each in figures.items()
    }
    for side, read in forced.items():
        # two figures compare with the dense side, and what is routed has them without a prefix, as `keep`
        for name, value in read.figures().items():
            compares = name in ("kl", "token_agreement")
            if not (compares and side == "dense"):
                values[name if compares and side == "routed" else f"{side}_{name}"] = value
    # what only a static plan has, and there is none, or only records that say what is there
    unknown = [f.name for f in fields(KindFigures) if f.name.startswith("static_") or f.name.endswith("_hallucinated")]
    values = dict.fromkeys(unknown) | values
    return KindFigures(kind=kind, n=n, flops_saved=1 - values["keep"], **values)


def _worded(said: dict[str, list[str]], records: Sequence[Record], content: Content) -> _Figures:
    """Return how far the sides' answers lie from the data's own, and which name what is not there."""
    figures, wanted = {}, [record["answer"].strip() for record in records]
    for side, answers in said.items():
        figures[f"{side}_edit_distance"] = edit_distances(answers, wanted)
        shares = [share for share in content.shares(answers, records) if share is not None]
        if shares:
            figures[f"{side}_hallucinated"] = shares
    return figures


def _answer(
    run: Run, batch: Batch, limit: int, place: int, skip: Sequence[int] | None
) -> tuple[_Figures, dict[str, list[str]]]:
    """Generate the answers of the ``place``-th batch by every side, and take the seconds; also return the answers."""
    model, width = run.model, batch.inputs["input_ids"].shape[1]
    calls = _calls(model, batch, limit, skip)
    sides = [side for side in ("dense", "routed", "static") if side in calls]
    if place == 0:  # the first call of a shape pays for allocation; it is not timed
        for side in sides:
            calls[side]()
    outputs, figures = {}, {}
    # every other batch goes through the calls backwards, so that a machine that slows down slows all sides alike
    for name in reversed(calls) if place % 2 else calls:
        outputs[name], seconds = timed(calls[name])
        figures[f"{name}_s"] = [seconds]
        if name in ("routed", "static"):
            figures["keep" if name == "routed" else "static_keep"] = model.routing.keep_rate.tolist()
    answers: dict[str, list[str]] = {}
    for side in sides:
        tokens = outputs[side][:, width:]
        answers[side] = texts(run.processor, tokens)
        pairs = zip(batch.answer, answers[side], strict=True)
        figures[f"{side}_accuracy"] = [float(expected.strip() == answer) for expected, answer in pairs]
        figures[f"{side}_cut"] = [int(reached_limit(model, tokens, limit).sum())]
    for name, side in (("agreement", "routed"), ("static_agreement", "static")):
        if side in sides:
            figures[name] = [float(a == b) for a, b in zip(answers["dense"], answers[side], strict=True)]
    return figures, answers


def _calls(model: RoutedModel, batch: Batch, limit: int, skip: Sequence[int] | None) -> dict[str, Callable[[], Any]]:
    """Name what is timed: generation by every side, and the prefill dense and routed."""

    def generate(**decisions: Any) -> Any:
        return model.generate(**batch.inputs, **decisions, max_new_tokens=limit, do_sample=False)

    def prefill() -> Any:
        return model(**batch.inputs, use_cache=True)

    def dense(call: Callable[[], Any]) -> Callable[[], Any]:
        def inside() -> Any:
            with model.dense():
                return call()

        return inside

    calls = {"dense": dense(generate), "routed": generate}
    if skip is not None:
        keep = torch.ones(len(model.sites), len(batch), dtype=torch.bool)
        keep[list(skip)] = False
        calls["static"] = partial(generate, routing=keep.to(model.spec.device))
    return calls | {"prefill_dense": dense(prefill), "prefill_routed": prefill}
