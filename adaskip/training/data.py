"""From records {image, prompt, answer, kind} to batches any Hugging Face processor understands."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from adaskip.demo.backbone import EMBEDDED
from adaskip.errors import DataError
from adaskip.theory.profile import IGNORED

FIELDS = ("image", "prompt", "answer", "kind")
SPLITS = ("train", "validation", "calibration", "test")
Record = dict[str, Any]
Batch = dict[str, Any]


def load_records(
    source: str, split: str, limit: int | None, seed: int, columns: Mapping[str, str] | None = None
) -> list[Record]:
    """One split of a data source, as records with at least ``prompt`` and ``answer``.

    Args:
        source: ``digits-vlm`` (made on the spot), a folder of ``<split>.jsonl`` files, or a Hugging Face dataset id.
        split: train, validation, calibration or test. Where a source has no calibration split, the second half of its
            validation split serves, and validation is the first half.
        limit: at most this many records; for ``digits-vlm`` how many are drawn.
        seed: of the draw (``digits-vlm``).
        columns: the source's own names of our fields.

    Raises:
        DataError: the source, split or a field is missing; says which file and line.
    """
    if source == EMBEDDED:
        from adaskip.demo.digits import KINDS, examples

        scans = {"train": "train", "test": "test"}.get(split, "val")
        per_kind = -(-(limit or 6 * 200) // len(KINDS))
        return examples(scans, per_kind, seed + 1000 * SPLITS.index(split))[:limit]
    names = {field: (columns or {}).get(field, field) for field in FIELDS}
    folder = Path(source)
    records = _read_folder(folder, split, names) if folder.is_dir() else _read_hub(source, split, names)
    return records[:limit]


def _read_folder(folder: Path, split: str, names: Mapping[str, str]) -> list[Record]:
    if split in ("validation", "calibration") and not (folder / "calibration.jsonl").is_file():
        return _half(_read_file(folder, "validation", names), second=split == "calibration")
    return _read_file(folder, split, names)


def _read_file(folder: Path, split: str, names: Mapping[str, str]) -> list[Record]:
    path = folder / f"{split}.jsonl"
    if not path.is_file():
        found = ", ".join(sorted(p.name for p in folder.glob("*.jsonl"))) or "no .jsonl file"
        raise DataError(f"{path}: no such file; expected {split}.jsonl in {folder}, which holds {found}")
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number}: not JSON ({error.msg}); expected one object a line") from error
        records.append(_record(row, names, f"{path}, line {number}", folder))
    if not records:
        raise DataError(f"{path}: the file is empty; expected one JSON object a line with {', '.join(FIELDS)}")
    return records


def _read_hub(source: str, split: str, names: Mapping[str, str]) -> list[Record]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise DataError(
            f"data.source {source!r} is no folder; to read it as a Hugging Face dataset: pip install 'adaskip[data]'"
        ) from error
    try:
        table = load_dataset(source, split="validation" if split == "calibration" else split)
    except Exception as error:
        raise DataError(f"data.source {source!r}: neither a folder here nor a dataset that loads ({error})") from error
    rows = [_record(row, names, f"{source}, {split} row {i}", None) for i, row in enumerate(table)]
    return _half(rows, second=split == "calibration") if split in ("validation", "calibration") else rows


def _half(records: list[Record], second: bool) -> list[Record]:
    middle = (len(records) + 1) // 2
    return records[middle:] if second else records[:middle]


def _record(row: Any, names: Mapping[str, str], where: str, folder: Path | None) -> Record:
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected a JSON object, got {type(row).__name__}")
    missing = [names[field] for field in ("prompt", "answer") if not isinstance(row.get(names[field]), str)]
    if missing:
        raise DataError(
            f"{where}: expected text in {' and '.join(missing)}, found fields {', '.join(row)}; "
            "name your columns under data.columns"
        )
    record = {field: row[names[field]] for field in FIELDS if row.get(names[field]) is not None}
    image = record.get("image")
    if isinstance(image, str):
        path = Path(image) if folder is None else folder / image
        if not path.is_file():
            raise DataError(f"{where}: image {path} does not exist; paths are relative to the file's folder")
        record["image"] = path
    return record


def open_image(image: Any) -> Image.Image:
    """A record's image as RGB.

    Raises:
        DataError: the file is missing or no image.
    """
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    try:
        with Image.open(image) as opened:
            return opened.convert("RGB")
    except OSError as error:
        raise DataError(f"image {image}: cannot be read ({error})") from error


class Collator:
    """Records -> one left-padded batch.

    Args:
        processor: a processor (pictures and text) or a tokenizer (text only).
        answers: append the answers, for training and teacher forcing; without, the batch is a bare prompt.

    The batch holds ``inputs`` (the model's own arguments), ``labels`` long (b t) with -100 everywhere but on the
    answers, ``prompt_mask`` bool (b t), ``kind`` and ``answer`` (lists).
    """

    def __init__(self, processor: Any, answers: bool = True) -> None:
        self.processor = processor
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.answers = answers
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    def __call__(self, records: Sequence[Record]) -> Batch:
        """Raises DataError when only some of the records have an image or the processor takes none."""
        pictured = [r for r in records if r.get("image") is not None]
        if pictured and self.processor is self.tokenizer:
            raise DataError(
                "a record has an image, but the backbone's tokenizer takes text only; use a vision-language model"
            )
        if pictured and len(pictured) < len(records):
            raise DataError(
                f"{len(pictured)} of {len(records)} records have an image; expected all or none in one batch"
            )
        pictures = {"images": [[open_image(r["image"])] for r in records]} if pictured else {}
        inputs = dict(
            self.processor(
                text=[r["prompt"] for r in records], padding=True, padding_side="left", return_tensors="pt", **pictures
            )
        )
        batch: Batch = {
            "inputs": inputs,
            "prompt_mask": inputs["attention_mask"].bool(),
            "kind": [r.get("kind", "") for r in records],
            "answer": [r["answer"] for r in records],
        }
        if self.answers:
            end = [self.tokenizer.eos_token_id]
            tokens = [self.tokenizer(text, add_special_tokens=False)["input_ids"] + end for text in batch["answer"]]
            append_answers(batch, [torch.tensor(ids) for ids in tokens], self.tokenizer.pad_token_id)
        return batch


def append_answers(batch: Batch, answers: Sequence[Tensor], pad: int) -> None:
    """Put answers, long (n) each, behind the prompts of a batch in place, with their labels; ``pad`` fills up."""
    inputs = batch["inputs"]
    shape = inputs["input_ids"].shape
    labels = torch.nn.utils.rnn.pad_sequence([*answers], batch_first=True, padding_value=IGNORED)
    real = labels != IGNORED
    added = {"input_ids": torch.where(real, labels, pad), "attention_mask": real.long()}
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.shape == shape:  # whatever else the processor says of every token
            inputs[name] = torch.cat([value, added.get(name, torch.zeros_like(labels)).to(value)], 1)
    batch["labels"] = torch.cat([torch.full(shape, IGNORED, device=labels.device), labels], 1)
    batch["prompt_mask"] = torch.nn.functional.pad(batch["prompt_mask"], (0, labels.shape[1]))


class RoundSampler(Sampler[int]):
    """The records of one round of steps, a pure function of (seed, round, rank).

    A round is as many steps as lie between two checkpoints, so that a run resumed from a checkpoint reads exactly the
    batches it would have read. Every record is seen once before any is seen twice.

    Args:
        count: records there are.
        per_round: records this process reads in a round.
        seed: of the permutations.
    """

    def __init__(self, count: int, per_round: int, seed: int) -> None:
        self.count, self.per_round, self.seed, self.round = count, per_round, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before each round."""
        self.round = epoch

    def __len__(self) -> int:
        return self.per_round

    def __iter__(self) -> Iterator[int]:
        spread = torch.distributed.is_available() and torch.distributed.is_initialized()
        ranks, rank = (torch.distributed.get_world_size(), torch.distributed.get_rank()) if spread else (1, 0)
        sweep, order = -1, torch.empty(0)
        for step in range(self.per_round):
            place = (self.round * self.per_round + step) * ranks + rank
            if place // self.count != sweep:
                sweep = place // self.count
                draw = torch.Generator().manual_seed(self.seed * 1_000_003 + sweep)
                order = torch.randperm(self.count, generator=draw)
            yield int(order[place % self.count])


def loader(records: Sequence[Record], collate: Collator, batch_size: int, workers: int = 0) -> DataLoader[Any]:
    """Batches of all records, in order."""
    return DataLoader(records, batch_size, collate_fn=collate, num_workers=workers)  # type: ignore[arg-type]


def answer_positions(labels: Tensor) -> Tensor:
    """bool (b t-1): where the logits of position t predict a supervised token."""
    return labels[:, 1:] != IGNORED
