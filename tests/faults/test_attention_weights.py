"""`output_attentions=True`: one entry a layer in full shape, 0 where nothing ran or where a key was not seen."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from adaskip import RoutedModel, RouterConfig, SkipPlan, attach, cut
from adaskip.errors import ConfigError
from tests.families import IMAGE, LAYERS, make
from tests.routing import decide, some_keep

TYPES = ["llama", "gpt2", "falcon", "bert", "opt", "gpt_oss", "deepseek_v3", "llava"]
TOKENWISE: dict[str, dict[str, Any]] = {
    "token": {"scope": "token"},
    "token, kept": {"scope": "token", "kv": "kept"},
    "token of attention": {"scope": "token", "unit": "attention"},
    "token of mlp": {"scope": "token", "unit": "mlp"},
    "attention": {"unit": "attention"},
    "mlp": {"unit": "mlp"},
    "vision": {"group": "vision"},
    "vision, kept": {"group": "vision", "kv": "kept"},
    "vision of attention": {"group": "vision", "unit": "attention"},
    "vision, token": {"group": "vision", "scope": "token"},
}
WEIGHTS = {"output_attentions": True}
GREEDY = {"do_sample": False, "suppress_tokens": [*range(2, 16)], "return_dict_in_generate": True, **WEIGHTS}


def heads(model: RoutedModel) -> int:
    return int(model.spec.config.num_attention_heads)


@torch.no_grad()
@pytest.mark.parametrize("name", TYPES)
def test_entries_are_the_dense_ones_where_everything_runs(name: str) -> None:
    """Would catch entries that are not the very ones of the model, in `dense()` or with every layer kept."""
    toy = make(name, "eager")
    batch = toy.batch([5, 9, 3])
    dense = toy.model(**batch, **WEIGHTS).attentions
    model = attach(toy.model)
    with model.dense():
        untouched = model.backbone(**batch, **WEIGHTS)
    for entries in (model(**batch, **WEIGHTS), untouched):
        assert len(entries.attentions) == len(dense) == LAYERS
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(entries.attentions, dense, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("name", TYPES)
def test_entry_i_is_layer_i_and_row_j_is_row_j(name: str) -> None:
    """Rows take different paths: would catch entries that shift, and rows that are missing or another's."""
    toy = make(name, "eager")
    model = attach(toy.model)
    keep, rows = some_keep(3), toy.rows([5, 9, 3])
    entries = model(**toy.collate(rows), **WEIGHTS, routing=keep).attentions
    assert len(entries) == LAYERS
    for b, row in enumerate(rows):
        one = toy.collate([row])
        alone = model(**one, **WEIGHTS, routing=keep[:, b : b + 1]).attentions
        length = one["input_ids"].shape[1]
        for layer, entry in enumerate(entries):
            mine = entry[b, :, -length:, -length:]
            assert entry.shape == (3, heads(model), entries[0].shape[-1], entries[0].shape[-1])
            assert (mine - alone[layer][0]).abs().max() < 1e-4
            assert bool((mine != 0).any()) == bool(keep[layer, b])


@torch.no_grad()
def test_a_layer_that_returns_more_where_weights_are_asked_for() -> None:
    """Its tuple then has one more place: would catch an IndexError in the model where such a layer is left out."""
    toy = make("trocr", "eager")
    model = attach(toy.model, SkipPlan.static([0, 2]))
    entries = model(**toy.batch([5]), **WEIGHTS).attentions
    assert [bool(entry.any()) for entry in entries] == [False, True, False, True]
    assert model(**toy.batch([5])).attentions is None


@torch.no_grad()
def test_what_a_plan_leaves_is_what_the_cut_model_attends_to() -> None:
    """Would catch zeros at the wrong layers: beside them stand the entries of the same model without those layers."""
    toy = make("llama", "eager")
    batch = toy.batch([5, 9])
    model = attach(toy.model, SkipPlan.static([1, 2]))
    entries = model(**batch, **WEIGHTS).attentions
    plain = cut(model)(**batch, **WEIGHTS).attentions
    assert not entries[1].any()
    assert not entries[2].any()
    assert torch.equal(entries[0], plain[0])
    assert torch.equal(entries[3], plain[1])


