"""Inputs at the edge: right, or a plain error."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from adaskip.errors import BackboneError, ConfigError, DataError
from adaskip.plan import SkipPlan
from adaskip.policies.learned.config import RouterConfig
from adaskip.runtime.attach import attach
from tests.families import IMAGE, LAYERS, Toy, make
from tests.routing import decide, real, routed, same_both_ways, some_keep

TYPES = ["llama", "qwen2", "llava", "qwen2_vl"]
VISUAL = ["llava", "qwen2_vl", "internvl", "gemma3"]


@pytest.mark.parametrize("name", TYPES)
def test_an_empty_plan_is_the_dense_model(name: str) -> None:
    toy = make(name)
    batch = toy.batch([5, 8])
    model = attach(toy.model, SkipPlan())
    logits = same_both_ways(model, batch)
    with torch.no_grad(), model.dense():
        assert torch.equal(model.backbone(**batch).logits, logits)
    assert (model.routing.keep_rate == 1).all()


@pytest.mark.parametrize("name", TYPES)
def test_a_row_that_skips_everything(name: str) -> None:
    """Its answer is what head and embeddings give; the rows beside it do not notice; all rows may do so at once."""
    toy, model = routed(name, "all")
    batch = toy.batch([5, 8, 6])
    keep = torch.ones(LAYERS, 3, dtype=torch.bool)
    whole = same_both_ways(model, batch, routing=keep)
    keep[:, 1] = False
    logits = same_both_ways(model, batch, routing=keep)
    assert model.routing.keep_rate.tolist() == [1, 0, 1]
    assert (logits - whole)[[0, 2]].abs().max() <= 1e-5
    nobody = same_both_ways(model, batch, routing=torch.zeros(LAYERS, 3, dtype=torch.bool))
    assert (nobody - logits)[1].abs().max() <= 1e-5
    assert model.routing.keep_rate.tolist() == [0, 0, 0]


@pytest.mark.parametrize("name", ["llama", "qwen2", "bloom", "gpt2"])
def test_prompts_of_one_token(name: str) -> None:
    toy, model = routed(name, "all", "eager")
    for lengths in ([1], [1, 1, 1], [1, 6]):
        batch = toy.batch(lengths)
        same_both_ways(model, batch)
        same_both_ways(model, batch, routing=some_keep(len(lengths)))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "llava"])
def test_a_prompt_of_padding_only(name: str, attention: str) -> None:
    """Its routers see nothing, so its decision is theirs about nothing; the other rows stay as they were."""
    toy, model = routed(name, "all", attention)
    batch = toy.batch([6, 7])
    blank = {
        key: torch.cat([value, torch.zeros_like(value[:1])]) if value.shape[0] == 2 and key != "pixel_values" else value
        for key, value in batch.items()
    }
    with torch.no_grad():
        alone, together = model(**batch).logits, model(**blank).logits
    assert together[:2].isfinite().all()
    assert (real(together[:2], batch) - real(alone, batch)).abs().max() <= 1e-4
    assert model.routing.keep.shape == (LAYERS, 3)
    assert model.routing.logits.isfinite().all()
    assert model.routing.keep_rate.isfinite().all()
    assert model.routing.keep_rate[2] == 1


def pictures(toy: Toy, counts: list[int]) -> dict[str, Tensor]:
    """One row per count, with that many pictures one after the other."""
    assert toy.pictures is not None
    draw = torch.Generator().manual_seed(0)
    ids, shown = [], []
    for count in counts:
        opening = torch.tensor([*toy.pictures.opening, *[IMAGE] * toy.pictures.slots]).repeat(count)
        ids.append({"input_ids": torch.cat([opening, torch.randint(16, 80, (5 + count,), generator=draw)])})
        shown += [toy.pictures.inputs(draw) for _ in range(count)]
    batch = toy.collate(ids)
    return batch | {key: torch.cat([one[key] for one in shown]) for key in shown[0]}


@pytest.mark.parametrize("group", ["all", "vision"])
@pytest.mark.parametrize("name", VISUAL)
def test_two_pictures_in_a_row_and_rows_without(name: str, group: str) -> None:
    toy, model = routed(name, group)
    for counts in ([2, 1], [1, 0, 2], [0, 1]):
        batch = pictures(toy, counts)
        same_both_ways(model, batch)
        same_both_ways(model, batch, routing=some_keep(len(counts)))
        if group == "vision":
            blind = [i for i, count in enumerate(counts) if count == 0]
            assert (model.routing.keep_rate[blind] == 1).all()


@pytest.mark.parametrize("name", ["mistral", "gemma3_text", "cohere2", "gpt_oss", "llama4_text"])
def test_prompts_longer_than_the_sliding_window(name: str) -> None:
    toy = make(name)
    model = decide(attach(toy.model, RouterConfig()))
    batch = toy.batch([21, 13, 30])
    with torch.no_grad():
        whole = model(**batch, routing=torch.ones(LAYERS, 3, dtype=torch.bool)).logits
        with model.dense():
            assert (real(model.backbone(**batch).logits, batch) - real(whole, batch)).abs().max() <= 1e-5
    same_both_ways(model, batch)
    same_both_ways(model, batch, routing=some_keep(3))


def test_embeddings_instead_of_ids() -> None:
    toy, model = routed("llama", "all")
    batch = toy.batch([5, 8])
    with torch.no_grad():
        logits = model(**batch).logits
        keep = model.routing.keep
        embeds = model.backbone.get_input_embeddings()(batch.pop("input_ids"))
        assert torch.equal(model(**batch, inputs_embeds=embeds).logits, logits)
    assert torch.equal(model.routing.keep, keep)


@pytest.mark.parametrize("kind", ["static", "offloaded_static", "quantized", "offloaded"])
def test_caches_that_cannot_hold_gaps_are_refused_by_name(kind: str) -> None:
    toy, model = routed("llama", "all")
    with pytest.raises(ConfigError, match=f"cache_implementation='{kind}' cannot hold skipped layers; leave it out"):
        model.generate(**toy.batch([5]), max_new_tokens=2, cache_implementation=kind)


def test_a_later_chunk_of_pictures_only() -> None:
    """Rows that leave a layer store nothing of it; the slots of the others stay theirs."""
    toy, model = routed("llava", "vision")
    batch = toy.batch([5, 8])
    keep = torch.tensor([[True, False], [False, True], [True, True], [False, False]])
    with torch.no_grad():
        cache = model(**batch, routing=keep, use_cache=True).past_key_values
        before = [layer.nbytes() for layer in cache.layers]
        mask = torch.cat([batch["attention_mask"], torch.ones(2, 1).long()], 1)
        ids = torch.full((2, 1), IMAGE)
        more = {"input_ids": ids, "attention_mask": mask, "past_key_values": cache, "use_cache": True}
        logits = model.backbone(**more).logits
    assert logits.isfinite().all()
    grown = [(layer.nbytes() - size) // (2 * 2 * 8 * 4) for layer, size in zip(cache.layers, before, strict=True)]
    assert grown == [1, 1, 2, 0]


@torch.no_grad()
def test_a_first_chunk_of_pictures_alone() -> None:
    """A row whose vision tokens skip has nothing to run in that chunk; its later text sees none of them."""
    toy = make("llava")
    model = attach(toy.model, RouterConfig(group="vision"))
    rows = toy.batch([5, 5])
    ids = rows["input_ids"][:, int((rows["input_ids"][0] == IMAGE).nonzero().min()) :]
    mask, pictures = torch.ones_like(ids), {"pixel_values": rows["pixel_values"]}
    cut = int((ids[0] == IMAGE).sum())
    assert (ids[:, :cut] == IMAGE).all()
    keep = some_keep(2)
    keep[1] = torch.tensor([True, False])
    whole = model(input_ids=ids, attention_mask=mask, routing=keep, **pictures).logits
    cache = model(input_ids=ids[:, :cut], routing=keep, use_cache=True, **pictures).past_key_values
    later = model(input_ids=ids[:, cut:], attention_mask=mask, past_key_values=cache, use_cache=True).logits
    assert (later - whole[:, cut:]).abs().max() <= 1e-4


def test_a_picture_that_opens_the_prompt_and_keeps_its_keys() -> None:
    """The text's queries are the last positions but not all: SDPA without a mask would align them with the first."""
    toy = make("llava", "sdpa")
    assert toy.pictures is not None
    toy.pictures = replace(toy.pictures, opening=())
    model = attach(toy.model, SkipPlan.early_exit(1, "vision", kv="kept"))
    batch = toy.batch([6, 6])
    logits = same_both_ways(model, batch)
    assert batch["attention_mask"].all()
    eager = make("llava", "eager")
    with torch.no_grad():
        told = attach(eager.model, SkipPlan.early_exit(1, "vision", kv="kept"))(**batch).logits
    assert (logits - told).abs().max() <= 1e-4


