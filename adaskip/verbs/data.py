"""`adaskip data`: what a recipe's data hold, split by split, before anything is trained on them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from adaskip.batch import IGNORED
from adaskip.recipe import Recipe, load
from adaskip.sections import Overrides
from adaskip.stages import SILENT, Stages
from adaskip.training.bad_records import BadRecords
from adaskip.training.batches import padding_share
from adaskip.training.data import SPLITS, Collator, Record, pictures_of, where
from adaskip.training.digest import digest
from adaskip.training.pictures import picture_size
from adaskip.training.token_counts import TokenCounts
from adaskip.verbs.splits import fitting, has_test, records

_SHOWN = 2000  # characters of one part of the first example


@dataclass(frozen=True)
class DataReport:
    """Hold what a recipe's data are. ``ok`` is False where more records are bad than the recipe lets be left out."""

    source: str
    splits: tuple[dict[str, Any], ...]  # split, records, pictured, prompt_tokens, answer_tokens, kinds, digest
    padding: dict[str, Any]  # batch_size, and the share of a training batch's tokens: as_they_come, by_length
    pictures: dict[str, Any]  # count, and median and most of width and height, in pixels
    bad: int
    bad_limit: int
    faults: tuple[str, ...]  # of the bad records, each with its place; one may have several
    first: dict[str, Any] | None  # where, and the parts of the first training example as the model reads it

    @property
    def ok(self) -> bool:
        """Return whether a run may start on these data."""
        return self.bad <= self.bad_limit

    def to_dict(self) -> dict[str, Any]:
        """Return what ``--json`` prints."""
        return {
            "ok": self.ok,
            "source": self.source,
            "splits": list(self.splits),
            "padding": self.padding,
            "pictures": self.pictures,
            "bad": self.bad,
            "bad_limit": self.bad_limit,
            "faults": list(self.faults),
            "first": self.first,
        }


def data(recipe: Recipe | str | Path, overrides: Overrides = (), *, stages: Stages = SILENT) -> DataReport:
    """Look at the data of a recipe as its backbone's processor takes them; the model itself is not loaded.

    Args:
        recipe: a name that `adaskip ls` shows, a YAML file, or what `adaskip.recipe.load` returned.
        overrides: ``["data.source=my.jsonl"]`` or ``{"data.source": "my.jsonl"}``.
        stages: hears what is under way.

    Raises:
        AdaSkipError: the recipe is wrong, a split or a whole file cannot be read, or the processor cannot be loaded.
            Single bad records are told in the result instead.

    Example:
        ``adaskip.data("digits-vlm").to_dict()["splits"]``
    """
    recipe = load(recipe, overrides)
    bad = BadRecords(None)
    with stages(f"reading {recipe.data.source}"):
        found = {name: records(recipe, name, bad) for name in SPLITS if name != "test" or has_test(recipe)}
    collate, _ = fitting(recipe)
    with stages("counting tokens"):
        counts = TokenCounts(collate)
        tokens = {name: counts(chosen) for name, chosen in found.items()}
    rows = tuple(_row(name, chosen, tokens[name]) for name, chosen in found.items())
    padding = _padding(recipe, found["train"], [sum(pair) for pair in tokens["train"]])
    first = next((_shown(chosen[0], collate) for chosen in found.values() if chosen), None)
    pictures = _pictures([record for chosen in found.values() for record in chosen])
    faults = tuple(bad.lines())
    return DataReport(recipe.data.source, rows, padding, pictures, len(bad), recipe.data.bad_limit, faults, first)


def _row(split: str, chosen: Sequence[Record], tokens: Sequence[tuple[int, int]]) -> dict[str, Any]:
    prompts, answers = zip(*tokens, strict=True) if chosen else ((), ())
    return {
        "split": split,
        "records": len(chosen),
        "pictured": sum(bool(pictures_of(record)) for record in chosen),
        "prompt_tokens": _spread(prompts),
        "answer_tokens": _spread(answers),
        "kinds": dict(sorted(Counter(str(record.get("kind", "")) for record in chosen).items())),
        "digest": digest(chosen),
    }


def _padding(recipe: Recipe, chosen: Sequence[Record], lengths: Sequence[int]) -> dict[str, Any]:
    size = recipe.trainer.batch_size
    if not chosen:
        return {"batch_size": size, "as_they_come": None, "by_length": None}
    shares = {
        name: padding_share(chosen, lengths, size, recipe.seed, name == "by_length")
        for name in ("as_they_come", "by_length")
    }
    return {"batch_size": size, **shares}


def _spread(values: Sequence[int]) -> dict[str, int | None]:
    """Return the median, the value that 95 of 100 do not pass, and the most; of nothing, None."""
    if not values:
        return dict.fromkeys(("median", "p95", "most"))
    ordered = np.sort(values)
    places = {"median": (len(values) - 1) // 2, "p95": -(-95 * len(values) // 100) - 1, "most": len(values) - 1}
    return {name: int(ordered[place]) for name, place in places.items()}


def _pictures(found: Sequence[Record]) -> dict[str, Any]:
    sizes = [picture_size(picture) for record in found for picture in pictures_of(record)]
    widths, heights = zip(*sizes, strict=True) if sizes else ((), ())
    return {"count": len(sizes), "width": _spread(widths), "height": _spread(heights)}


def _shown(record: Record, collate: Collator) -> dict[str, Any]:
    """Return an example as tokens say it, cut where what is scored begins and ends."""
    batch = collate([record])
    ids = batch.inputs["input_ids"][0].tolist()
    names = [
        "prompt" if prompt else "scored" if label != IGNORED else "read"
        for prompt, label in zip(batch.prompt_mask[0].tolist(), batch.labels[0].tolist(), strict=True)
    ]
    parts = []
    for name, run in groupby(zip(names, ids, strict=True), key=lambda pair: pair[0]):
        tokens = [token for _, token in run]
        parts.append({"part": name, "tokens": len(tokens), "text": _text(tokens, collate)[:_SHOWN]})
    return {"where": where(record), "parts": parts}


def _text(tokens: Sequence[int], collate: Collator) -> str:
    """Decode tokens; those of one picture, hundreds maybe, are written once with their number."""
    picture = collate.placeholders.token_id if collate.placeholders else None
    texts = []
    for is_picture, run in groupby(tokens, key=lambda token: token == picture):
        ids = [*run]
        texts.append(
            f"{collate.tokenizer.decode(ids[:1])} x {len(ids)}" if is_picture else collate.tokenizer.decode(ids)
        )
    return " ".join(texts) if picture in tokens else "".join(texts)
