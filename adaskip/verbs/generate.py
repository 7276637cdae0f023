"""`adaskip generate`: one answer beside the dense model's, with the route it took; or many, by path."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adaskip.backbone.load import load_processor
from adaskip.errors import AdaSkipError, CheckpointError, DataError
from adaskip.runfiles import EVALUATION, RECIPE, write_json
from adaskip.runtime.attach import RoutedModel
from adaskip.runtime.timing import timed
from adaskip.stages import SILENT, Stages
from adaskip.training.data import Collator, Record, pictures_of, read_prompts, where
from adaskip.training.screening import as_conversation
from adaskip.verbs.data_used import DataUsed
from adaskip.verbs.lengths import UNKNOWN, check_room, longest_answer, reached_limit, tell_if_endless, warn_of_cuts
from adaskip.verbs.run import Run, check_writable, router_folder
from adaskip.verbs.splits import held_out


@dataclass(frozen=True)
class Answer:
    """Hold one prompt, answered by the routed and the dense model."""

    prompt: str
    answer: str
    dense_answer: str
    expected: str | None  # the data's own, where there is one
    keep: float  # executed over dense decoder FLOPs
    route: tuple[bool, ...]  # for each layer, or half of one, whether it ran
    layers: int  # of the model
    max_new_tokens: int
    warnings: tuple[str, ...]  # of answers that were cut
    lossless: dict[str, Any] | None = None  # what drafts were worth, and the seconds of both models

    def to_dict(self) -> dict[str, Any]:
        """Return what ``--json`` prints."""
        return {
            "prompt": self.prompt,
            "answer": self.answer,
            "dense_answer": self.dense_answer,
            "expected": self.expected,
            "keep": self.keep,
            "route": list(self.route),
            "layers": self.layers,
            "max_new_tokens": self.max_new_tokens,
            "warnings": list(self.warnings),
            **({} if self.lossless is None else {"lossless": self.lossless}),
        }


@dataclass(frozen=True)
class ManyAnswers:
    """Hold many prompts, answered by path."""

    rows: tuple[dict[str, Any], ...]  # prompt, answer, keep and route of each
    figures: dict[str, Any]  # keep, groups, added, changed, prefill_s, decode_s: see `adaskip.generate.paths.Answers`
    max_new_tokens: int
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return what ``--json`` prints."""
        limit = {"max_new_tokens": self.max_new_tokens, "warnings": list(self.warnings)}
        return {"answers": list(self.rows), **self.figures, **limit}


@torch.no_grad()
def answer(
    run: str | Path,
    image: Path | None = None,
    prompt: str | None = None,
    example: int | None = None,
    max_new_tokens: int | None = None,
    lossless: bool = False,
    stages: Stages = SILENT,
) -> Answer:
    """Answer one prompt, dense and routed, with the route it took.

    Args:
        run: a run, or an exported folder of routers (then without ``example``).
        image: a picture file.
        prompt: the text; for models with a picture placeholder it may leave the placeholder out. Where the run learned
            from conversations, the model's chat template writes it as a user's turn.
        example: number of a held-out example of the run's own data, instead of image and prompt.
        max_new_tokens: longest answer; default: the longest of the run's held-out examples with its end token, or 64
            where there is no run.
        lossless: let the routed path draft for the dense model, whose answer it then is.
        stages: hears what is under way.

    Raises:
        DataError: neither a prompt nor an example, or one the data does not have.
        ConfigError: no room for so long an answer, or, with ``lossless``, routers that cannot draft.
    """
    model, processor, loaded = _open(Path(run), stages)
    record = _record(loaded, image, prompt, example, processor, model)
    limit = max_new_tokens or _limit(loaded, processor)
    batch = Collator(processor, answers=False)([record]).to(model.spec.device)
    check_room(model, max_new_tokens, [batch.inputs["input_ids"]])
    tell_if_endless(model, limit, stages)
    options: dict[str, Any] = {"max_new_tokens": limit, "do_sample": False}
    width = batch.inputs["input_ids"].shape[1]
    with model.dense():
        dense, dense_s = timed(lambda: model.generate(**batch.inputs, **options)[:, width:])
    routed, routed_s = timed(lambda: model.generate(**batch.inputs, **options, lossless=lossless)[:, width:])
    drafts = model.lossless.to_dict() | {"answer_s": routed_s, "dense_answer_s": dense_s} if lossless else None
    counts = {"dense": int(reached_limit(model, dense, limit)), "routed": int(reached_limit(model, routed, limit))}
    result = Answer(
        record["prompt"],
        texts(processor, routed)[0],
        texts(processor, dense)[0],
        record.get("answer") or None,
        float(model.routing.keep_rate[0]),
        tuple((model.routing.share[:, 0] > 0.5).tolist()),
        len(model.spec.layers),
        limit,
        _noted(warn_of_cuts(counts, 1, limit), stages),
        drafts,
    )
    if example is not None and loaded is not None:
        _store(loaded, result)
    return result


