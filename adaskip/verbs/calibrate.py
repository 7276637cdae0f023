"""`adaskip calibrate`: the threshold that keeps a run's answers those of the dense model, as often as the user asks."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from adaskip.batch import Batch, exact_match
from adaskip.errors import ConfigError, DataError
from adaskip.generate.greedy import greedy_options, greedy_processors, process
from adaskip.plan import KEEP_ALL
from adaskip.recipe import Recipe
from adaskip.runfiles import CALIBRATION, ROUTER, write_json
from adaskip.runtime.attach import RoutedModel
from adaskip.stages import SILENT, Stages
from adaskip.theory.risk import Certificate, learn_then_test, smallest_sample
from adaskip.training.data import Collator, Record, append_answers, loader, open_image, pictures_of
from adaskip.verbs.amounts import fitted
from adaskip.verbs.budget import quality
from adaskip.verbs.lengths import (
    check_room,
    end_tokens,
    longest_answer,
    reached_limit,
    tell_if_endless,
    warn_of_cuts,
)
from adaskip.verbs.run import Run, check_writable, read_recipe
from adaskip.verbs.splits import records

STEPS = 40  # thresholds on the path


@dataclass(eq=False)
class Answered(Batch):
    """Hold prompts with the dense model's own answers behind them."""

    processors: LogitsProcessorList = field(default_factory=LogitsProcessorList)  # of generation for these prompts


@dataclass(frozen=True)
class CalibrationResult:
    """Hold a threshold that is certified or not; ``calibration.json`` holds `stored`, and the routers carry it."""

    certificate: Certificate  # its ``threshold`` is None where none is certified: every layer then runs
    keep: tuple[float, ...]  # mean keep rate at each of its steps
    max_new_tokens: int
    answers_cut: int  # dense answers that ran into the limit, of which the certificate covers the beginning only
    logits_processors: tuple[str, ...]  # that generation applied to both answers
    data: dict[str, str]  # source, split and digest of the calibration inputs
    generate_checked: int  # inputs whose routed answer was generated as well
    generate_differs: int  # those of them where generation found another loss

    @property
    def ok(self) -> bool:
        """Return whether a threshold is certified, and generation agrees with the losses it was certified by."""
        return self.certificate.threshold is not None and not self.generate_differs

    def stored(self) -> dict[str, Any]:
        """Return what is stored beside the routers."""
        values = self.certificate.to_dict()
        values["steps"] = [step | {"keep": keep} for step, keep in zip(values["steps"], self.keep, strict=True)]
        certified = [step["keep"] for step in values["steps"] if step["threshold"] == self.certificate.threshold]
        return values | {
            "loss": "the routed greedy answer is not the dense one (0 or 1)",
            "max_new_tokens": self.max_new_tokens,
            "answers_cut": self.answers_cut,
            "logits_processors": list(self.logits_processors),
            "keep": certified[0] if certified else 1.0,
            "data": self.data,
            "generate_checked": self.generate_checked,
            "generate_differs": self.generate_differs,
        }

    def to_dict(self) -> dict[str, Any]:
        """Return what ``--json`` prints."""
        return {"ok": self.ok, **self.stored()}


