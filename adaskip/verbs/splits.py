"""Read the splits of a run's data, and say which of their inputs nothing was fitted on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from math import inf
from typing import Any

from adaskip import sources
from adaskip.backbone.load import load_processor, read_positions
from adaskip.errors import ConfigError, DataError, did_you_mean
from adaskip.recipe import DataSection, Recipe
from adaskip.training.bad_records import BadRecords
from adaskip.training.data import SPLITS, Collator, Record, load_records
from adaskip.training.reading import holds_split
from adaskip.training.screening import as_conversation, screen
from adaskip.verbs.amounts import fitted

Fit = Callable[[], tuple[Collator, int | None]]


def records(recipe: Recipe, split: str, bad: BadRecords | None = None) -> list[Record]:
    """Read one split of a recipe's data as its backbone's processor takes it, as long as the recipe wants it.

    Args:
        recipe: says where the data lie, and how many bad records may be left out.
        split: its name.
        bad: hears of bad records of several splits; None: this one may have no more than the recipe allows.

    Raises:
        DataError: there is no such split, or too much of it is bad; lists what.
    """
    limit = getattr(recipe.data.examples, split)
    return read_split(recipe.data, split, limit, recipe.seed, lambda: fitting(recipe), bad)


def read_split(
    section: DataSection, split: str, limit: int | None, seed: int, fit: Fit, bad: BadRecords | None = None
) -> list[Record]:
    """Read one split of the data that a section names; see `records`.

    Args:
        section: names the data.
        split: its name.
        limit: at most this many records.
        seed: of data that ship with the package, which are drawn; others are divided with ``data.seed``.
        fit: returns the collator of a backbone and its positions; not asked for what ships with the package.
        bad: as for `records`.
    """
    own = BadRecords(section.bad_limit) if bad is None else bad
    drawn_by = seed if sources.is_shipped(section.source) else section.seed
    found = load_records(
        section.source, split, limit, drawn_by, section.columns.model_dump(), bad=own, subset=section.subset,
        max_pixels=section.max_pixels,
    )  # fmt: skip
    if not sources.is_shipped(section.source):
        if section.chat:
            found = [as_conversation(record) for record in found]
        collate, positions = fit()
        longest = min(section.max_tokens or inf, positions or inf)
        named = "data.max_tokens" if longest == section.max_tokens else "positions of the backbone"
        found = screen(found, collate, own, None if longest == inf else int(longest), named)
    if bad is None:
        own.stop(section.source)
    return found


def fitting(recipe: Recipe) -> tuple[Collator, int | None]:
    """Return the collator of a recipe's backbone, with answers, and how many positions that has."""
    backbone = recipe.backbone
    return _fitting(backbone.path, backbone.trust_remote_code, backbone.revision)


@lru_cache(maxsize=1)
def _fitting(path: str, trust_remote_code: bool, revision: str | None) -> tuple[Collator, int | None]:
    """Keep what was loaded last, as verbs read one split after the other."""
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "revision": revision}
    return Collator(load_processor(path, **options)), read_positions(path, **options)


def check_split(split: str) -> None:
    """Refuse a name that no split can have.

    Raises:
        ConfigError: lists the names.
    """
    if split not in SPLITS:
        hint = did_you_mean(split, SPLITS)
        near = f"; {hint}" if hint.startswith("did") else ""
        raise ConfigError(f"--split: expected one of {', '.join(SPLITS)}, got {split!r}{near}")


def split_of(recipe: Recipe, split: str, per_kind: int | None = None) -> list[Record]:
    """Read one split of a run's data for a verb that asks for it by name.

    Args:
        recipe: of the run.
        split: its name.
        per_kind: so many of each kind will be used; data that is drawn is then drawn so long.

    Raises:
        ConfigError: no split can have that name.
        DataError: the data does not hold it; says which other one to ask for.
    """
    check_split(split)
    if per_kind is not None and sources.is_shipped(recipe.data.source):
        source = recipe.data.source
        return load_records(source, split, per_kind * len(sources.shipped_kinds(source)), recipe.seed)
    if split == "test" and not has_test(recipe):
        raise DataError(
            f"{recipe.data.source}: holds no test split; add a test.jsonl with prompts and answers there, or ask for "
            "inputs that training has seen: --split validation"
        )
    return records(recipe, split)


def has_test(recipe: Recipe) -> bool:
    """Return whether a run's data holds a test split; a split that is there but damaged counts."""
    try:
        return holds_split(recipe.data.source, "test", recipe.data.subset)
    except DataError:  # a data set of the Hub that cannot be reached
        return False


def held_out(recipe: Recipe) -> tuple[Sequence[Record], str]:
    """Read examples to show, which the routers were not trained on, from split test or else calibration."""
    split = "test" if has_test(recipe) else "calibration"
    return records(recipe, split), split


def unfitted(recipe: Recipe) -> tuple[list[Record], str]:
    """Read records that neither routers, threshold nor prices have seen, and name their split.

    Raises:
        DataError: there is no test split, and training has used up the calibration split.
    """
    used = fitted(recipe)
    if has_test(recipe):
        return records(recipe, "test")[-used:], "test"
    rest = records(recipe, "calibration")[used:]
    if len(rest) < 4:
        raise DataError(
            f"check: no test split, and training used {used} calibration records and left {len(rest)}; "
            f"add a test.jsonl to {recipe.data.source}"
        )
    return rest, "calibration"