@torch.no_grad()
def answer_many(
    run: str | Path, file: Path, max_new_tokens: int | None = None, paths: int | None = None, stages: Stages = SILENT
) -> ManyAnswers:
    """Answer every prompt of a file of JSON lines, those that take the same path together.

    Args:
        run: a run, or an exported folder of routers.
        file: one object a line with ``prompt`` or ``messages``, and maybe ``image``, a path relative to the file.
        max_new_tokens: longest answer; default as for `answer`.
        paths: at most so many paths, see `adaskip.generate.paths.generate_many`.
        stages: hears what is under way.

    Raises:
        DataError: a line is no such object; says which.
        ConfigError: no room for so long an answer.
    """
    questions = read_prompts(Path(file))
    model, processor, loaded = _open(Path(run), stages)
    limit = max_new_tokens or _limit(loaded, processor)
    collate, device = Collator(processor, answers=False), model.spec.device
    if loaded is not None and DataUsed.is_chat(loaded.folder):
        questions = [as_conversation(question) for question in questions]
    questions = collate.rendered(questions)
    placed = [_placed(question, collate, model) for question in questions]
    collate.check(placed)
    items = [collate([record]).to(device).inputs for record in placed]
    check_room(model, max_new_tokens, (item["input_ids"] for item in items))
    tell_if_endless(model, limit, stages)
    with stages(f"answering {len(items)} prompts"):
        many = model.generate_many(items, paths=paths, measure=paths is not None, max_new_tokens=limit, do_sample=False)
    rows = tuple(
        {
            "prompt": question["prompt"],
            "answer": texts(processor, one.tokens[None])[0],
            "keep": one.keep_rate,
            "route": list(one.path),
        }
        for question, one in zip(questions, many.answers, strict=True)
    )
    figures = {"keep": many.keep_rate, "groups": len(many.groups), "added": many.added, "changed": many.changed}
    figures |= {"prefill_s": many.prefill_s, "decode_s": many.decode_s}
    count = sum(int(reached_limit(model, one.tokens[None], limit)) for one in many.answers)
    return ManyAnswers(rows, figures, limit, _noted(warn_of_cuts({"routed": count}, len(rows), limit), stages))


def _noted(warnings: list[str], stages: Stages) -> tuple[str, ...]:
    for text in warnings:
        stages.note(text)
    return tuple(warnings)


def texts(processor: Any, ids: Tensor) -> list[str]:
    """Decode generated ids, one text a row."""
    return [text.strip() for text in processor.batch_decode(ids, skip_special_tokens=True)]


def _limit(run: Run | None, processor: Any) -> int:
    """Count the tokens that the run's own held-out answers take; where they cannot be read, a round number."""
    if run is None:
        return UNKNOWN
    try:
        return longest_answer(held_out(run.recipe)[0], processor)
    except AdaSkipError:  # the data has moved since: a prompt of one's own can be answered all the same
        return UNKNOWN


def _store(run: Run, result: Answer) -> None:
    """Put an example into the evaluation, where there is one that can be written, and make the report anew."""
    from adaskip import report

    path = run.folder / EVALUATION
    if not path.is_file():
        return
    try:
        check_writable(run.folder, EVALUATION)
    except CheckpointError:  # the question is answered all the same
        return
    write_json(path, report.read_evaluation(path) | {"example": result.to_dict()}, indent=2)
    report.write(run.folder)


def _open(folder: Path, stages: Stages) -> tuple[RoutedModel, Any, Run | None]:
    if (folder / RECIPE).is_file():
        loaded = Run.open(folder, stages)
        return loaded.model, loaded.processor, loaded
    with stages(f"loading the routers of {folder} and their backbone"):
        model = RoutedModel.from_pretrained(router_folder(folder))
        return model, load_processor(model.backbone.config._name_or_path), None


def _record(
    run: Run | None, image: Path | None, prompt: str | None, example: int | None, processor: Any, model: RoutedModel
) -> Record:
    if example is not None:
        if run is None:
            raise DataError(
                "--example needs a run folder with its recipe; for an exported folder pass --image and --prompt"
            )
        shown, split = held_out(run.recipe)
        if not 0 <= example < len(shown):
            raise DataError(
                f"--example {example}: expected 0 to {len(shown) - 1}, so many held-out examples there are in split "
                f"{split}"
            )
        return shown[example]
    if prompt is None:
        raise DataError("nothing to answer: pass --prompt TEXT (with --image PATH for a picture) or --example N")
    if not prompt.strip():
        raise DataError("the prompt is empty; expected a question")
    question: Record = {"prompt": prompt, **({"image": Path(image)} if image is not None else {})}
    if run is not None and DataUsed.is_chat(run.folder):
        question = as_conversation(question)
    collate = Collator(processor, answers=False)
    return _placed(collate.rendered([question])[0], collate, model)


def _placed(question: Record, collate: Collator, model: RoutedModel) -> Record:
    """Give a question a placeholder for each picture, where its prompt leaves them out."""
    if not pictures_of(question) and model.target.group == "vision":
        raise DataError(
            f"{where(question)}: these routers route vision tokens; pass a picture with --image PATH, or in "
            'a file of prompts {"prompt": ..., "image": "PATH"}'
        )
    return collate.placed(question)