@torch.no_grad()
@pytest.mark.parametrize("case", TOKENWISE)
def test_tokens_that_skip_have_no_row_and_are_no_key(case: str) -> None:
    """Parts of rows run: would catch weights of gathered tokens put at the places of others."""
    toy = make("llava", "eager")
    model = decide(attach(toy.model, RouterConfig(**TOKENWISE[case])))
    batch = toy.batch([5, 9, 3])
    entries = model(**batch, **WEIGHTS).attentions
    length = batch["input_ids"].shape[1]
    real, vision = batch["attention_mask"].bool(), batch["input_ids"] == IMAGE
    keep = model.routing.keep if model.routing.keep.dim() == 3 else model.routing.keep[..., None].expand(-1, -1, length)
    assert 0 < keep.float().mean() < 1
    kept = TOKENWISE[case].get("kv") == "kept"
    for layer, entry in enumerate(entries):
        assert entry.shape == (3, heads(model), length, length)
        group = vision if TOKENWISE[case].get("group") == "vision" else real
        runs = real & (keep[layer] | ~group) if TOKENWISE[case].get("unit") != "mlp" else real
        total = entry.sum(-1)[:, 0]
        assert ((total - 1)[runs].abs() < 1e-5).all()
        assert not total[real & ~runs].any()
        unseen = entry.transpose(1, 3)[real & ~runs]  # by key
        assert kept or not unseen.any()
        later = torch.ones(length, length).triu(1).bool() & real[:, None, :, None]
        assert not entry.masked_select(later).any()


@torch.no_grad()
@pytest.mark.parametrize("case", ["rows", *TOKENWISE])
def test_each_step_of_generation_is_a_row_of_the_whole(case: str) -> None:
    """`generate(return_dict_in_generate=True)`: would catch steps whose entries lack what the cache does not hold."""
    toy = make("llava", "eager")
    model = decide(attach(toy.model, RouterConfig(**TOKENWISE.get(case, {}))))
    batch = toy.batch([5, 9, 3])
    out = model.generate(**batch, **GREEDY, max_new_tokens=4)
    length, routing = batch["input_ids"].shape[1], model.routing
    mask = torch.cat([batch["attention_mask"], torch.ones(3, 4).long()], 1)
    whole = {**batch, "input_ids": out.sequences, "attention_mask": mask}
    prompt = torch.arange(length + 4) < length
    full = model(**whole, **WEIGHTS, use_cache=False, routing=routing, prompt_mask=mask.bool() & prompt).attentions
    assert [len(step) for step in out.attentions] == [LAYERS] * 4
    for number, step in enumerate(out.attentions):
        end = length + number
        for entry, expected in zip(step, full, strict=True):
            assert entry.shape == (3, heads(model), 1 if number else length, end)
            expected = expected[:, :, end - entry.shape[2] : end, :end]
            seen = mask[:, end - entry.shape[2] : end, None].bool().movedim(2, 1)
            assert ((entry - expected) * seen[..., None].view(3, 1, -1, 1)).abs().max() < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "falcon"])
@pytest.mark.parametrize("skipped", [[1], [0, 1, 2, 3]])
def test_assisted_decoding(name: str, skipped: list[int]) -> None:
    """Assisted decoding reads the entries: would catch IndexError and TypeError there, and entries that shift."""
    toy = make(name, "eager")
    assistant = make(name, "eager", seed=1).model
    model = attach(toy.model, SkipPlan.static(skipped))
    batch = toy.batch([6])
    plain = model.generate(**batch, **GREEDY, max_new_tokens=5)
    assisted = model.generate(**batch, **GREEDY, max_new_tokens=5, assistant_model=assistant)
    assert torch.equal(assisted.sequences, plain.sequences)
    assert len(assisted.attentions) == len(plain.attentions)
    for step, expected in zip(assisted.attentions, plain.attentions, strict=True):
        assert len(step) == LAYERS
        for layer, (mine, theirs) in enumerate(zip(step, expected, strict=True)):
            assert (mine - theirs).abs().max() < 1e-4
            assert bool(mine.any()) == (layer not in skipped)


