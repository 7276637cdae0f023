"""Splits of a source that has none: drawn with a seed, and inputs that are equal never come into two of them."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from PIL import Image

from adaskip.training.messages import first_answer
from adaskip.training.pictures import pictures_of

_MOST = 1000  # records of a split but train
_DRAWN = ("test", "calibration", "validation")  # train gets the rest


def shares(count: int) -> dict[str, int]:
    """Return how many of so many records each split but train gets: a tenth, and more of a small source.

    Constants are fitted on 14 calibration inputs at least, at the default miscoverage, and 4 judge: so a source of 55
    records can be trained on, and one of ten with cheaper constants.

    >>> shares(1000), shares(60), shares(10)  # doctest: +NORMALIZE_WHITESPACE
    ({'test': 100, 'calibration': 100, 'validation': 100}, {'test': 6, 'calibration': 16, 'validation': 8},
     {'test': 1, 'calibration': 3, 'validation': 4})
    """
    tenth = min(count // 10, _MOST)
    fitted, judged = max(tenth, min(16, 3 * count // 10)), max(tenth, min(8, 4 * count // 10))
    return {"test": tenth, "calibration": fitted, "validation": judged}


def divide(records: Sequence[dict[str, Any]], split: str, seed: int, stored: Sequence[str] = ()) -> list[Any]:
    """Return one split of records that come without splits, in their order.

    Which split a record comes into depends on the seed and on what all of them ask, not on the order of the file.
    Records with the same prompt and pictures stay together, so that a split may be a few records longer than its share.

    Args:
        records: all there are.
        split: train, validation, calibration or test.
        seed: of the draw.
        stored: splits that the source has itself, and that get nothing here.
    """
    inputs: dict[str, list[int]] = defaultdict(list)
    for index, record in enumerate(records):
        inputs[_mark(record, seed)].append(index)
    wanted = {name: share for name, share in shares(len(records)).items() if name not in stored}
    chosen: dict[str, list[int]] = {name: [] for name in ("train", *_DRAWN)}
    for mark in sorted(inputs):
        home = next((name for name in _DRAWN if len(chosen[name]) < wanted.get(name, 0)), "train")
        chosen[home] += inputs[mark]
    return [records[index] for index in sorted(chosen[split])]


def _mark(record: dict[str, Any], seed: int) -> str:
    """Return a string that is equal for equal prompts with equal pictures."""
    messages = record.get("messages")
    asked = record["prompt"] if messages is None else messages[: first_answer(messages)]
    mark = hashlib.sha256(json.dumps([seed, asked]).encode())
    for picture in pictures_of(record):  # as written: where the folder lies changes nothing
        content = picture.get("bytes") or picture.get("path") if isinstance(picture, dict) else picture
        content = content.tobytes() if isinstance(content, Image.Image) else content
        mark.update(content if isinstance(content, bytes) else str(content).encode())
    return mark.hexdigest()
