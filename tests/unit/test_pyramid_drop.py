"""PyramidDrop's rule by hand, against the weights that a model returns where the tokens dropped so far are gone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import adaskip
from adaskip.errors import ConfigError
from adaskip.policies.ranking import last_place
from tests import families
from tests.families import LAYERS

LENGTHS = [5, 9, 7]


def model_of(layers: list[int] | None = None, ratio: float = 0.5) -> tuple[families.Toy, adaskip.RoutedModel]:
    toy = families.make("llava", "eager")
    return toy, adaskip.attach(toy.model, adaskip.policies.PyramidDrop(layers, ratio)).eval()


@torch.no_grad()
def expected(model: adaskip.RoutedModel, batch: dict[str, Tensor], stages: list[int], ratio: float) -> Tensor:
    """Return bool (l b t), stage by stage: the weights of the layer before, with the same tokens gone before it."""
    vision = model.read_tokens(batch).vision
    last = last_place(batch["attention_mask"].bool())
    keep = vision.expand(LAYERS, -1, -1).clone()
    for stage in stages:
        weights = model(**batch, routing=keep, output_attentions=True).attentions[stage - 1].mean(1)  # (b q k)
        for row in range(len(vision)):
            places = keep[stage - 1, row].nonzero().flatten()
            count = -int(-ratio * len(places) // 1)
            best = places[weights[row, last[row], places].topk(count).indices]
            keep[stage:, row] = False
            keep[stage:, row, best] = True
    return keep


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("layers", "ratio"), [(None, 0.5), ([1, 3], 0.75), ([2], 0.5)])
def test_it_keeps_what_the_model_attends_to_at_the_end_of_each_stage(
    side: str, layers: list[int] | None, ratio: float
) -> None:
    """Of four patches 2, 1 and 1 stay; catches a rank by the first stage alone, and weights of other rows or tokens."""
    toy, model = model_of(layers, ratio)
    batch = toy.collate(toy.rows(LENGTHS), side)
    stages = layers or [1, 2, 3]
    wanted = expected(model, batch, stages, ratio)
    with torch.no_grad():
        model(**batch)
    vision = model.read_tokens(batch).vision
    assert torch.equal(model.routing.keep & vision, wanted)
    if layers is None:
        assert (model.routing.keep & vision).sum(-1)[:, 0].tolist() == [4, 2, 1, 1]


def test_one_stage_is_fastv() -> None:
    """Catches a share of its own, and another layer that ranks."""
    toy, model = model_of([2], 0.25)
    batch: dict[str, Any] = toy.batch(LENGTHS)
    with torch.no_grad():
        logits = model(**batch).logits
        again = adaskip.attach(model.detach(), adaskip.policies.FastV(2, 0.25)).eval()
        assert torch.equal(again(**batch).logits, logits)


def test_a_token_that_a_held_layer_brings_back_does_not_stay() -> None:
    """Layer 1 runs whole, though half of the tokens had left; catches a rank among all that it attends to."""
    toy, model = model_of()
    batch = toy.batch(LENGTHS)
    model.hold([1])
    with torch.no_grad():
        model(**batch)
    vision = model.read_tokens(batch).vision
    assert (model.routing.keep & vision).sum(-1)[:, 0].tolist() == [4, 4, 1, 1]


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"layers": [0, 2]}, r"layers: expected layers of at least 1, each has one before it, got \[0, 2\]"),
        ({"layers": []}, r"layers: expected layers of at least 1, each has one before it, got \[\]"),
        ({"layers": "12"}, r"layers: expected layer numbers such as \[1, 3\], got '12'"),
        ({"ratio": 0}, r"ratio: expected a share in \(0, 1\], got 0"),
        ({"target": adaskip.Target(scope="token")}, "target: expected group='vision'; single vision tokens leave"),
        ({"layers": [2, 8, 9]}, "layers: expected 1 to 3, got 8, 9"),
    ],
)
def test_what_it_cannot_be(given: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        adaskip.attach(families.make("llava", "eager").model, adaskip.policies.PyramidDrop(**given))
