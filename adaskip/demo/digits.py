"""Questions about pictures of 2x2 handwritten digits, made from the 1,797 8x8 scans that ship with scikit-learn.

The kinds need the picture to different degrees: `digit`, `sum`, `count` and `max` cannot be answered without it,
`arithmetic` and `repeat` never look at it. Every example is a plain record,

    {"image": PIL.Image (RGB, 16x16), "prompt": "<image> digit top left ?", "answer": "7", "kind": "digit"},

the format user data has as well. Where an answer names digits, ``present`` lists those that it may name: of the picture
for `digit` and `max`, of the question for `repeat`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image

from adaskip.errors import DataError, did_you_mean

SPLITS: dict[str, int] = {"train": 1297, "val": 200, "test": 300}
KINDS: tuple[str, ...] = ("digit", "sum", "count", "max", "arithmetic", "repeat")
PLACES: tuple[str, ...] = ("top left", "top right", "bottom left", "bottom right")
WORDS: tuple[str, ...] = (
    *("digit", "sum", "count", "largest", "repeat", "plus", "top", "bottom", "left", "right", "row", "?"),
    *(str(n) for n in range(19)),
)
_DRAWN = {"train": ("train", 0), "validation": ("val", 1000), "calibration": ("val", 2000), "test": ("test", 3000)}
"""Of each split of a recipe's data the scans it is composed of, and what is added to the seed."""
REPEATED = 0.25
"""Chance that a place shows the same digit as the place before it, so that counts above one are common."""


@lru_cache
def scans(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Return a split's grey scans `n 8 8` (uint8, ink is bright) and labels `n`; splits are disjoint and stratified.

    Raises DataError for an unknown split.
    """
    if split not in SPLITS:
        raise DataError(f"split {split!r} is unknown; {did_you_mean(split, SPLITS)}")
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    pixels = np.rint(images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    rest, test = train_test_split(np.arange(len(labels)), test_size=SPLITS["test"], stratify=labels, random_state=0)
    train, val = train_test_split(rest, test_size=SPLITS["val"], stratify=labels[rest], random_state=0)
    rows = {"train": train, "val": val, "test": test}[split]
    return pixels[rows], labels[rows]


def draw(split: str, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw scans `count 4 8 8` for the four places of `count` pictures, and their labels `count 4`."""
    pixels, classes = scans(split)
    labels = rng.integers(10, size=(count, 4))
    same = rng.random((count, 4)) < REPEATED
    for place in range(1, 4):
        labels[:, place] = np.where(same[:, place], labels[:, place - 1], labels[:, place])
    # scans sorted by label lie in ten runs; a scan of a label is a random place in its run
    order, sizes = np.argsort(classes, kind="stable"), np.bincount(classes)
    starts = np.cumsum(sizes) - sizes
    chosen = order[starts[labels] + (rng.random((count, 4)) * sizes[labels]).astype(int)]
    return pixels[chosen], labels


def compose(places: np.ndarray) -> np.ndarray:
    """Compose pictures `n 16 16` of the scans `n 4 8 8` at their places, in the order of `PLACES`."""
    return places.reshape(-1, 2, 2, 8, 8).swapaxes(2, 3).reshape(-1, 16, 16)


def pixel_values(pictures: np.ndarray) -> np.ndarray:
    """Turn pictures `n 16 16`, 0..255, into what the processor makes of them: float32 `n 3 16 16`, scaled to -1..1."""
    return np.repeat((pictures.astype(np.float32) / 255 - 0.5)[:, None] / 0.5, 3, axis=1)


def ask(kind: str, labels: np.ndarray, rng: np.random.Generator) -> tuple[str, str]:
    """Ask one question of a kind about the picture with these four labels; return it and its answer, a token per word.

    Raises DataError for an unknown kind.

    >>> ask("max", np.array([3, 8, 0, 1]), np.random.default_rng(0))
    ('largest digit ?', '8')
    """
    match kind:
        case "digit":
            place = rng.integers(4)
            return f"digit {PLACES[place]} ?", str(labels[place])
        case "sum":
            row = rng.integers(2)
            return f"sum {('top', 'bottom')[row]} row ?", str(labels[2 * row : 2 * row + 2].sum())
        case "count":
            # a digit drawn from all ten is mostly absent, and the answer 0: half are drawn from those in the picture
            digit = rng.choice(labels) if rng.random() < 0.5 else rng.integers(10)
            return f"count {digit} ?", str((labels == digit).sum())
        case "max":
            return "largest digit ?", str(labels.max())
        case "arithmetic":
            a, b = rng.integers(10, size=2)
            return f"{a} plus {b} ?", str(a + b)
        case "repeat":
            number = " ".join(map(str, rng.integers(10, size=3)))
            return f"repeat {number} ?", number
    raise DataError(f"kind {kind!r} is unknown; {did_you_mean(kind, KINDS)}")


def present(kind: str, answer: str, labels: np.ndarray) -> list[str] | None:
    """Return the digits that an answer may name, of the picture with these labels or of the question; None: none is.

    >>> present("max", "8", np.array([3, 8, 0, 8])), present("sum", "11", np.array([3, 8, 0, 8]))
    (['0', '3', '8'], None)
    """
    if kind in ("digit", "max"):
        return sorted({*map(str, labels)})
    return sorted({*answer.split()}) if kind == "repeat" else None


def records(split: str, limit: int | None, seed: int) -> list[dict[str, Any]]:
    """Draw the examples of a split of a recipe's data: train, validation, calibration or test.

    Validation and calibration are composed of the same scans, into different pictures.

    Args:
        split: of the recipe's data.
        limit: so many; None: 200 of each kind.
        seed: of the draw; every split has draws of its own.
    """
    per_kind = -(-(limit or 200 * len(KINDS)) // len(KINDS))
    scans, draws = _DRAWN[split]
    return examples(scans, per_kind, seed + draws)[:limit]


def examples(split: str, per_kind: int, seed: int) -> list[dict[str, Any]]:
    """Make `per_kind` records of each kind, in turn (any prefix is balanced); equal arguments make equal records."""
    rng = np.random.default_rng([seed, *split.encode()])
    places, labels = draw(split, per_kind * len(KINDS), rng)
    records = []
    for index, picture in enumerate(compose(places)):
        kind = KINDS[index % len(KINDS)]
        question, answer = ask(kind, labels[index], rng)
        image = Image.fromarray(picture).convert("RGB")
        record = {"image": image, "prompt": f"<image> {question}", "answer": answer, "kind": kind}
        if (named := present(kind, answer, labels[index])) is not None:
            record["present"] = named
        records.append(record)
    return records
