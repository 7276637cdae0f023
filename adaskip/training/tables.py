"""Tables of Hugging Face's `datasets`: Parquet files and data sets of the Hub, row by row, pictures as stored."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from adaskip.errors import DataError
from adaskip.training.records import Row

_DAMAGES = (OSError, SyntaxError, ValueError, TypeError, KeyError, RuntimeError)
"""What reading one row of a table may raise: damaged pictures above all."""


@lru_cache(maxsize=8)
def hub_splits(source: str, subset: str | None) -> frozenset[str]:
    """Return the names of a data set's splits; asked once, as every split is read by itself.

    Raises:
        DataError: there is no such data set, or it cannot be reached.
    """
    datasets = _library(source)
    try:
        return frozenset(map(str, datasets.get_dataset_split_names(source, subset)))
    except Exception as error:
        raise DataError(_unknown(source, error)) from error


def hub_table(source: str, split: str, subset: str | None, limit: int | None) -> Any:
    """Return a split of a data set of the Hub; where ``limit`` rows are enough, no more than these are fetched.

    Raises:
        DataError: it has no such split, or does not load.
    """
    datasets = _library(source)
    try:
        if limit is None:
            return stored_pictures(datasets.load_dataset(source, subset, split=split))
        return stored_pictures(datasets.load_dataset(source, subset, split=split, streaming=True)).take(limit)
    except Exception as error:
        raise DataError(_unknown(source, error)) from error


def parquet_table(path: Path) -> Any:
    """Return a Parquet file as a table.

    Raises:
        DataError: it is none.
    """
    datasets = _library(str(path))
    try:
        with tempfile.TemporaryDirectory() as cache:  # the rows are read at once, and nothing of them stays behind
            table = datasets.Dataset.from_parquet(str(path), cache_dir=cache, keep_in_memory=True)
        return stored_pictures(table)
    except Exception as error:
        raise DataError(f"{path}: cannot be read as Parquet ({str(error).splitlines()[0]})") from error


def table_rows(table: Any, title: str) -> Iterator[Row]:
    """Yield the rows of a table, each with where it stands; of a stream, one after the other."""
    if not hasattr(table, "__len__"):
        number = -1
        try:
            for number, row in enumerate(table):
                yield f"{title} {number}", row, None
        except _DAMAGES as error:
            raise DataError(f"{title} {number + 1}: cannot be fetched ({error})") from error
        return
    for number in range(len(table)):
        try:
            yield f"{title} {number}", table[number], None
        except _DAMAGES as error:
            yield f"{title} {number}", None, f"cannot be read ({error})"


def stored_pictures(table: Any) -> Any:
    """Return a table that gives the bytes of picture files, not pixels, which take ten times the memory."""
    if (features := getattr(table, "features", None)) is None:
        return table
    plain = _undecoded(features)
    return table.cast(type(features)(plain)) if plain != dict(features) else table


def _undecoded(feature: Any) -> Any:
    """Return a feature in which no picture is decoded, however deep it stands."""
    import datasets

    if isinstance(feature, datasets.Image):
        return datasets.Image(mode=feature.mode, decode=False)
    if isinstance(feature, dict):
        return {name: _undecoded(inner) for name, inner in feature.items()}
    if isinstance(feature, list):
        return [_undecoded(inner) for inner in feature]
    if hasattr(feature, "feature"):  # a list of values of one kind
        return type(feature)(_undecoded(feature.feature), feature.length)
    return feature


def _library(source: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        if source.endswith(".parquet"):
            raise DataError(f"{source}: to read Parquet: pip install 'adaskip[data]'") from error
        raise DataError(
            f"data.source {source!r} is no folder; to read it as a Hugging Face dataset: pip install 'adaskip[data]'"
        ) from error
    return datasets


def _unknown(source: str, error: Exception) -> str:
    return f"data.source {source!r}: neither a folder here nor a dataset that loads ({error})"