@torch.no_grad()
def calibrate(
    run: str | Path,
    risk: float = 0.02,
    delta: float = 0.1,
    max_new_tokens: int | None = None,
    stages: Stages = SILENT,
) -> CalibrationResult:
    """Certify a finished run's router threshold by Learn-then-Test; store it with its certificate in ``RUN/router``.

    Afterwards ``P(share of inputs whose routed greedy answer is not the dense one <= risk) >= 1 - delta``, over the
    draw of the calibration inputs, for answers of up to ``max_new_tokens`` tokens (calibrated; default: the longest
    answer of the training and validation splits with its end token), generated under the backbone's own generation
    config: its logits processors are applied to both answers, and named in the certificate; options that a caller adds
    to ``generate`` are not covered. The thresholds to try are quantiles of the logits on validation inputs. The
    calibration inputs are those of the calibration split that the bound's constants were not fitted on: nothing has
    seen them. One question a split: trying several risks on the same inputs and keeping the best answer voids the
    guarantee.

    The guarantee speaks of inputs exchangeable with the calibration inputs. Where validation and calibration inputs
    share a source (the demo composes both from one pool of scans), it holds given that source: for new pictures of
    these scans, not for new scans.

    Args:
        run: the run's folder.
        risk: the share of inputs whose answer may differ.
        delta: the chance that the share is larger after all.
        max_new_tokens: longest answer.
        stages: hears what is under way, and of answers that were cut.

    Raises:
        ConfigError: risk or delta outside (0, 1), no room for so long an answer, or a generation config that is not
            greedy.
        DataError: too few inputs are left for this risk and delta, or the dense model gives no finite logits.

    Example:
        ``adaskip.calibrate("runs/digits-vlm", risk=0.05).certificate.threshold``
    """
    needed = smallest_sample(risk, delta)
    folder = Path(run)
    recipe = read_recipe(folder)
    check_writable(folder, "the certificate")
    chosen = fresh_records(recipe, needed, f"a risk of {risk} at delta {delta}")
    loaded = Run.open(folder, stages)
    validation = records(recipe, "validation")
    collate = Collator(loaded.processor, answers=False)
    prompts = loader(chosen, collate, recipe.trainer.batch_size)
    check_room(loaded.model, max_new_tokens, (batch.inputs["input_ids"] for batch in prompts))
    limit = max_new_tokens or longest_answer([*records(recipe, "train"), *validation], loaded.processor)
    tell_if_endless(loaded.model, limit, stages)
    with stages(f"reading the routers' logits on {len(validation)} validation inputs"):
        path = threshold_path(loaded.model, validation, collate, recipe.trainer.batch_size)
    batches, unfinished = _dense_answers(loaded, chosen, limit, stages)
    certificate, keep = _test(loaded.model, batches, path, risk, delta, stages)
    loaded.model.set_threshold(KEEP_ALL if certificate.threshold is None else certificate.threshold)
    result = CalibrationResult(
        certificate,
        tuple(keep),
        limit,
        unfinished,
        tuple(type(processor).__name__ for processor in batches[0].processors),
        {"source": recipe.data.source, "split": "calibration", "digest": digest(chosen)},
        *check_generate(loaded.model, batches[0], limit),
    )
    _store(loaded, result, validation)
    return result


def _dense_answers(run: Run, chosen: list[Record], limit: int, stages: Stages) -> tuple[list[Answered], int]:
    """Answer the calibration inputs with the dense model; count the answers that ran into the limit."""
    model, collate, size = run.model, Collator(run.processor, answers=False), run.recipe.trainer.batch_size
    batches: list[Answered] = []
    with stages(f"dense answers to {len(chosen)} calibration inputs", len(chosen)) as advance:
        for batch in loader(chosen, collate, size):
            batches.append(answered(model, batch.to(model.spec.device), limit, collate.tokenizer.pad_token_id))
            advance(min(len(chosen), len(batches) * size))
    unfinished = sum(
        int(reached_limit(model, batch.inputs["input_ids"][:, _width(batch) :], limit).sum()) for batch in batches
    )
    for text in warn_of_cuts({"dense": unfinished}, len(chosen), limit):
        stages.note(f"{text}; the certificate speaks of that many tokens only")
    return batches, unfinished


def _test(
    model: RoutedModel, batches: list[Answered], path: list[float], risk: float, delta: float, stages: Stages
) -> tuple[Certificate, list[float]]:
    """Walk the thresholds until one fails the test; return the certificate, and the mean keep rate at each step."""
    keep: list[float] = []
    with stages(f"testing up to {len(path)} thresholds", len(path)) as advance:

        def losses_at(threshold: float) -> Tensor:
            model.set_threshold(threshold)
            losses, rates = zip(*(disagreement(model, batch) for batch in batches), strict=True)
            keep.append(float(torch.cat(rates).mean()))
            advance(len(keep))
            return torch.cat(losses).double().cpu()

        return learn_then_test(path, losses_at, risk, delta, binary=True), keep


def _store(run: Run, result: CalibrationResult, validation: list[Record]) -> None:
    """Save the routers with their threshold and certificate, and figures of validation inputs at that threshold."""
    model, size = run.model, run.recipe.trainer.batch_size
    batches = [batch.to(model.spec.device) for batch in loader(validation, Collator(run.processor), size)]
    keep, accuracy = quality(model, batches)
    model.facts = {  # what else stood there spoke of another threshold
        "target_keep": run.recipe.objective.keep,
        "validation_keep": round(keep, 4),
        "validation_accuracy": round(accuracy, 4),
    }
    model.certificate = result.stored()
    model.save_pretrained(run.folder / ROUTER)
    write_json(run.folder / CALIBRATION, result.stored(), indent=2)


def fresh_records(recipe: Recipe, needed: int, purpose: str) -> list[Record]:
    """Read the calibration records that training did not fit the bound's constants on.

    Raises:
        DataError: fewer than ``needed`` are left; says what to do.
    """
    used = fitted(recipe)
    fresh = records(recipe, "calibration")[used:]
    if len(fresh) < needed:
        raise DataError(
            f"calibrate: {purpose} needs at least {needed} inputs that nothing was fitted on; training used {used} "
            f"calibration records and left {len(fresh)}. Give data.examples.calibration (or calibration.jsonl) at "
            f"least {used + needed} before training, or allow a larger --risk"
        )
    return fresh