def test_last_tokens_that_run_while_the_first_only_keep_their_keys() -> None:
    toy = make("llama", "sdpa")
    model = attach(toy.model, RouterConfig(scope="token", kv="kept"))
    keep = torch.ones(LAYERS, 1, 6, dtype=torch.bool)
    keep[:, :, :3] = False
    same_both_ways(model, toy.batch([6]), routing=keep)


def test_a_bias_of_as_many_heads_as_rows_is_not_cut_by_rows() -> None:
    toy, model = routed("mpt", "all", "eager")
    batch = toy.batch([5, 5, 5, 5])
    assert model.spec.config.n_heads == 4
    together = same_both_ways(model, batch, routing=some_keep(4))
    one = same_both_ways(model, {name: value[1:2] for name, value in batch.items()}, routing=some_keep(4)[:, 1:2])
    assert (together[1] - one[0]).abs().max() <= 1e-4


# -- what a caller may get wrong --------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_cache_that_was_replaced_cannot_be_gone_on_with() -> None:
    """Transformers fills a cache in place; a routed model has to take another, and the first would stay empty."""
    toy, model = routed("llama", "all")
    batch, cache = toy.batch([6]), DynamicCache()
    out = model(**batch, past_key_values=cache)
    with pytest.raises(DataError, match=r"go on with the cache in the model's output \(outputs.past_key_values\)"):
        model(input_ids=torch.tensor([[20]]), past_key_values=cache)
    model(input_ids=torch.tensor([[20]]), past_key_values=out.past_key_values)
    with model.dense():
        model.backbone(**batch, past_key_values=cache)
        assert cache.get_seq_length() == 6


