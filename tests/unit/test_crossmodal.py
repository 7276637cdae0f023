import math

import pytest
import torch

from adaskip.backbone.attention import AttentionCall
from adaskip.backbone.inspect import Tokens
from adaskip.errors import BackboneError, DataError
from adaskip.plan import SkipPlan
from adaskip.runtime.attach import attach
from adaskip.survey import crossmodal
from adaskip.survey.crossmodal import read_attention, remove_keys
from adaskip.theory.bounds import kl_exact
from adaskip.theory.measures import attention_mass, value_weighted_mass
from tests import families, toys


def routed(name, attention):
    """A toy (tests/toys.py or tests/families.py) under a plan that skips nothing, and a batch with padding."""
    if name in toys.MAKERS:
        toy = toys.make(name, attention)
        return attach(toy.model, SkipPlan(group="vision")), toy.batch([7, 4], "left")
    toy = families.make(name, attention)
    return attach(toy.model, SkipPlan(group="vision")), toy.batch([7, 4])


def text_and_vision(model, batch):
    tokens = model.read_tokens(batch)
    return tokens, tokens.valid & ~tokens.vision, tokens.vision


VISION = ("llava", "qwen2_vl", "gemma3", "paligemma", "qwen3_vl", "cohere2_vision")


@pytest.mark.parametrize(
    ("name", "attention"), [*((name, "sdpa") for name in VISION), ("llava", "eager"), ("gemma3", "eager")]
)
@torch.no_grad()
def test_mass_is_that_of_eager_attention_and_the_logits_stay(name, attention):
    model, batch = routed(name, attention)
    tokens, text, vision = text_and_vision(model, batch)
    with model.dense():
        plain = model(**batch, use_cache=False).logits
        with read_attention(model, tokens) as reading:
            logits = model(**batch, use_cache=False).logits
    assert torch.equal(logits, plain)
    model.backbone.set_attn_implementation("eager")
    with model.dense():
        eager = model(**batch, use_cache=False, output_attentions=True).attentions
    expected = torch.stack([attention_mass(layer, text, vision) for layer in eager], 1)
    torch.testing.assert_close(reading.mass, expected, atol=1e-5, rtol=1e-4)
    assert reading.mass.max() > 0.05
    assert (reading.moved > 0).all()


@torch.no_grad()
def test_chunks_change_nothing(monkeypatch):
    model, batch = routed("qwen2_vl", "sdpa")
    tokens, *_ = text_and_vision(model, batch)
    found = []
    for size in (1, 2**24):
        monkeypatch.setattr(crossmodal, "_CHUNK", size)
        with model.dense(), read_attention(model, tokens) as reading:
            model(**batch, use_cache=False)
        found.append(torch.cat([reading.mass, reading.moved]))
    torch.testing.assert_close(*found)


@torch.no_grad()
def test_value_weighted_mass_is_the_change_of_the_output_when_the_keys_go():
    draw = torch.Generator().manual_seed(0)
    scores, values = torch.randn(2, 3, 5, 7, generator=draw), torch.randn(2, 3, 7, 4, generator=draw)
    queries, keys = torch.rand(2, 5, generator=draw) > 0.4, torch.rand(2, 7, generator=draw) > 0.5
    with_keys = scores.softmax(-1) @ values
    without = scores.masked_fill(keys[:, None, None], -torch.inf).softmax(-1) @ values
    change = (with_keys - without).norm(dim=-1).square().sum(1).sqrt()  # (b q), over heads
    expected = torch.stack([row[mask].mean() for row, mask in zip(change, queries, strict=True)])
    torch.testing.assert_close(value_weighted_mass(scores.softmax(-1), values, queries, keys), expected)
    no_keys, no_queries = torch.zeros(2, 7).bool(), torch.zeros(2, 5).bool()
    assert value_weighted_mass(scores.softmax(-1), values, queries, no_keys).tolist() == [0.0, 0.0]
    assert value_weighted_mass(scores.softmax(-1), values, no_queries, keys).isnan().all()
    all_keys = torch.ones(2, 7).bool()
    whole = value_weighted_mass(scores.softmax(-1), values, torch.ones(2, 5).bool(), all_keys)
    torch.testing.assert_close(whole, with_keys.square().sum((1, 3)).sqrt().mean(1))
    with pytest.raises(DataError, match=r"expected values \(2, 3, 7, e\), query_mask \(2, 5\), key_mask \(2, 7\), got"):
        value_weighted_mass(scores.softmax(-1), values[:, :, :6], queries, keys)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "gemma3"])
