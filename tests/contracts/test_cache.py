"""Whatever a generation does to its cache: rows repeated, reordered and chosen, tokens taken back, caches refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from adaskip.errors import DataError
from adaskip.runtime.attach import RoutedModel
from tests.families import IMAGE, make
from tests.routing import GREEDY, routed, some_keep

KINDS = [("llama", "all"), ("mistral", "all"), ("gpt2", "all"), ("llava", "all"), ("llava", "vision")]


def both_ways(model: RoutedModel, batch: dict[str, Tensor], **options: Any) -> Tensor:
    """The same answer with and without a cache."""
    torch.manual_seed(0)
    cached = model.generate(**batch, **options)
    torch.manual_seed(0)
    assert torch.equal(cached, model.generate(**batch, **options, use_cache=False))
    return cached


@pytest.mark.parametrize(("name", "group"), KINDS)
def test_several_answers_a_prompt(name: str, group: str) -> None:
    """Each follows its prompt's decision, and is the answer that the prompt would have got alone."""
    toy, model = routed(name, group)
    batch = toy.batch([4, 6])
    keep = some_keep(2)
    sampled = both_ways(
        model, batch, routing=keep, max_new_tokens=4, do_sample=True, num_return_sequences=3, suppress_tokens=[IMAGE]
    )
    assert len(sampled) == 6
    assert torch.equal(model.routing.keep, keep.repeat_interleave(3, 1))
    beams = both_ways(model, batch, routing=keep, max_new_tokens=4, num_beams=3, num_return_sequences=2, **GREEDY)
    assert torch.equal(model.routing.keep, keep.repeat_interleave(3, 1))
    for i, row in enumerate(toy.rows([4, 6])):
        alone = model.generate(
            **toy.collate([row]),
            routing=keep[:, [i]],
            max_new_tokens=4,
            num_beams=3,
            num_return_sequences=2,
            **GREEDY,
        )
        assert torch.equal(alone[:, -4:], beams[2 * i : 2 * i + 2, -4:])


@pytest.mark.parametrize("kind", ["assistant", "lookup"])
@pytest.mark.parametrize(("name", "group"), KINDS)
def test_refused_candidates_leave_no_trace(name: str, group: str, kind: str) -> None:
    """Assisted generation gives the plain answer, and its ledger holds the tokens of that answer."""
    toy, model = routed(name, group)
    batch = toy.batch([7])
    options = {"max_new_tokens": 8, **GREEDY}
    plain = model.generate(**batch, **options)
    wanted = held(model)
    rate = model.routing.keep_rate
    helper = (
        {"assistant_model": make("llama", seed=1).model} if kind == "assistant" else {"prompt_lookup_num_tokens": 3}
    )
    assert torch.equal(model.generate(**batch, **options, **helper), plain)
    assert held(model) == wanted
    assert (model.routing.keep_rate - rate).abs() <= 0.02  # a chunk of candidates is priced as one block


def held(model: RoutedModel) -> int:
    """Tokens that the ledger holds."""
    ledger = model.runtime.ledger
    return sum(int(text.sum() + vision.sum()) for text, vision in ledger.chunks) + ledger.decoded


@pytest.mark.parametrize(("name", "group"), KINDS)
@torch.no_grad()
def test_cropping_is_as_if_the_tokens_had_never_come(name: str, group: str) -> None:
    toy, model = routed(name, group)
    batch = toy.batch([5, 8])
    batch.pop("position_ids", None)
    keep = some_keep(2)
    more = torch.randint(16, 90, (2, 3))

    def follow(cache: Any, ids: Tensor) -> Tensor:
        mask = torch.cat([batch["attention_mask"], torch.ones(2, cache.length - width + ids.shape[1]).long()], 1)
        places = (mask.cumsum(1) - 1)[:, -ids.shape[1] :]
        return model(input_ids=ids, attention_mask=mask, position_ids=places, past_key_values=cache).logits

    width = batch["input_ids"].shape[1]
    cache = model(**batch, routing=keep, use_cache=True).past_key_values
    before, priced = cache.nbytes(), model.routing.executed
    follow(cache, more)
    once = model.routing.executed
    logits = follow(cache, more[:, :1])
    cache.crop(-4)
    assert cache.length == width
    assert cache.nbytes() == before
    follow(cache, more)
    assert torch.equal(model.routing.executed, once)
    assert (once > priced).all()
    assert (follow(cache, more[:, :1]) - logits).abs().max() <= 1e-5
    cache.crop(-cache.length)
    assert cache.nbytes() == 0
    assert torch.equal(cache.routing.keep, keep)


@torch.no_grad()
def test_cropping_layers_without_gaps_copies_nothing() -> None:
    """As `DynamicCache.crop`: what is left is a view of what was there."""
    toy, model = routed("llama", "all")
    cache = model(**toy.batch([8, 8]), routing=some_keep(2), use_cache=True).past_key_values
    held = [layer for layer in cache.layers if layer.filled]
    before = [(layer.keys, layer.values) for layer in held]
    cache.crop(-3)
    for layer, (keys, values) in zip(held, before, strict=True):
        for now, then in ((layer.keys, keys), (layer.values, values)):
            assert now.data_ptr() == then.data_ptr()
            assert torch.equal(now, then[:, :, :5])


@torch.no_grad()
def test_rows_chosen_from_a_cache_are_those_rows() -> None:
    toy, model = routed("llama", "all")
    batch = toy.batch([8, 8, 8])
    keep = some_keep(3)
    nexts = torch.tensor([[20], [30], [40]])
    cache = model(**batch, routing=keep, use_cache=True).past_key_values
    whole = model(input_ids=nexts, past_key_values=cache).logits
    rates = model.routing.keep_rate
    cache.crop(-1)
    chosen = torch.tensor([2, 0])
    cache.batch_select_indices(chosen)
    assert (model(input_ids=nexts[chosen], past_key_values=cache).logits - whole[chosen]).abs().max() <= 1e-5
    assert torch.allclose(model.routing.keep_rate, rates[chosen])


def test_caches_that_cannot_hold_gaps_are_refused() -> None:
    toy, model = routed("llama", "all")
    batch = toy.batch([5])
    config = model.backbone.config
    caches = {
        "a StaticCache": StaticCache(config=config, max_cache_len=16),
        "an offloaded DynamicCache": DynamicCache(offloading=True),
    }
    for kind, cache in caches.items():
        with pytest.raises(DataError, match=f"past_key_values: {kind} cannot hold skipped layers; leave it out"):
            model(**batch, past_key_values=cache)
        with pytest.raises(DataError, match=f"past_key_values: {kind} cannot hold skipped layers; leave it out"):
            model.generate(**batch, past_key_values=cache, max_new_tokens=2)
    with torch.no_grad(), model.dense():
        used = model.backbone(**batch, use_cache=True).past_key_values
    with pytest.raises(DataError, match="got a DynamicCache holding 5 tokens; start from the prompt without a cache"):
        model(**batch, past_key_values=used)
    with torch.no_grad():
        gaps = model(**batch, use_cache=True).past_key_values
    with model.dense(), pytest.raises(DataError, match="got one that a routed request left gaps in"):
        model.backbone(**batch, past_key_values=gaps)
