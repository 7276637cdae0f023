"""What a trained run is worth: accuracy, keep rate and seconds beside the dense model; its conditions; its answers."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adaskip.demo.backbone import EMBEDDED
from adaskip.errors import AdaSkipError, CheckpointError, DataError
from adaskip.export import router_folder
from adaskip.recipe import Recipe, load
from adaskip.runtime import persist
from adaskip.runtime.attach import RoutedModel
from adaskip.runtime.measure import timed
from adaskip.runtime.persist import load_backbone
from adaskip.theory.profile import Prices
from adaskip.train import RECIPE, backbone_options, load_processor, records
from adaskip.training.callbacks import ConditionCheck, to_device
from adaskip.training.data import Collator, Record, load_records, loader, pictures_of, read_prompts, where
from adaskip.training.tracking import write_text

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Run:
    """A finished run, loaded: its recipe, routed model and processor."""

    folder: Path
    recipe: Recipe
    model: RoutedModel
    processor: Any


def open_run(folder: Path) -> Run:
    """Load a finished run.

    Raises:
        CheckpointError: the folder is no finished run.
    """
    folder = Path(folder)
    routers = router_folder(folder)
    if not (folder / RECIPE).is_file():
        raise CheckpointError(f"{folder}: holds routers but no {RECIPE}; expected the folder of a run, not an export")
    recipe = load(folder / RECIPE)
    model = RoutedModel.from_pretrained(routers, load_backbone(recipe.backbone.path, **backbone_options(recipe)))
    if torch.cuda.is_available() and not recipe.backbone.device_map:
        model.cuda()
    return Run(folder, recipe, model, load_processor(recipe))


def texts(processor: Any, ids: Tensor) -> list[str]:
    """Generated ids as text, one per row."""
    return [text.strip() for text in processor.batch_decode(ids, skip_special_tokens=True)]


@torch.no_grad()
def evaluate(
    run: Path,
    split: str = "test",
    per_kind: int | None = None,
    batch_size: int = 64,
    max_new_tokens: int = 16,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Answer a split with the dense and the routed model, kind by kind, interleaved in one process.

    Every batch holds one kind of question, so that seconds can be told apart by kind. Dense and routed runs of the same
    batch follow one another, in alternating order. Accuracy is the exact match of the whole generated answer.

    Returns:
        ``kinds``: rows with ``kind, n, dense_accuracy, routed_accuracy, keep, flops_saved, dense_s, routed_s,
        prefill_dense_s, prefill_routed_s`` (seconds are sums over the kind's batches); ``mean``: over kinds.
        Also written to ``evaluation.json`` in the run folder, and the report is made anew.
    """
    from adaskip import report

    loaded = open_run(run)
    model, device = loaded.model, loaded.model.described.device
    groups: dict[str, list[Record]] = {}
    wanted = _enough(loaded.recipe, split, per_kind)
    for record in wanted:
        groups.setdefault(record.get("kind", "all"), []).append(record)
    collate = Collator(loaded.processor, answers=False)
    rows, done = [], 0
    for kind, members in groups.items():
        members = members[:per_kind]
        sums: dict[str, list[float]] = {}
        flip = False
        for batch in loader(members, collate, batch_size):
            inputs = to_device(batch, device)["inputs"]
            width = inputs["input_ids"].shape[1]
            options = {"max_new_tokens": max_new_tokens, "do_sample": False}

            def dense(inputs: Any = inputs, options: Any = options) -> Any:
                with model.dense():
                    return model.generate(**inputs, **options)

            def routed(inputs: Any = inputs, options: Any = options) -> Any:
                return model.generate(**inputs, **options)

            def prefill(inputs: Any = inputs) -> Any:
                return model(**inputs, use_cache=True)

            def prefill_dense(inputs: Any = inputs) -> Any:
                with model.dense():
                    return model(**inputs, use_cache=True)

            if not sums:  # the first call of a shape pays for allocation; it is not timed
                dense(), routed()
            calls = [
                ("dense", dense),
                ("routed", routed),
                ("prefill_dense", prefill_dense),
                ("prefill_routed", prefill),
            ]
            took, outs = {}, {}
            for name, call in reversed(calls) if flip else calls:
                outs[name], took[name] = timed(call)
                if name == "routed":
                    keep = model.routing.keep_rate
            flip = not flip
            answers = {n: texts(loaded.processor, outs[n][:, width:]) for n in ("dense", "routed")}
            for name, given in answers.items():
                hits = [a == b.strip() for a, b in zip(given, batch["answer"], strict=True)]
                sums.setdefault(f"{name}_accuracy", []).extend(map(float, hits))
            sums.setdefault("keep", []).extend(keep.tolist())
            for name, seconds in took.items():
                sums.setdefault(f"{name}_s", []).append(seconds)
            done += len(batch["answer"])
            if progress is not None:
                progress(done, len(wanted))
        row: dict[str, Any] = {"kind": kind, "n": len(members)}
        row |= {k: statistics.fmean(v) for k, v in sums.items() if not k.endswith("_s")}
        row |= {k: sum(v) for k, v in sums.items() if k.endswith("_s")}
        row["flops_saved"] = 1 - row["keep"]
        rows.append(row)
    mean = {k: statistics.fmean(r[k] for r in rows) for k in rows[0] if k not in ("kind", "n")}
    found = {"split": split, "kinds": rows, "mean": mean, "batch_size": batch_size}
    if (previous := loaded.folder / "evaluation.json").is_file():
        found |= {"example": e} if (e := json.loads(previous.read_text(encoding="utf-8")).get("example")) else {}
    write_text(loaded.folder / "evaluation.json", json.dumps(found, indent=2) + "\n")
    report.write(loaded.folder)
    return found