def threshold_path(model: RoutedModel, validation: list[Record], collate: Collator, size: int) -> list[float]:
    """List thresholds, conservative to aggressive: quantiles of the logits on validation prompts, all layers run.

    They depend on the routers and on validation inputs alone, so that calibration inputs find them fixed. A policy
    without logits, such as a static plan, has one: 0, at which it decides as it does.

    Raises:
        ConfigError: the routers' logits do not vary, so no threshold tells inputs or layers apart.
    """
    model.set_threshold(KEEP_ALL)
    logits = []
    for batch in loader(validation, collate, size):
        model(**batch.to(model.spec.device).inputs, use_cache=False)
        if model.routing.logits is None:
            return [0.0]
        logits.append(model.runtime.routing.decided.cpu())  # type: ignore[union-attr]
    ordered = torch.cat(logits).double().sort().values  # `quantile` refuses more than 16 million values
    places = torch.linspace(0, 1, STEPS + 1, dtype=torch.float64)[:-1] * (len(ordered) - 1)
    path: list[float] = ordered[places.long()].unique().tolist()
    if len(path) < 2:
        raise ConfigError("calibrate: the routers give every layer and input one logit; train them before calibrating")
    return path


def answered(model: RoutedModel, batch: Batch, max_new_tokens: int, pad: int) -> Answered:
    """Put the dense model's own greedy answers behind the prompts of a batch, end token included.

    Raises:
        ConfigError: the generation config is not greedy.
        DataError: the dense model's logits are not finite.
    """
    width = batch.inputs["input_ids"].shape[1]
    processors = greedy_processors(model, batch.inputs, max_new_tokens)
    with model.dense():
        out = model.generate(**batch.inputs, **greedy_options(max_new_tokens))
        answers = out[:, width:]
        ends = torch.isin(answers, end_tokens(model, answers)).long()
        real = ends.cumsum(1) - ends == 0  # up to and with the first end token
        batch = append_answers(batch, [row[keep] for row, keep in zip(answers, real, strict=True)], pad)
        logits = model(**batch.inputs, use_cache=False).logits
    if not logits[:, :-1][batch.supervised].isfinite().all():
        raise DataError("calibrate: the dense model's logits are not finite; load the backbone in another dtype")
    return Answered(**vars(batch), processors=processors)


def disagreement(model: RoutedModel, batch: Answered) -> tuple[Tensor, Tensor]:
    """Return bool (b): whether the routed greedy answer is not the dense one that the labels hold; and keep rates (b).

    Exact by one teacher-forced pass (an identity [D, link 10]): the two answers are the same exactly if the argmax of
    what generation ranks by, the processed logits, is at every position of the dense answer.
    """
    logits = model(**batch.arguments()).logits
    ranked = process(logits, batch.inputs["input_ids"], _width(batch), batch.processors)
    return ~exact_match(ranked, batch.labels), model.routing.keep_rate


def check_generate(model: RoutedModel, batch: Answered, max_new_tokens: int) -> tuple[int, int]:
    """Answer a batch by routed generation; count its inputs, and those whose loss is not the teacher-forced one."""
    width = _width(batch)
    length = batch.inputs["input_ids"].shape[1]
    prompts: dict[str, Any] = {
        name: value[:, :width] if isinstance(value, Tensor) and value.shape[:2] == (len(value), length) else value
        for name, value in batch.inputs.items()
    }
    tokens = model.generate(**prompts, **greedy_options(max_new_tokens))[:, width:]
    expected = batch.labels[:, width:]
    # a routed answer may be shorter than the longest dense one of the batch
    tokens = torch.nn.functional.pad(tokens, (0, max(0, expected.shape[1] - tokens.shape[1])), value=-1)
    same = ((tokens[:, : expected.shape[1]] == expected) | (expected < 0)).all(1)
    loss, _ = disagreement(model, batch)
    return len(loss), int((loss == same).sum())


def digest(chosen: list[Record]) -> str:
    """Identify calibration inputs: a digest of their prompts and pictures, in order."""
    total = hashlib.sha256()
    for record in chosen:
        total.update(record["prompt"].encode() + b"\0")
        for picture in map(open_image, pictures_of(record)):
            total.update(f"{picture.size}".encode() + picture.tobytes())
    return total.hexdigest()[:32]


def _width(batch: Batch) -> int:
    """Return the column at which the answers begin."""
    return int(batch.prompt_mask.any(0).nonzero().max()) + 1