@torch.no_grad()
def test_plain_tuples_beams_and_configuration() -> None:
    """Other ways to ask: a plain tuple, beams, the configuration; would catch an answer for one way only."""
    toy = make("llama", "eager")
    model = attach(toy.model, SkipPlan.static([1]))
    batch = toy.batch([5, 9])
    expected = model(**batch, **WEIGHTS, output_hidden_states=True)
    plain = model(**batch, **WEIGHTS, output_hidden_states=True, return_dict=False)
    assert type(plain) is tuple
    assert len(plain) == len(expected.to_tuple())
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(plain[-1], expected.attentions, strict=True))
    beams = model.generate(**batch, **GREEDY, max_new_tokens=3, num_beams=2).attentions
    assert [[entry.shape[0] for entry in step] for step in beams] == [[4] * LAYERS] * 3
    toy.model.config.output_attentions = True
    try:
        assert len(model(**batch).attentions) == LAYERS
        assert model(**batch, output_attentions=False).attentions is None
    finally:
        toy.model.config.output_attentions = False


def test_a_kernel_without_weights_gives_none() -> None:
    """SDPA computes no weights: would catch zeros that pass for weights."""
    toy = make("llama", "sdpa")
    batch = toy.batch([5, 9])
    dense = toy.model(**batch, **WEIGHTS).attentions
    assert attach(toy.model, SkipPlan.static([1]))(**batch, **WEIGHTS).attentions == dense == ()


@torch.no_grad()
def test_another_precision() -> None:
    """The model is cast after a first call, or run under autocast: would catch entries of the precision before."""
    toy = make("llama", "eager")
    model = attach(toy.model)
    batch, keep = toy.batch([5, 9, 3]), some_keep(3)
    model(**batch, **WEIGHTS, routing=keep)
    with torch.autocast("cpu", torch.bfloat16):
        model(**batch, **WEIGHTS, routing=keep)
    toy.model.bfloat16()
    for decided in (keep, torch.zeros_like(keep)):
        assert {entry.dtype for entry in model(**batch, **WEIGHTS, routing=decided).attentions} == {torch.bfloat16}


def test_nothing_stays_on_the_model() -> None:
    """Would catch hooks that outlive the pass, or the model's own that are lost."""
    toy = make("llama", "eager")
    batch = toy.batch([5, 9])
    toy.model(**batch, **WEIGHTS)  # transformers leaves its own hooks

    def hooks() -> list[int]:
        return [len(module._forward_hooks) for module in toy.model.modules()]

    before = hooks()
    model = attach(toy.model, RouterConfig(unit="attention"))
    with torch.no_grad():
        model(**batch, **WEIGHTS)
        with pytest.raises(RuntimeError):
            model(input_ids=batch["input_ids"], position_ids=torch.zeros(7, 3).long(), **WEIGHTS)
    model.detach()
    assert hooks() == before


def test_training_refuses_plainly() -> None:
    """In training both branches are computed: would catch entries of one of them passed for what was attended to."""
    model = attach(make("llama", "eager").model).train()
    with pytest.raises(ConfigError, match=r"output_attentions: in training mode .* or call the model in eval"):
        model(input_ids=torch.full((1, 4), 20), **WEIGHTS)


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_logits_of_experts_are_refused_plainly(name: str) -> None:
    """Experts' logits have no full shape to be put into: would catch fewer entries than layers, and a wrong loss."""
    toy = make(name, "eager")
    model = attach(toy.model, SkipPlan.static([1]))
    batch = toy.batch([5, 9])
    for training in (False, True):
        with pytest.raises(ConfigError, match=r"output_router_logits: .* ask inside model.dense\(\)"):
            model.train(training)(**batch, output_router_logits=True)
    with torch.no_grad(), model.dense():
        assert len(model.backbone(**batch, output_router_logits=True).router_logits) == LAYERS
