"""Files of prices: what they name as measured on, and that prices of anything else are refused, not believed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import adaskip
from adaskip.batch import Batch
from adaskip.errors import CheckpointError
from adaskip.plan import SkipPlan
from adaskip.survey.bank import find_bank
from adaskip.survey.price_file import PriceFile, find_origin
from adaskip.survey.token_plan import find_token_plans
from tests import toys, tuning
from tests.batches_by_number import two_kinds

DATA = tuning.DATA[:2]


def relabelled(batches: list[Batch]) -> list[Batch]:
    """The same prompts with the answer of one of them changed."""
    labels = batches[0].labels.clone()
    labels[0, -1] = 11 + (labels[0, -1] == 11).long()
    return [replace(batches[0], labels=labels), *batches[1:]]


def padded(batches: list[Batch]) -> list[Batch]:
    """The same inputs in one more column of padding."""

    def pad(values: torch.Tensor, value: int = 0) -> torch.Tensor:
        return torch.nn.functional.pad(values, (1, 0), value=value)

    return [
        Batch({name: pad(x) for name, x in b.inputs.items()}, pad(b.labels, -100), pad(b.prompt_mask)) for b in batches
    ]


def test_what_prices_depend_on_is_named_and_padding_is_not() -> None:
    """Catches a name that leaves out tokens, labels, order, weights, target or settings, or counts the padding."""
    model = adaskip.attach(toys.make("llama").model, SkipPlan())
    origin = find_origin(model, DATA, entry=1)
    assert find_origin(model, DATA, entry=1) == origin == find_origin(model, padded(DATA), entry=1)
    assert origin["inputs"].startswith("16 inputs ")
    assert "unit=block" in origin["settings"]

    def changes(other: dict[str, str]) -> set[str]:
        return {name for name in origin if origin[name] != other[name]}

    tokens = {**DATA[0].inputs, "input_ids": DATA[0].inputs["input_ids"].clone()}
    tokens["input_ids"][0, -2] += 1
    for batches in (relabelled(DATA), [replace(DATA[0], inputs=tokens), DATA[1]], DATA[::-1], DATA[:1]):
        assert changes(find_origin(model, batches, entry=1)) == {"inputs"}
    assert changes(find_origin(model, DATA, entry=2)) == {"settings"}
    part = adaskip.attach(model.detach(), SkipPlan(unit="mlp"))
    assert changes(find_origin(part, DATA, entry=1)) == {"settings"}
    other = adaskip.attach(toys.make("llama", seed=1).model, SkipPlan())
    assert changes(find_origin(other, DATA, entry=1)) == {"backbone"}


def test_a_file_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    """Catches a file that is believed though it names another origin, or none, as files of old did."""
    path = tmp_path / "prices"
    mine = PriceFile(path, {"inputs": "24 inputs aa", "backbone": "weights bb"})
    assert mine.read("cost") is None
    mine.write({"cost": torch.ones(2)})
    (cost,) = mine.read("cost")
    assert cost.tolist() == [1.0, 1.0]
    told = (
        rf"{path}: its prices were measured on something else \(inputs: expected 24 inputs cc, found 24 inputs aa\); "
        "remove the file to measure them anew"
    )
    with pytest.raises(CheckpointError, match=told):
        PriceFile(path, {"inputs": "24 inputs cc", "backbone": "weights bb"}).read("cost")
    save_file({"cost": torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match=r"inputs: expected 24 inputs aa, found none named; backbone: .* remove"):
        mine.read("cost")
    for content in (b"\0" * 40, b"half"):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"cannot be read .* remove it to measure them anew"):
            mine.read("cost")


def bank(file: Path, others: bool = False, model: int = 0) -> Any:
    chosen = two_kinds(toys.make("llama"))
    batches = (lambda rows: relabelled(chosen(rows))) if others else chosen
    routed = adaskip.attach(toys.make("llama", seed=model).model, SkipPlan())
    return find_bank(routed, batches, 24, keep=0.75, paths=2, groups=0, entry=1, width=2, file=file)


def plans(file: Path, others: bool = False, model: int = 0, **settings: Any) -> Any:
    routed = adaskip.attach(toys.make("llama", seed=model).model, adaskip.RouterConfig(scope="token")).eval()
    options = {"classes": (1, 1), "entry": 1, "band": 3, "width": 2} | settings
    return find_token_plans(routed, relabelled(DATA) if others else DATA, keep=0.9, **options, file=file)


@pytest.mark.parametrize("find", [bank, plans])
@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"others": True}, r"inputs: expected (\d+ inputs) \w+, found \1 \w+"),
        ({"model": 1}, r"backbone: expected weights \w+, found weights \w+"),
    ],
    ids=["data", "weights"],
)
def test_a_search_never_takes_over_prices_of_other_data_or_weights(
    tmp_path: Path, find: Callable[..., Any], change: dict[str, Any], told: str
) -> None:
    """As many inputs, with other answers, or a backbone that was trained on; catches a plan made of their prices."""
    file = tmp_path / "prices"
    find(file)
    find(file)
    with pytest.raises(CheckpointError, match=told):
        find(file, **change)
    file.unlink()
    find(file, **change)
    assert len(load_file(file)) == 2


@pytest.mark.parametrize("change", [{"seed": 7}, {"entry": 2}, {"classes": (2, 1)}], ids=["seed", "entry", "count"])
def test_costs_of_other_classes_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    """A plan's costs are those of its classes; catches ones that were told apart elsewhere or drawn otherwise."""
    file = tmp_path / "prices"
    plans(file)
    with pytest.raises(CheckpointError, match=r"settings: expected scope=token .*, found scope=token "):
        plans(file, **change)
