"""Teach the demo model answers of many words, and write the questions as a folder of JSON lines that a recipe reads.

    python scripts/teach_long_answers.py models/digits-long data/digits-long

Two kinds come to the six of `adaskip.demo.digits`: the four digits of a picture in order, and a description of it.
The decoder goes on learning with the vision tower frozen, and rehearses the old kinds. Only train scans are learned
from; at the end the saved model answers test scans by greedy ``generate``. A folder that is there is not made again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from PIL import Image
from pretrain_digits_vlm import augment
from torch import nn

from adaskip.demo import digits
from adaskip.demo.backbone import load
from adaskip.plan import SkipPlan
from adaskip.runtime.attach import attach
from adaskip.training.data import Collator, load_records
from adaskip.verbs.sample import Sample

LONG = ("order", "describe")
KINDS = (*digits.KINDS, *LONG)
SPLITS = {"train": ("train", 2000), "validation": ("val", 100), "calibration": ("val", 100), "test": ("test", 200)}
"""Of each split the scans it is composed of, and how many pictures; every kind of question is asked of each."""
NEW_WORDS = ("in", "order", "describe", "the", "picture", "shows", "a", "at", "and", ",")
NEW_TOKENS = 32


def ask(kind: str, labels: np.ndarray, rng: np.random.Generator) -> tuple[str, str]:
    """Ask one question of a kind about the picture with these four labels; return it and its answer."""
    if kind == "order":
        return "digit in order ?", " ".join(map(str, labels))
    if kind == "describe":
        parts = [f"a {digit} at the {place}" for digit, place in zip(labels, digits.PLACES, strict=True)]
        return "describe the picture ?", f"the picture shows {' , '.join(parts[:3])} and {parts[3]}"
    return digits.ask(kind, labels, rng)


def questions(labels: np.ndarray, rng: np.random.Generator, kinds: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Yield a record of each kind about one picture, without the picture."""
    for kind in kinds:
        question, answer = ask(kind, labels, rng)
        record: dict[str, Any] = {"prompt": f"<image> {question}", "answer": answer, "kind": kind}
        named = digits.present("digit" if kind in LONG else kind, answer, labels)
        if named is not None:
            record["present"] = named
        yield record


def picture(pixels: np.ndarray) -> Image.Image:
    """Return a picture `16 16`, 0..255, as users have them."""
    return Image.fromarray(np.rint(pixels).astype(np.uint8)).convert("RGB")


@contextmanager
def whole(folder: Path) -> Iterator[Path | None]:
    """Give a folder to fill, which gets its name when it is full; None where it was filled before."""
    if folder.exists():
        yield None
        return
    new = folder.with_name(f"{folder.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    yield new
    new.rename(folder)


def write_data(folder: Path, seed: int) -> None:
    """Write the splits: pictures as PNG, questions as JSON lines."""
    for number, (split, (scans, count)) in enumerate(SPLITS.items()):
        rng = np.random.default_rng([seed, number])
        places, labels = digits.draw(scans, count, rng)
        (folder / split).mkdir(parents=True)
        lines = []
        for index, pixels in enumerate(digits.compose(places)):
            name = f"{split}/{index:04}.png"
            picture(pixels).save(folder / name)
            lines += [json.dumps({"image": name} | record) for record in questions(labels[index], rng, KINDS)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")


def teach(folder: Path, steps: int, pictures: int, seed: int) -> None:
    """Go on from the demo model: of each picture both new questions and two old ones."""
    model, processor = load()
    processor.tokenizer.add_tokens(list(NEW_WORDS))
    model.resize_token_embeddings(len(processor.tokenizer))
    model.requires_grad_(False)
    learning = [model.model.multi_modal_projector, model.model.language_model, model.lm_head]
    parameters = [weight.requires_grad_() for part in learning for weight in part.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=5e-4, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-4, total_steps=steps, pct_start=0.1)
    collate, rng, started = Collator(processor), np.random.default_rng(seed), time.perf_counter()
    for step in range(1, steps + 1):
        places, labels = digits.draw("train", pictures, rng)
        seen = digits.compose(augment(places, rng))
        records = [
            {"image": picture(pixels)} | record
            for pixels, four in zip(seen, labels, strict=True)
            for record in questions(four, rng, (*LONG, *rng.choice(digits.KINDS, 2, replace=False)))
        ]
        batch = collate(records)
        loss = model(**batch.inputs, labels=batch.labels).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps:
            print(f"step {step}  loss {loss:.4f}  {time.perf_counter() - started:.0f} s", flush=True)
    model.generation_config.max_new_tokens = NEW_TOKENS
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)


def judge(model_folder: Path, data: Path, batch_size: int = 200) -> dict[str, dict[str, float]]:
    """Return what greedy answers to the test questions are worth, for each kind: means over its questions."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    backbone = AutoModelForImageTextToText.from_pretrained(model_folder, local_files_only=True).eval()
    processor = AutoProcessor.from_pretrained(model_folder, local_files_only=True)
    model, records = attach(backbone, SkipPlan()), load_records(str(data), "test", None, 0)
    found = {}
    for kind in KINDS:
        asked = [record for record in records if record["kind"] == kind]
        figures = Sample(asked, processor, batch_size, model.spec.device)(model)
        found[kind] = {
            name: fmean(value for value in figures[name] if value is not None)
            for name in ("exact", "edit_distance", "hallucinated")
            if figures[name][0] is not None
        }
    return found


def main() -> None:
    """Write the data, teach, and print what was learned."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder to write the model to")
    parser.add_argument("data", type=Path, help="folder to write the questions to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--pictures", type=int, default=16, help="a step")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    with whole(options.data) as folder:
        if folder is not None:
            write_data(folder, options.seed)
    with whole(options.model) as folder:
        if folder is not None:
            teach(folder, options.steps, options.pictures, options.seed)
    for kind, figures in judge(options.model, options.data).items():
        print(kind, json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
