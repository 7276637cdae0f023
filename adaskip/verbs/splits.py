"""Read the splits of a run's data, and say which of their inputs nothing was fitted on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from adaskip import sources
from adaskip.errors import AdaSkipError, ConfigError, DataError, did_you_mean
from adaskip.recipe import Recipe
from adaskip.training.data import SPLITS, Record, load_records
from adaskip.training.records import split_file
from adaskip.verbs.amounts import fitted


def records(recipe: Recipe, split: str) -> list[Record]:
    """Read one split of a recipe's data, as long as the recipe wants it."""
    section = recipe.data
    columns = section.columns.model_dump()
    return load_records(section.source, split, getattr(section.examples, split), recipe.seed, columns)


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
    folder = Path(recipe.data.source)
    if folder.is_dir():
        return split_file(folder, "test").is_file()
    try:
        return bool(records(recipe, "test"))
    except AdaSkipError:  # a dataset of the hub tells only by failing
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
