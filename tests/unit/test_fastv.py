"""FastV's rule by hand, against the weights that an eager model returns itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import adaskip
from adaskip.errors import ConfigError
from adaskip.policies.ranking import last_place, strongest
from tests import families

LENGTHS = [5, 9, 7]


def test_the_strongest_share_by_hand() -> None:
    """Catches a share that is rounded down, tokens that do not count, and ties broken from the end."""
    scores = torch.tensor([[0.9, 0.1, 0.4, 0.3, 0.2], [0.5, 0.5, 0.5, 0.5, 0.5]])
    among = torch.tensor([[False, True, True, True, False], [True, True, False, True, True]])
    assert strongest(scores, among, 0.5).tolist() == [
        [False, False, True, True, False],
        [True, True, False, False, False],
    ]
    assert strongest(scores, among, 1.0).equal(among)
    assert strongest(scores, torch.zeros_like(among), 0.5).sum() == 0
    assert strongest(torch.rand(1, 10), torch.ones(1, 10).bool(), 0.3).sum() == 3  # .3 * 10 is 3 and a last bit


def test_the_last_prompt_token_on_either_side_of_padding() -> None:
    assert last_place(torch.tensor([[False, True, True], [True, True, False], [True, False, False]])).tolist() == [
        2,
        1,
        0,
    ]


@pytest.mark.parametrize("side", ["left", "right"])
def test_it_keeps_what_the_dense_model_attends_to(side: str) -> None:
    """The weights are those that the dense model returns of layer 1; catches another layer, head, query or token."""
    toy = families.make("llava", "eager")
    batch = toy.collate(toy.rows(LENGTHS), side)
    with torch.no_grad():
        attentions = toy.model(**batch, output_attentions=True).attentions[1].mean(1)  # (b q k)
    model = adaskip.attach(toy.model, adaskip.policies.FastV(layer=2, share=0.5)).eval()
    with torch.no_grad():
        model(**batch)
    vision = model.read_tokens(batch).vision
    last = last_place(batch["attention_mask"].bool())
    for row in range(len(LENGTHS)):
        places = vision[row].nonzero().flatten()
        best = places[attentions[row, last[row], places].topk(-(-len(places) // 2)).indices]
        expected = torch.zeros_like(vision[row])
        expected[best] = True
        keep = model.routing.keep[:, row] & vision[row]
        assert torch.equal(keep[1], vision[row])
        assert all(torch.equal(keep[layer], expected) for layer in range(2, len(keep)))


def test_generated_tokens_run_every_layer_and_see_what_stayed() -> None:
    """Cached decoding equals passes over the whole text; catches a decision that is taken anew for each token."""
    toy = families.make("llava", "eager")
    batch: dict[str, Any] = toy.collate(toy.rows(LENGTHS))
    model = adaskip.attach(toy.model, adaskip.policies.FastV(layer=1, share=0.25)).eval()
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(**batch, **options), model.generate(**batch, **options, use_cache=False))
    assert model.routing.keep_rate.max() < 1


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"layer": 0}, "layer: expected a layer of at least 1, which has one before it, got 0"),
        ({"share": 1.5}, r"share: expected a share in \(0, 1\], got 1.5"),
        ({"target": adaskip.Target(group="vision")}, "target: expected scope='token'; single vision tokens leave"),
        ({"target": adaskip.Target(scope="token", group="vision", kv="kept")}, "target: expected kv='absent'"),
        ({"layer": 99}, "layer: expected 1 to 3, got 99"),
    ],
)
def test_what_it_cannot_be(given: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        adaskip.attach(families.make("llava", "eager").model, adaskip.policies.FastV(**given))