def _enough(recipe: Recipe, split: str, per_kind: int | None) -> list[Record]:
    if per_kind is not None and recipe.data.source == EMBEDDED:
        from adaskip.demo.digits import KINDS

        return load_records(EMBEDDED, split, per_kind * len(KINDS), recipe.seed)
    return records(recipe, split)


def check(run: Path, bands: bool = False) -> dict[str, Any]:
    """Judge a finished run's conditions anew, on held-out inputs that nothing was fitted on.

    ``ok`` is whether the calibrated bound covers as it should: its coverage is not rejected at 1 %.

    Args:
        run: the run's folder.
        bands: also judge every late entry and early exit, against the same tolerance.

    Returns:
        ``ok``, ``rows`` (findings with their verdicts), ``summary`` (the joint figures), and ``bands`` if asked for.
    """
    from adaskip.theory.profile import measure

    loaded = open_run(run)
    model, recipe = loaded.model, loaded.recipe
    path = loaded.folder / "prices.json"
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        tensors = {k: torch.tensor(stored[k], dtype=torch.float64) for k in ("shift", "peak", "mass")}
        pairs = stored.get("correlation")
        correlation = None if pairs is None else torch.tensor(pairs, dtype=torch.float64)
        prices = Prices(**tensors, alpha=stored["alpha"], c=stored["c"], correlation=correlation)
    except (OSError, json.JSONDecodeError, KeyError) as error:
        raise CheckpointError(f"{path}: missing or damaged ({error}); train the run again") from error
    chosen, held_out = _unfitted(recipe)
    device = model.described.device
    batches = [to_device(b, device) for b in loader(chosen, Collator(loaded.processor), recipe.trainer.batch_size)]
    measured = measure(model, batches, attention=model.runtime.hides_vision)
    watcher = ConditionCheck(
        0, tolerance=recipe.conditions.nats, level=recipe.conditions.level, batches=batches, measured=measured
    )
    look = watcher.inspect(model, prices, recipe.trainer.steps)
    joint = look.joint
    rows = [row.to_dict() for row in look.findings.rows]
    judged = {"bands": _bands(loaded, batches)} if bands else {}
    return {
        "ok": joint.coverage_p >= 0.01,
        "rows": rows,
        "summary": joint.to_dict() | {"layers": look.to_dict()["layers"], "split": held_out},
        **judged,
    }


def _bands(run: Run, batches: list[Any]) -> list[dict[str, Any]]:
    """Late entries and early exits, judged on these batches with constants of the calibration split."""
    from adaskip.theory.bands import early_exits, judge_bands, late_entries, measure_bands
    from adaskip.theory.profile import calibrate_prices

    model, recipe = run.model, run.recipe
    layers, attention = len(model.described.layers), model.runtime.hides_vision
    spans = [*late_entries(layers), *early_exits(layers)]
    fitted = records(recipe, "calibration")[: 2 * recipe.conditions.examples]
    device, size = model.described.device, recipe.trainer.batch_size
    calibration = [to_device(b, device) for b in loader(fitted, Collator(run.processor), size)]
    fresh = measure_bands(model, calibration, spans, attention)
    measured = measure_bands(model, batches, spans, attention)
    prices = calibrate_prices(fresh, measured.mass.mean(0), recipe.objective.alpha)
    section = recipe.conditions
    judged = judge_bands(measured, spans, prices, recipe.router.group, section.nats, section.level)
    return [found.to_dict(layers) for found in judged]