def test_nothing_of_a_request_is_left_for_the_next() -> None:
    """With gradients on as well: the inner model, called alone, does not follow another batch's decisions."""
    toy, model = routed("llama", "all")
    batch = toy.batch([6, 4])
    model(**batch)
    with pytest.raises(BackboneError):
        model.backbone.model(**batch)


@pytest.mark.parametrize("kv", ["absent", "kept"])
@torch.no_grad()
def test_a_pass_that_failed_leaves_no_trace_in_the_cache(kv: Any) -> None:
    toy = make("llava")
    model = attach(toy.model, RouterConfig(group="vision", kv=kv))
    batch, token = toy.batch([6, 6]), torch.full((2, 1), 20)
    cache = model(**batch, routing=some_keep(2), use_cache=True).past_key_values
    held = cache.nbytes()
    wanted = model(input_ids=token, past_key_values=cache).logits
    cache.crop(-1)
    handle = model.spec.layers[3].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(input_ids=token, past_key_values=cache)
    handle.remove()
    assert cache.nbytes() == held
    assert torch.allclose(model(input_ids=token, past_key_values=cache).logits, wanted, atol=1e-5)
    fresh = DynamicCache()
    handle = model.spec.layers[3].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(**batch, past_key_values=fresh)
    handle.remove()


@torch.no_grad()
def test_another_number_of_rows_than_the_cache_holds() -> None:
    toy, model = routed("llama", "all")
    cache = model(**toy.batch([6, 6]), routing=some_keep(2), use_cache=True).past_key_values
    with pytest.raises(DataError, match="expected as many rows as the cache holds, 2, got 4"):
        model(input_ids=torch.full((4, 1), 20), past_key_values=cache)


def test_words_and_types_that_mean_nothing() -> None:
    for wrong in ({"group": "al"}, {"unit": "Block"}, {"kv": "keep"}):
        with pytest.raises(ConfigError, match=f"SkipPlan: {next(iter(wrong))}: expected .* did you mean"):
            SkipPlan.static([1], **wrong)
    toy, model = routed("llama", "all")
    with pytest.raises(ConfigError, match=r"expected keep of torch.bool, got torch.int64"):
        model(**toy.batch([6]), routing=torch.ones(LAYERS, 1, dtype=torch.long))


@pytest.mark.parametrize("unit", ["block", "attention", "mlp"])
def test_autocast_and_another_precision(unit: Any) -> None:
    """The routers stay in float32 and decide the same; states follow the backbone's precision."""
    toy = make("llama")
    model = attach(toy.model, RouterConfig(unit=unit, features="mean"))  # whose heads read one state
    for head in model.routers:
        torch.nn.init.normal_(head.outer.weight)
    batch, keep = toy.batch([6, 4]), some_keep(2)
    with torch.no_grad():
        wanted = model(**batch, routing=keep).logits
        decided = [head(torch.ones(1, head.norm.weight.numel())[:, None]) for head in model.routers]
    for training in (True, False):
        with torch.autocast("cpu", torch.bfloat16):
            found = model.train(training)(**batch, routing=keep).logits
            again = [head(torch.ones(1, head.norm.weight.numel())[:, None]) for head in model.routers]
        assert (real(found.float(), batch) - real(wanted, batch)).abs().max() < 0.1 * wanted.abs().max()
        assert torch.equal(torch.cat(again), torch.cat(decided))
    model.eval().to(torch.bfloat16)
    with torch.no_grad():
        assert model(**batch).logits.dtype == torch.bfloat16
    assert {weight.dtype for weight in model.routers.parameters()} == {torch.float32}


def test_an_old_name_of_the_usual_cache() -> None:
    toy, model = routed("llama", "all")
    model.backbone.generation_config.cache_implementation = "hybrid"
    assert model.generate(**toy.batch([6]), max_new_tokens=2).shape == (1, 8)
