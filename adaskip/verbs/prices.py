"""Write and read `prices.json`, the bound's constants that a run leaves behind for `adaskip check`."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adaskip.errors import CheckpointError
from adaskip.runfiles import PRICES, write_json
from adaskip.theory.prices import Functional, Prices

_PER_LAYER = ("shift", "peak", "mass")  # (l)
_OPTIONAL = ("correlation", "slope")  # (l l) and (2 l), or null where the run's price needs none
_NUMBERS = ("alpha", "c")


def write_prices(folder: Path, prices: Prices) -> None:
    """Write a run's prices into its folder."""
    write_json(folder / PRICES, {name: _plain(value) for name, value in asdict(prices).items()})


def read_prices(folder: Path) -> Prices:
    """Read the prices that a run left in its folder.

    Raises:
        CheckpointError: there are none, or they are damaged.
    """
    path = folder / PRICES
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        tensors: dict[str, Tensor | None] = {name: _tensor(stored[name]) for name in _PER_LAYER}
        tensors |= {name: _tensor(stored[name]) if stored.get(name) is not None else None for name in _OPTIONAL}
        numbers = {name: float(stored[name]) for name in _NUMBERS}
        _check_shapes(tensors)
        functional = _functional(stored.get("functional"), len(stored["shift"]))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: missing, and the bound's constants are in it; train the run again") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: missing or damaged ({error}); train the run again") from error
    return Prices(**tensors, **numbers, functional=functional)  # type: ignore[arg-type]


def check_layers(prices: Prices, layers: int, folder: Path) -> None:
    """Refuse prices of a model with another number of layers.

    Raises:
        CheckpointError: they are; the file was mixed up with another run's.
    """
    if len(prices.shift) != layers:
        raise CheckpointError(
            f"{folder / PRICES}: expected prices of {layers} layers, found {len(prices.shift)}; it belongs to another "
            "run"
        )


def _check_shapes(tensors: dict[str, Tensor | None]) -> None:
    count = len(tensors["shift"]) if tensors["shift"] is not None and tensors["shift"].ndim == 1 else 0
    shapes = {"correlation": (count, count), "slope": (2, count)}
    for name, values in tensors.items():
        if values is None:
            continue
        expected = shapes.get(name, (count,))
        if not count or values.shape != expected or values.isnan().any():
            raise ValueError(f"{name}: expected one number for every layer, got {tuple(values.shape)}")


def _functional(stored: Any, layers: int) -> Functional | None:
    if stored is None:
        return None
    tensors = {field.name: _tensor(stored[field.name]) for field in fields(Functional)}
    features = len(tensors["centre"])
    for name, values in tensors.items():
        expected = {"centre": (features,), "weight": (features, layers)}.get(name, (layers,))
        if values.shape != expected or values.isnan().any():
            raise ValueError(f"functional.{name}: expected shape {expected}, got {tuple(values.shape)}")
    return Functional(**tensors)


def _tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    return value.tolist() if isinstance(value, Tensor) else value