@torch.no_grad()
def answer(
    run: Path,
    image: Path | None = None,
    prompt: str | None = None,
    example: int | None = None,
    max_new_tokens: int = 16,
) -> dict[str, Any]:
    """Answer one prompt, dense and routed, with the route it took.

    Args:
        run: a run, or an exported folder of routers (then without ``example``).
        image: a picture file.
        prompt: the text; for models with a picture placeholder it may leave the placeholder out.
        example: number of a held-out example of the run's own data, instead of image and prompt.

    Raises:
        DataError: neither a prompt nor an example, or one the data does not have.
    """
    model, processor, loaded = _open(Path(run))
    record = _record(loaded, image, prompt, example, processor, model)
    batch = to_device(Collator(processor, answers=False)([record]), model.described.device)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": False}
    width = batch["inputs"]["input_ids"].shape[1]
    with model.dense():
        dense = model.generate(**batch["inputs"], **options)
    routed = model.generate(**batch["inputs"], **options)
    routing = model.routing
    found = {
        "prompt": record["prompt"],
        "answer": texts(processor, routed[:, width:])[0],
        "dense_answer": texts(processor, dense[:, width:])[0],
        "expected": record.get("answer") or None,
        "keep": float(routing.keep_rate[0]),
        "route": (routing.share[:, 0] > 0.5).tolist(),
        "layers": len(routing.keep),
    }
    if example is not None and loaded is not None and (path := loaded.folder / "evaluation.json").is_file():
        from adaskip import report

        stored = json.loads(path.read_text(encoding="utf-8")) | {"example": found}
        write_text(path, json.dumps(stored, indent=2) + "\n")
        report.write(loaded.folder)
    return found


@torch.no_grad()
def answer_many(run: Path, file: Path, max_new_tokens: int = 16, paths: int | None = None) -> dict[str, Any]:
    """Answer every prompt of a file of JSON lines, those that take the same path together.

    Args:
        run: a run, or an exported folder of routers.
        file: one object a line with ``prompt`` and maybe ``image``, a path relative to the file.
        max_new_tokens: longest answer.
        paths: at most so many paths, see `adaskip.runtime.paths.generate_many`.

    Raises:
        DataError: a line is no such object; says which.
    """
    questions = read_prompts(Path(file))
    model, processor, _ = _open(Path(run))
    collate, device = Collator(processor, answers=False), model.described.device
    asked = [_placed(question, collate, model) for question in questions]
    collate.check(asked)
    items = [to_device(collate([record]), device)["inputs"] for record in asked]
    many = model.generate_many(
        items, paths=paths, measure=paths is not None, max_new_tokens=max_new_tokens, do_sample=False
    )
    rows = [
        {"prompt": question["prompt"], "answer": texts(processor, got.tokens[None])[0], "keep": got.keep_rate}
        | {"route": list(got.path)}
        for question, got in zip(questions, many.answers, strict=True)
    ]
    told = {"keep": many.keep_rate, "groups": len(many.groups), "added": many.added, "changed": many.changed}
    return {"answers": rows, **told, "prefill_s": many.prefill_s, "decode_s": many.decode_s}


def _open(folder: Path) -> tuple[RoutedModel, Any, Run | None]:
    if (folder / RECIPE).is_file():
        loaded = open_run(folder)
        return loaded.model, loaded.processor, loaded
    model = RoutedModel.from_pretrained(router_folder(folder))
    return model, persist.load_processor(model.backbone.config._name_or_path), None


def _record(
    run: Run | None, image: Path | None, prompt: str | None, example: int | None, processor: Any, model: RoutedModel
) -> Record:
    if example is not None:
        if run is None:
            raise DataError(
                "--example needs a run folder with its recipe; for an exported folder pass --image and --prompt"
            )
        held_out = _held_out(run.recipe)
        if not 0 <= example < len(held_out):
            raise DataError(
                f"--example {example}: expected 0 to {len(held_out) - 1}, so many held-out examples there are"
            )
        return held_out[example]
    if prompt is None:
        raise DataError("nothing to answer: pass --prompt TEXT (with --image PATH for a picture) or --example N")
    question = {"prompt": prompt, **({"image": Path(image)} if image is not None else {})}
    return _placed(question, Collator(processor, answers=False), model)


def _placed(question: Record, collate: Collator, model: RoutedModel) -> Record:
    """The same question with a placeholder for each picture, where its prompt leaves them out."""
    if not pictures_of(question) and model.runtime.group == "vision":
        raise DataError(
            f"{where(question)}: these routers route vision tokens; pass a picture with --image PATH, or in "
            'a file of prompts {"prompt": ..., "image": "PATH"}'
        )
    return collate.placed(question)


def _unfitted(recipe: Recipe) -> tuple[list[Record], str]:
    """Records that neither routers, threshold nor prices have seen, and their split.

    Raises:
        DataError: there is no test split, and training has used up the calibration split.
    """
    used = 2 * recipe.conditions.examples  # so many calibration records the prices were fitted on
    try:
        return records(recipe, "test")[-used:], "test"
    except AdaSkipError:
        left = records(recipe, "calibration")[used:]
    if len(left) < 4:
        raise DataError(
            f"check: no test split, and training used {used} calibration records and left {len(left)}; "
            "add a test.jsonl to the data folder"
        )
    return left, "calibration"


def _held_out(recipe: Recipe) -> list[Record]:
    try:
        return records(recipe, "test")
    except AdaSkipError:
        return records(recipe, "calibration")
