"""The demo data are right and disjoint; the demo folder is a plain, small, float32 Hugging Face model that answers."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest
import torch

from adaskip.demo import backbone, digits
from adaskip.errors import DataError


@pytest.fixture(scope="module")
def loaded():
    return backbone.load()


def read_labels(image, split: str) -> list[int]:
    """The four labels of a picture, found by looking its quadrants up among the scans."""
    pixels, labels = digits.scans(split)
    known = {scan.tobytes(): int(label) for scan, label in zip(pixels, labels, strict=True)}
    grey = np.asarray(image)[..., 0]
    return [known[grey[row : row + 8, column : column + 8].tobytes()] for row in (0, 8) for column in (0, 8)]


def solve(prompt: str, labels: list[int]) -> str:
    """The answer worked out from the prompt's words alone."""
    numbers = [int(n) for n in re.findall(r"\d+", prompt)]
    words = prompt.split()
    match words[1]:
        case "digit":
            return str(labels[2 * (words[2] == "bottom") + (words[3] == "right")])
        case "sum":
            return str(sum(labels[:2] if words[2] == "top" else labels[2:]))
        case "count":
            return str(labels.count(numbers[0]))
        case "largest":
            return str(max(labels))
        case "repeat":
            return " ".join(map(str, numbers))
        case _:
            return str(sum(numbers))


def test_splits_are_disjoint_stratified_and_complete():
    seen = {split: {scan.tobytes() for scan in digits.scans(split)[0]} for split in digits.SPLITS}
    assert {split: len(scans) for split, scans in seen.items()} == digits.SPLITS
    assert len(set.union(*seen.values())) == 1797
    for split, size in digits.SPLITS.items():
        shares = np.bincount(digits.scans(split)[1], minlength=10) / size
        assert shares == pytest.approx(np.full(10, 0.1), abs=0.01)


@pytest.mark.parametrize("split", digits.SPLITS)
def test_answers_are_right(split):
    for record in digits.examples(split, per_kind=50, seed=3):
        labels = read_labels(record["image"], split)
        named = {"digit": labels, "max": labels, "repeat": record["answer"].split()}.get(record["kind"])
        assert record.get("present") == (None if named is None else sorted({*map(str, named)})), record["prompt"]
        assert {*record} - {"present"} == {"image", "prompt", "answer", "kind"}
        assert (record["image"].mode, record["image"].size) == ("RGB", (16, 16))
        assert record["answer"] == solve(record["prompt"], labels), record["prompt"]


def test_examples_are_deterministic_and_any_prefix_is_balanced():
    def content(seed: int, split: str = "val") -> list[tuple]:
        records = digits.examples(split, per_kind=20, seed=seed)
        return [(r["image"].tobytes(), r["prompt"], r["answer"], r["kind"]) for r in records]

    assert content(0) == content(0)
    assert content(0) != content(1)
    kinds = [record[-1] for record in content(0)]
    assert Counter(kinds) == dict.fromkeys(digits.KINDS, 20)
    for end in range(1, len(kinds)):
        counts = [Counter(kinds[:end])[kind] for kind in digits.KINDS]
        assert max(counts) - min(counts) <= 1


def test_questions_cover_places_rows_and_counts():
    records = digits.examples("train", per_kind=300, seed=0)
    prompts = {record["prompt"] for record in records}
    assert {f"<image> digit {place} ?" for place in digits.PLACES} <= prompts
    assert {"<image> sum top row ?", "<image> sum bottom row ?"} <= prompts
    assert {record["answer"] for record in records if record["kind"] == "count"} >= {"0", "1", "2", "3"}


def test_unknown_split_and_kind_name_the_valid_ones():
    with pytest.raises(DataError, match="split 'tets' is unknown; did you mean 'test'"):
        digits.scans("tets")
    with pytest.raises(DataError, match="kind 'summ' is unknown; did you mean 'sum'"):
        digits.ask("summ", np.zeros(4, dtype=int), np.random.default_rng(0))


def test_folder_loads_as_small_float32_model(loaded):
    model, processor = loaded
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    assert type(processor).__name__ == "LlavaProcessor"
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert len(model.model.language_model.layers) == 12
    assert not model.training
    assert (backbone.FOLDER / "model.safetensors").stat().st_size <= 8_000_000


def test_processor_agrees_with_the_fast_pixel_path(loaded):
    records = digits.examples("test", per_kind=2, seed=0)
    inputs = loaded[1](images=[[r["image"]] for r in records], text=[r["prompt"] for r in records], padding=True)
    fast = digits.pixel_values(np.stack([np.asarray(r["image"])[..., 0] for r in records]))
    assert np.stack(inputs["pixel_values"]) == pytest.approx(fast, abs=1e-6)


def test_processor_pads_left_and_gives_one_token_per_word(loaded):
    _, processor = loaded
    records = digits.examples("test", per_kind=5, seed=0)
    inputs = processor(
        images=[[r["image"]] for r in records],
        text=[f"{r['prompt']} {r['answer']}" for r in records],
        padding=True,
        return_tensors="pt",
    )
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    assert (ids == processor.image_token_id).sum(1).tolist() == [16] * len(records)
    assert processor.tokenizer.unk_token_id not in ids
    assert mask.sum(1).tolist() == [15 + len(f"{r['prompt']} {r['answer']}".split()) for r in records]
    assert (mask.diff(dim=1) >= 0).all()
    assert mask[:, -1].all()


def test_generate_answers_test_questions(loaded):
    model, processor = loaded
    records = digits.examples("test", per_kind=20, seed=1)
    inputs = processor(
        images=[[r["image"]] for r in records], text=[r["prompt"] for r in records], padding=True, return_tensors="pt"
    )
    answers = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
    said = processor.batch_decode(answers, skip_special_tokens=True)
    assert np.mean([a == r["answer"] for a, r in zip(said, records, strict=True)]) >= 0.93
