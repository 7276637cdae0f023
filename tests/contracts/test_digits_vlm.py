"""The runtime's contract on the trained demo model and real questions."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from adaskip.demo.backbone import load
from adaskip.demo.digits import examples
from adaskip.policies.learned.config import RouterConfig
from adaskip.runtime.attach import RoutedModel, attach
from adaskip.training.data import Collator


@pytest.fixture(scope="module")
def base() -> tuple[Any, Any]:
    return load()


@pytest.fixture(params=["all", "vision"])
def model(base: tuple[Any, Any], request: pytest.FixtureRequest) -> RoutedModel:
    """Routers that decide differently for different questions."""
    routed = attach(base[0], RouterConfig(group=request.param))
    torch.manual_seed(2)
    for head in routed.routers:
        torch.nn.init.normal_(head.outer.weight, std=2.0)
        torch.nn.init.normal_(head.outer.bias, mean=0.7, std=0.3)
    yield routed
    routed.detach()


@pytest.fixture(scope="module")
def batch(base: tuple[Any, Any]) -> dict[str, Any]:
    return Collator(base[1])(examples("test", 3, seed=5))


@pytest.fixture(scope="module")
def questions(base: tuple[Any, Any]) -> dict[str, Any]:
    return Collator(base[1], answers=False)(examples("test", 3, seed=5)).inputs


def test_training_equals_skipping(model: RoutedModel, batch: dict[str, Any]) -> None:
    arguments = batch.arguments()
    skipped = model(**arguments).logits
    keep = model.routing.keep
    assert len({tuple(row) for row in keep.T.tolist()}) > 3, "routes should differ between questions"
    with model.soft():
        soft = model(**arguments).logits
    assert torch.equal(model.routing.keep, keep)
    assert (soft - skipped)[batch.inputs["attention_mask"].bool()].abs().max() <= 1e-5


def test_cached_equals_uncached(model: RoutedModel, questions: dict[str, Any]) -> None:
    options = {"max_new_tokens": 6, "do_sample": False}
    cached = model.generate(**questions, **options)
    keep = model.routing.keep
    assert torch.equal(cached, model.generate(**questions, **options, use_cache=False))
    assert torch.equal(model.routing.keep, keep)
    with model.dense():
        assert not torch.equal(model.generate(**questions, **options), cached)


def test_rows_do_not_see_one_another(model: RoutedModel, base: tuple[Any, Any], questions: dict[str, Any]) -> None:
    together = model(**questions).logits[:, -1]
    routing = model.routing
    assert (questions["attention_mask"] == 0).any()
    for i, record in enumerate(examples("test", 3, seed=5)):
        alone = Collator(base[1], answers=False)([record]).inputs
        logits = model(**alone).logits[0, -1]
        assert torch.equal(model.routing.keep[:, 0], routing.keep[:, i])
        assert torch.allclose(model.routing.keep_rate, routing.keep_rate[i])
        assert (logits - together[i]).abs().max() <= 1e-4
    flipped = base[1](
        text=[r["prompt"] for r in examples("test", 3, seed=5)],
        images=[[r["image"]] for r in examples("test", 3, seed=5)],
        padding=True,
        padding_side="right",
        return_tensors="pt",
    )
    last = flipped["attention_mask"].sum(1) - 1
    logits = model(**flipped).logits[torch.arange(len(last)), last]
    assert torch.equal(model.routing.keep, routing.keep)
    assert (logits - together).abs().max() <= 1e-4