@torch.no_grad()
def test_removed_keys_are_removed_at_that_layer_only(name):
    found = []
    for attention in ("sdpa", "eager"):
        model, batch = routed(name, attention)
        tokens, *_ = text_and_vision(model, batch)
        with model.dense():
            dense = model(**batch, use_cache=False).logits
            with remove_keys(model, tokens, 1):
                blinded = model(**batch, use_cache=False).logits
        seen = []
        with model.dense(), model.observe(lambda i, before, after, seen=seen: seen.append((before, after))):
            model(**batch, use_cache=False)
        intact, seen[:] = list(seen), []
        with (
            model.dense(),
            model.observe(lambda i, b, a, seen=seen: seen.append((b, a))),
            remove_keys(model, tokens, 1),
        ):
            model(**batch, use_cache=False)
        assert torch.equal(intact[0][1], seen[0][1])
        vision = tokens.vision
        assert torch.equal(intact[1][1][vision], seen[1][1][vision])
        assert not torch.allclose(intact[1][1][:, -1], seen[1][1][:, -1])
        found.append(kl_exact(dense[:, -1], blinded[:, -1]))
        assert (found[-1] > 1e-6).all()
    torch.testing.assert_close(*found, rtol=1e-2, atol=1e-6)


def call_of(query, key, value, mask, **options):
    return AttentionCall(0, torch.nn.Identity(), lambda *a, **k: None, query, key, value, mask, options)


def test_recomputed_weights_know_caps_sinks_groups_and_masks():
    from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward as capped
    from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward as sunk

    draw = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(2, heads, 6, 8, generator=draw) for heads in (4, 2, 2))
    module = torch.nn.Module()
    module.num_key_value_groups, module.training = 2, False
    module.sinks = torch.randn(4, generator=draw)
    call = call_of(query, key, value, None, scaling=0.3, softcap=2.0)
    mask = call.additive_mask()
    _, expected = capped(module, query, key, value, mask, scaling=0.3, softcap=2.0)
    torch.testing.assert_close(call.weights(torch.tensor([1, 4])), expected[:, :, [1, 4]])
    seen = mask == 0
    _, expected = sunk(module, query, key, value, mask, scaling=0.3)
    boolean = call_of(query, key, value, seen, scaling=0.3, s_aux=module.sinks)
    torch.testing.assert_close(boolean.weights(torch.arange(6)), expected)
    assert (expected.sum(-1) < 0.999).all()


@torch.no_grad()
def test_an_attention_that_is_not_softmax_attention_is_refused_by_name(monkeypatch):
    model, batch = routed("llava", "eager")
    tokens, *_ = text_and_vision(model, batch)
    monkeypatch.setattr(AttentionCall, "weights", lambda self, chosen: torch.full((2, 4, len(chosen), 12), 1 / 12))
    expected = r"decoder layer 0 \(LlamaAttention\): its attention is not the softmax attention .* cannot be read"
    with model.dense(), pytest.raises(BackboneError, match=expected), read_attention(model, tokens):
        model(**batch, use_cache=False)


@torch.no_grad()
def test_text_only_models_and_unseen_layers_are_refused():
    toy = toys.make("llama")
    model = attach(toy.model, SkipPlan())
    with pytest.raises(DataError, match="expected a model with vision tokens, got a text-only one"):
        read_attention(model, Tokens(torch.ones(1, 3).bool(), None)).__enter__()
    model, batch = routed("llava", "sdpa")
    tokens, *_ = text_and_vision(model, batch)
    with pytest.raises(BackboneError, match="got these numbers of calls: 0, 0, 0, 0"), read_attention(model, tokens):
        pass
    assert math.isfinite(model(**batch).logits.sum())
