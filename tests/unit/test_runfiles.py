"""A run's files: each is written whole or not at all, and the prices that are read are those that were written."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
import torch

from adaskip import runfiles
from adaskip.errors import CheckpointError
from adaskip.theory.prices import Prices
from adaskip.verbs.prices import check_layers, read_prices, write_prices


def test_a_write_that_fails_leaves_the_file_before_it_and_nothing_beside(tmp_path: Path) -> None:
    """Half a file under the right name is worse than none, and parts of files fill a folder."""
    path = tmp_path / "a.json"
    runfiles.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        runfiles.write_json(path, {"a": object()})

    def half(part: Path) -> None:
        part.write_text("{")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        runfiles.write_with(path, half)
    assert path.read_text() == '{"a": 1}\n'
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


def test_a_write_without_room_names_the_file(tmp_path: Path) -> None:
    """Would catch: "No space left on device" and no word of where, for the system names no file to a writer."""

    def no_room(part: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=rf"No space left on device: '{tmp_path / 'a.json'}'"):
        runfiles.write_with(tmp_path / "a.json", no_room)


def test_lines_are_appended_to_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    runfiles.write_lines(path, [{"a": 1}])
    runfiles.append_line(path, {"a": "\u2028"})
    assert path.read_text() == '{"a": 1}\n{"a": "\\u2028"}\n'


@pytest.mark.parametrize("name", ["metrics.csv", "metrics.csv.part", "metrics.csv.0a1b2c3d.part"])
def test_an_unfinished_file_is_known_by_the_name_it_was_to_get(name: str) -> None:
    """A start that was killed while it wrote leaves such a file, and blocks nothing."""
    assert runfiles.whole_name(name) == "metrics.csv"


def prices(price: str) -> Prices:
    layers = torch.tensor([0.5, torch.inf], dtype=torch.float64)  # one layer's constant may be infinite
    return Prices(
        layers,
        2 * layers,
        torch.zeros(2, dtype=torch.float64),
        0.2,
        1.5,
        torch.eye(2, dtype=torch.float64) if price == "gates" else None,
        torch.stack([layers, layers]) if price == "fisher" else None,
    )


@pytest.mark.parametrize("price", ["calibrated", "gates", "fisher"])
def test_prices_come_back_as_they_were(tmp_path: Path, price: str) -> None:
    """`check` once forgot the constants of price fisher, which training had written."""
    written = prices(price)
    write_prices(tmp_path, written)
    read = read_prices(tmp_path)
    for field in fields(Prices):
        before, after = getattr(written, field.name), getattr(read, field.name)
        assert torch.equal(before, after) if isinstance(before, torch.Tensor) else before == after, field.name
    with pytest.raises(CheckpointError, match="expected prices of 3 layers, found 2; it belongs to another run"):
        check_layers(read, 3, tmp_path)


@pytest.mark.parametrize("name", ["correlation", "slope"])
def test_constants_of_another_number_of_layers_are_damage(tmp_path: Path, name: str) -> None:
    values = {"shift": [1.0, 2.0], "peak": [1.0, 2.0], "mass": [0.0, 0.0], "alpha": 0.1, "c": 1.0, name: [[1.0]]}
    runfiles.write_json(tmp_path / runfiles.PRICES, values)
    with pytest.raises(CheckpointError, match=rf"prices.json: missing or damaged \({name}: expected one number"):
        read_prices(tmp_path)
