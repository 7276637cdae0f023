"""Copies without a handle, handles without a model, caches beyond their ends, and adapters for each row."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import adaskip
from adaskip.errors import BackboneError, DataError
from adaskip.plan import SkipPlan
from tests.routed_toys import answers, batch, llama, routed, spread


def test_a_copied_backbone_can_be_freed() -> None:
    """Somebody copies the backbone to attach anew; catches advice to use a handle that the copy does not have."""
    model = routed()
    expected = answers(model)
    for one in (copy.deepcopy(model.backbone), copy.deepcopy(model).backbone):
        assert torch.equal(answers(one), expected)
        with pytest.raises(BackboneError, match=r"already carries adaskip; .* adaskip\.detach\(model\)"):
            adaskip.attach(one)
        assert adaskip.detach(one) is one
        assert torch.equal(answers(one), answers(llama()))
        assert not any("forward" in module.__dict__ for module in one.modules())
        assert torch.equal(answers(spread(adaskip.attach(one))), expected)
    assert torch.equal(answers(model), expected)


def test_detaching_takes_whatever_carries_adaskip() -> None:
    """Somebody detaches by the model they attached to; catches a handle that goes on as if nothing had happened."""
    base = llama()
    trainable = {name for name, weight in base.named_parameters() if weight.requires_grad}
    model = spread(adaskip.attach(base))
    assert adaskip.detach(base) is base
    assert {name for name, weight in base.named_parameters() if weight.requires_grad} == trainable
    with pytest.raises(BackboneError, match="this RoutedModel was detached"):
        model(**batch())
    handle = adaskip.attach(base)
    assert adaskip.detach(handle) is base
    for nothing in (base, torch.nn.Linear(2, 2), handle):
        with pytest.raises(BackboneError, match="carries no adaskip, so nothing can be taken off"):
            adaskip.detach(nothing)


def test_a_detached_handle_says_so_everywhere() -> None:
    """A handle is used after detach(); catches an error about the places of layers."""
    model = routed()
    model.detach()
    for call in (lambda: adaskip.cut(model, [True, True, False, True]), lambda: model.generate_many([batch(9)])):
        with pytest.raises(BackboneError, match="this RoutedModel was detached and routes nothing any more"):
            call()


def test_a_cache_is_cropped_to_nothing_at_most() -> None:
    """Somebody removes more tokens than there are; catches a cache of negative length."""
    model = routed()
    cache = model(**batch(9), use_cache=True).past_key_values
    cache.crop(-50)
    assert cache.get_seq_length() == 0
    assert cache.nbytes() == 0
    short = model(**batch(9), use_cache=True).past_key_values
    short.crop(-1)
    assert short.get_seq_length() == 8


def test_a_cache_is_read_layer_by_layer() -> None:
    """Somebody looks at the keys as of a DynamicCache; catches a TypeError, and keys of some rows taken for all."""
    base = llama()
    plain = list(base(**batch(9), use_cache=True).past_key_values)
    model = spread(adaskip.attach(base))
    model.set_threshold(-1e9)
    for one, other in zip(model(**batch(9), use_cache=True).past_key_values, plain, strict=True):
        assert torch.allclose(one[0], other[0])
        assert torch.allclose(one[1], other[1])
    model = adaskip.attach(model.detach(), SkipPlan.static([2]))
    with pytest.raises(DataError, match="SkipCache: layer 2 does not hold every row and position"):
        list(model(**batch(9), use_cache=True).past_key_values)


def test_an_adapter_for_each_row_is_refused() -> None:
    """Somebody serves several adapters in one batch; catches rows that get another row's adapter, or blame of PEFT."""
    peft = pytest.importorskip("peft", reason="PEFT is an extra: pip install 'adaskip[peft]'")
    torch.manual_seed(1)

    def config() -> Any:
        return peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")

    wrapped = peft.get_peft_model(llama(), config(), adapter_name="a")
    wrapped.add_adapter("b", config())
    mixed = {**batch(9, 12), "adapter_names": ["a", "b"]}
    expected = wrapped.eval()(**mixed).logits
    model = spread(adaskip.attach(wrapped))
    for _ in range(2):  # before anything has been tried, and after
        with pytest.raises(DataError, match=r"adapter_names: expected one adapter for all rows, .* with set_adapter"):
            wrapped(**mixed)
        with pytest.raises(DataError, match="adapter_names: expected one adapter for all rows"):
            wrapped.generate(**mixed, max_new_tokens=2)
        model(**batch(9, 12))
    with model.dense():
        assert torch.equal(wrapped(**mixed).logits, expected)
    adaskip.attach(model.detach(), SkipPlan.static([1]))  # all rows skip alike, so each keeps its adapter
    assert wrapped(**mixed).logits.shape == expected.shape
