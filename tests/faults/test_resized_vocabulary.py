"""A model that is changed while routers are attached: its vocabulary, its placeholder's id, its attention kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from adaskip import RouterConfig, SkipPlan, attach
from adaskip.errors import ConfigError, DataError
from tests import families
from tests.families import make
from tests.routing import decide


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gpt2", "llava"])
def test_the_head_is_counted_anew(name: str) -> None:
    """`resize_token_embeddings` after attach: would catch head FLOPs of the vocabulary before."""
    toy = make(name)
    batch = toy.batch([5, 9])
    model = decide(attach(toy.model))
    model(**batch)
    before, rates = model.flops_by_part().head, model.routing.keep_rate
    old = model.spec.config.vocab_size
    toy.model.resize_token_embeddings(2 * old, mean_resizing=False)
    assert model(**batch).logits.shape[-1] == 2 * old
    assert torch.equal(model.flops_by_part().head, 2 * before)
    assert torch.equal(model.flops_by_part(dense=True).head, 2 * before)
    assert torch.equal(model.routing.keep_rate, rates)
    model.generate(**batch, max_new_tokens=2, do_sample=False)
    assert torch.equal(model.flops_by_part().head, torch.full((2,), 2.0 * 2 * 2 * old * 32, dtype=torch.float64))
    fresh = attach(model.detach())
    fresh(**batch)
    assert torch.equal(fresh.flops_by_part().head, 2 * before)


@torch.no_grad()
def test_a_placeholder_of_the_new_vocabulary() -> None:
    """A picture's token is added after attach: would catch vision looked for by the old id."""
    toy = make("llava")
    model = attach(toy.model, SkipPlan.static([1], group="vision"))
    batch = toy.batch([5, 9])
    model(**batch)
    rates = model.routing.keep_rate
    new = model.spec.config.vocab_size
    toy.model.resize_token_embeddings(new + 8, mean_resizing=False)
    toy.model.config.image_token_id = new
    batch["input_ids"][batch["input_ids"] == families.IMAGE] = new
    model(**batch)
    assert torch.equal(model.routing.keep_rate, rates)
    states = toy.model.get_input_embeddings()(batch.pop("input_ids"))
    model(**batch, inputs_embeds=states)
    assert torch.equal(model.routing.keep_rate, rates)


@torch.no_grad()
@pytest.mark.parametrize("options", [{"scope": "token"}, {"group": "vision", "kv": "kept"}])
def test_single_tokens_in_a_kernel_that_was_not_tried(options: Any) -> None:
    """`set_attn_implementation` after attach: would catch tokens run alone where nobody has seen whether they can."""
    toy = make("llava", "eager")
    model = attach(toy.model, RouterConfig(**options))
    batch = toy.batch([5, 9])
    toy.model.set_attn_implementation("sdpa")
    with pytest.raises(ConfigError, match=r"tried with 'eager' .* has 'sdpa' now; call detach\(\) and attach again"):
        model(**batch)
    with model.dense():
        model.backbone(**batch)
    toy.model.set_attn_implementation("eager")
    model(**batch)


@torch.no_grad()
def test_whole_rows_in_another_kernel() -> None:
    """Whole rows need no trial: would catch a refusal there, or attention weights by the kernel before."""
    toy = make("llama", "sdpa")
    model = attach(toy.model, SkipPlan.static([1]))
    batch = toy.batch([5, 9])
    logits = model(**batch).logits
    assert model(**batch, output_attentions=True).attentions == ()
    toy.model.set_attn_implementation("eager")
    out = model(**batch, output_attentions=True)
    assert (out.logits - logits)[batch["attention_mask"].bool()].abs().max() < 1e-4
    assert [bool(entry.any()) for entry in out.attentions] == [True, False, True, True]


def test_a_kernel_that_reads_ahead() -> None:
    """PaliGemma attached under eager, then given SDPA: would catch that it now reads ahead without token types."""
    toy = make("paligemma", "eager")
    model = attach(toy.model, SkipPlan.static([1], group="vision"))
    batch = toy.batch([5, 9])
    types = batch.pop("token_type_ids")
    model(**batch)
    toy.model.set_attn_implementation("sdpa")
    model(**batch, token_type_ids=types)
    with pytest.raises(DataError, match=r"pass everything that the processor returned"):
        model(**batch)
