"""Numbers, lists and tensors where something else belongs: read where there is no doubt, refused otherwise."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

import adaskip
from adaskip.errors import ConfigError, DataError
from adaskip.plan import SkipPlan
from adaskip.policies.learned.config import RouterConfig
from tests.routed_toys import answers, batch, llama, routed
from tests.tuning import DATA

PASSES = pytest.mark.parametrize("value", [torch.tensor(0.5), numpy.float32(0.5), numpy.array(0.5), 0.5])


@PASSES
def test_thresholds_of_other_libraries(value: Any, tmp_path: Path) -> None:
    """Somebody computes the threshold in torch or numpy; catches a tensor that no file can hold."""
    model = routed()
    model.set_threshold(value)
    assert type(model.policy.threshold) is float
    model.save_pretrained(tmp_path)
    assert adaskip.RoutedModel.from_pretrained(tmp_path, llama()).policy.threshold == 0.5


@pytest.mark.parametrize("value", [float("nan"), "0.5", None, True, [0.5], torch.ones(4), 1 + 1j])
def test_thresholds_that_are_no_number(value: Any) -> None:
    """A broken sum or a text arrives as the threshold; catches layers skipped in silence, and a TypeError later."""
    model = routed()
    before = model.policy.threshold, answers(model)
    with pytest.raises(ConfigError, match="threshold: expected a finite number, got"):
        model.set_threshold(value)
    assert model.policy.threshold == before[0]
    assert torch.equal(answers(model), before[1])


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"hidden": 3.5}, "hidden: expected an integer, got 3.5"),
        ({"hidden": "64"}, "hidden: expected an integer, got '64'"),
        ({"hidden": True}, "hidden: expected an integer, got True"),
        ({"hidden": -1}, "hidden: expected an integer >= 0, got -1"),
        ({"keep_bias": "2"}, "keep_bias: expected a finite number, got '2'"),
        ({"held": "ab"}, r"held: expected layer numbers such as \[1, 3\], got 'ab'"),
        ({"held": 3}, r"held: expected layer numbers such as \[1, 3\], got 3"),
        ({"held": [1, 2.5]}, r"held: expected layer numbers .*expected an integer, got 2.5"),
        ({"held": [True, False]}, r"held: expected layer numbers .*expected an integer, got True"),
        ({"scope": ["prompt"]}, "scope: expected prompt . token, got"),
        ({"hidden": "64", "threshold": None}, "hidden: .*; threshold: "),
    ],
)
def test_fields_of_a_configuration(fields: dict[str, Any], text: str) -> None:
    """A value of the wrong kind is configured; catches errors from within torch once a model is attached to."""
    with pytest.raises(ConfigError, match=text):
        RouterConfig(**fields)


@pytest.mark.parametrize("skip", [[1, 2], (2, 1), {1, 2}, range(1, 3), torch.tensor([1, 2]), numpy.array([1, 2, 2])])
def test_layers_of_any_list(skip: Any) -> None:
    """Somebody's layers come out of torch or numpy; catches an index that means something else."""
    plan = SkipPlan.static(skip)
    assert plan == SkipPlan(skip=(1, 2)) == SkipPlan(skip=skip)
    assert all(type(layer) is int for layer in plan.skip)
    assert RouterConfig(held=skip).held == (1, 2)
    assert SkipPlan.late_entry(numpy.int64(2)).keep(4).tolist() == [False, False, True, True]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: SkipPlan.static(3), r"SkipPlan: skip: expected layer numbers such as \[1, 3\], got 3"),
        (lambda: SkipPlan.static("12"), r"skip: expected layer numbers such as \[1, 3\], got '12'"),
        (lambda: SkipPlan.static(torch.tensor([True, False])), "skip: .*expected an integer, got True"),
        (lambda: SkipPlan.static(torch.tensor([1.0])), "skip: .*expected an integer, got 1.0"),
        (lambda: SkipPlan.early_exit(2.5), "leave: expected an integer, got 2.5"),
        (lambda: SkipPlan.late_entry(None), "enter: expected an integer, got None"),
    ],
)
def test_layers_that_are_none(make: Any, text: str) -> None:
    """Somebody passes one number, a text or a mask of layers; catches a TypeError, and layers that nobody meant."""
    with pytest.raises(ConfigError, match=text):
        make()


def test_a_refused_hold_changes_nothing(tmp_path: Path) -> None:
    """A layer that is not there is held; catches it in the configuration, and routers that cannot be loaded again."""
    model = routed()
    for layers in ([9], "ab", 3):
        with pytest.raises(ConfigError, match="held: expected"):
            model.hold(layers)
    assert model.policy.held == ()
    model.save_pretrained(tmp_path)
    adaskip.RoutedModel.from_pretrained(tmp_path, llama()).hold(torch.tensor([1, 3]))
    model.hold(layer for layer in (1, 3))
    assert model.policy.held == (1, 3)


def test_facts_of_other_libraries(tmp_path: Path) -> None:
    """Figures are tensors when the routers are saved; catches a TypeError after training."""
    model = routed()
    model.facts = {"keep": torch.tensor(0.5), "risk": numpy.float32(0.25), "layers": torch.tensor([1, 2]), "of": None}
    model.save_pretrained(tmp_path)
    assert adaskip.RoutedModel.from_pretrained(tmp_path, llama()).facts == {
        "keep": 0.5,
        "risk": 0.25,
        "layers": [1, 2],
        "of": None,
    }
    assert "- keep: 0.5" in (tmp_path / "README.md").read_text()
    for facts, kind in [({"plan": SkipPlan()}, "SkipPlan"), ([1], "list"), ({"a": {1}}, "set")]:
        model.facts = facts  # type: ignore[assignment]
        with pytest.raises(ConfigError, match=f"save_pretrained: model.facts: expected .* got a {kind}.*; convert it"):
            model.save_pretrained(tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize(
    ("batches", "text"),
    [
        ({"inputs": 1, "labels": 2, "prompt_mask": 3}, "expected a loader or a list of batches, got a dict; put it"),
        ([{"inputs": {}, "prompt_mask": 1}], r"got a dict of inputs, prompt_mask; .*return adaskip.Batch\(inputs, lab"),
        ([batch(9)], r"as adaskip.Collator\(processor\) makes them, got .*; pass collate_fn=adaskip.Collator"),
        (DATA[0], "expected a loader or a list of batches, got a Batch; put it into a list"),
        ([replace(DATA[0], labels=DATA[0].labels * 0 - 100)], "expected prompts with answers, got bare prompts"),
        (["text"], "expected batches as adaskip.Collator.*, got a str"),
        ("text", "expected a loader or a list of batches, got a str"),
        (3, "expected a loader or a list of batches, got a int"),
    ],
)
def test_profile_of_what_holds_no_answers(batches: Any, text: str) -> None:
    """Somebody profiles prompts without answers, or one batch; catches KeyError and TypeError."""
    with pytest.raises(DataError, match=f"profile: .*{text}"):
        adaskip.profile(llama(), batches)


def test_values_read_back_from_a_file(tmp_path: Path) -> None:
    """A configuration is written and read; catches numbers that change on the way."""
    config = RouterConfig(threshold=numpy.float64(0.1), held=numpy.array([2]), hidden=numpy.int64(8))
    assert RouterConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
