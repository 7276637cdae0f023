"""`generate_many` under the options and inputs of people who know `generate`: the same answers, or a plain refusal."""

from __future__ import annotations

from functools import wraps
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessorList

import adaskip
from adaskip.errors import BackboneError, ConfigError, DataError
from tests import families
from tests.routed_toys import GREEDY, batch, llama, routed, spread


def alone(model: Any, item: dict[str, Tensor], **options: Any) -> list[int]:
    return model.generate(**item, **options)[0, item["input_ids"].shape[1] :].tolist()


def many(model: Any, items: list[Any], **options: Any) -> list[list[int]]:
    return [answer.tokens.tolist() for answer in model.generate_many(items, **options).answers]


def three() -> tuple[adaskip.RoutedModel, list[dict[str, Tensor]]]:
    """A model that runs every layer, so that prompts of three lengths make one group."""
    model = spread(adaskip.attach(llama(1)), 1)
    model.set_threshold(-1e9)
    return model, [batch(30), batch(9), batch(5)]


def test_a_limit_of_prompt_and_answer_is_each_prompts_own() -> None:
    """Somebody limits the length as a whole, or their model does; catches short prompts cut to the longest's room."""
    model, items = three()
    expected = [alone(model, item, max_length=33) for item in items]
    assert [len(answer) for answer in expected] == [3, 24, 28]
    assert many(model, items, max_length=33) == expected
    model.backbone.generation_config.max_length = 33
    assert many(model, items) == expected
    assert [len(answer) for answer in many(model, items, max_new_tokens=6)] == [6, 6, 6]
    assert [len(a.tokens) for a in model.generate_many(items, paths=1).answers] == [3, 24, 28]
    with pytest.raises(DataError, match=r"item 0: a prompt of 30 tokens leaves no room .* max_length=20; pass max_new"):
        model.generate_many(items, max_length=20)


def test_options_that_read_whole_rows() -> None:
    """Somebody asks for a penalty that counts the prompt; catches padding of the group that is counted too."""
    model, items = three()
    own = model.backbone.generation_config
    for options in ({"repetition_penalty": 5.0}, {"no_repeat_ngram_size": 1}):
        own.pad_token_id = alone(model, items[2], **options, **GREEDY)[0]
        assert many(model, items, **options, **GREEDY) == [alone(model, item, **options, **GREEDY) for item in items]
    options = {"min_length": 11, "eos_token_id": alone(model, items[2], **GREEDY)[0]}
    expected = [alone(model, item, **options, **GREEDY) for item in items]
    assert len(expected[2]) == 6
    assert many(model, items, **options, **GREEDY) == expected


def test_without_a_cache() -> None:
    """A configuration says use_cache=False, as after training; catches answers of prompts that are routed anew."""
    model = routed()
    items = [batch(5), batch(9), batch(30)]
    expected = many(model, items, **GREEDY)
    model.backbone.generation_config.use_cache = False
    model.backbone.generation_config.return_dict_in_generate = True
    assert many(model, items, **GREEDY) == expected
    with pytest.raises(ConfigError, match=r"use_cache=False: .*; leave it out, or call generate"):
        model.generate_many(items, use_cache=False, **GREEDY)


def test_allowed_tokens_are_asked_for_by_the_number_of_the_prompt() -> None:
    """Somebody constrains each prompt otherwise; catches the row within a group taken for the prompt."""
    model, items = three()
    seen: list[list[int]] = []

    def allow(number: int, ids: Tensor) -> list[int]:
        seen.append(ids.tolist())
        return [20 + 10 * number, 21 + 10 * number]

    answers = many(model, items, prefix_allowed_tokens_fn=allow, **GREEDY)
    assert [{token // 10 for token in answer} for answer in answers] == [{2}, {3}, {4}]
    assert all(item["input_ids"][0].tolist() in seen for item in items)
    pair = [batch(30), batch(9, 9)]
    answers = many(model, pair, prefix_allowed_tokens_fn=allow, **GREEDY)
    assert [{token // 10 for token in answer} for answer in answers] == [{2}, {3}, {4}]


@pytest.mark.parametrize("name", ["logits_processor", "stopping_criteria", "prompt_lookup_num_tokens", "dola_layers"])
def test_what_speaks_of_one_batch_is_refused_by_name(name: str) -> None:
    """Somebody passes code that is told rows, or another way to generate; catches wrong rows and tracebacks."""
    model, items = three()
    value: Any = {"prompt_lookup_num_tokens": 2, "dola_layers": "low"}.get(name)
    if value is None:
        value = LogitsProcessorList([lambda ids, scores: scores])
    with pytest.raises(ConfigError, match=f"{name} .*; call generate"):
        model.generate_many(items, **{name: value}, **GREEDY)


def test_another_way_to_generate_in_the_configuration() -> None:
    """The model's own generation config asks for assisted decoding; catches an error from within transformers."""
    model, items = three()
    model.backbone.generation_config.prompt_lookup_num_tokens = 2
    with pytest.raises(ConfigError, match="prompt_lookup_num_tokens does not go with many prompts; call generate"):
        model.generate_many(items, **GREEDY)


@pytest.mark.parametrize("name", ["mpt", "bart", "roformer", "roberta", "paligemma", "llama"])
def test_models_that_use_no_cache_or_count_padding(name: str) -> None:
    """A model's configuration turns the cache off, or padding moves its tokens; catches answers that are nobody's."""
    toy = families.make(name)
    model = spread(adaskip.attach(toy.model), 1)
    items = [toy.collate([row]) for row in toy.rows([12, 5, 9, 9])]
    items = [{key: value for key, value in item.items() if key != "position_ids"} for item in items]
    for threshold in (0.0, -1e9):
        model.set_threshold(threshold)
        assert many(model, items, **GREEDY) == [alone(model, item, **GREEDY) for item in items]


def test_a_model_that_cannot_go_on_from_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model's own generate misreads a filled cache; catches answers that are nobody's."""
    base = llama(1)
    prepare = type(base).prepare_inputs_for_generation

    @wraps(prepare)
    def drop(self: Any, ids: Tensor, *args: Any, past_key_values: Any = None, **named: Any) -> Any:
        inputs = prepare(self, ids, *args, past_key_values=past_key_values, **named)
        if past_key_values is not None and past_key_values.get_seq_length():
            inputs["position_ids"] = torch.zeros_like(inputs["input_ids"])
        return inputs

    model = adaskip.attach(base)
    many(model, [batch(9)], **GREEDY)
    model = adaskip.attach(model.detach())
    monkeypatch.setattr(type(base), "prepare_inputs_for_generation", drop)
    with pytest.raises(BackboneError, match=r"LlamaForCausalLM: .* goes on from a filled cache otherwise .*; call gen"):
        model.generate_many([batch(9)], **GREEDY)


def test_a_model_without_a_cache() -> None:
    """A model knows no cache at all; catches a traceback."""
    model = adaskip.attach(families.make("openai-gpt").model)
    with pytest.raises(BackboneError, match="keeps no cache that could go on with others; call generate"):
        model.generate_many([batch(9)], **GREEDY)


def test_ids_of_one_prompt_without_an_axis_for_rows() -> None:
    """A data set holds one row of ids a prompt; catches an IndexError."""
    model, items = three()
    flat = [{name: value[0] for name, value in item.items()} for item in items]
    assert many(model, flat, **GREEDY) == many(model, items, **GREEDY)
    assert many(model, [{"input_ids": item["input_ids"]} for item in flat], **GREEDY) == many(model, items, **GREEDY)


IDS = torch.tensor([[11, 12]])


@pytest.mark.parametrize(
    ("prompts", "text"),
    [
        ({"input_ids": IDS}, r"expected a list of items, got a single one; write generate_many\(\[inputs\]\)"),
        ("hello", r"expected a list of items, got a str; write generate_many\(\[inputs\]\)"),
        (IDS, r"expected a list of items, got a Tensor; write"),
        (3, r"expected a list of items, got a int; write"),
        ([{"input_ids": IDS}, "hello"], "item 1: expected the model's inputs by name, got a str; write tokenizer"),
        ([IDS], "item 0: expected the model's inputs by name, got a Tensor; write tokenizer"),
        ([{"input_ids": [[1, 2]]}], "item 0: input_ids: expected a tensor, got a list; write tokenizer"),
        ([{"input_ids": IDS.float()}], r"item 0: input_ids: expected whole numbers of shape \(batch, tokens\)"),
        (
            [{"input_ids": IDS[:, :0]}],
            r"input_ids: expected whole numbers .* got torch.int64 of shape \(1, 0\)",
        ),
        ([{"input_ids": IDS, "attention_mask": IDS[:, :1]}], r"attention_mask: expected shape \(1, 2\), got \(1, 1\)"),
        ([{"input_ids": IDS, "attention_mask": IDS * 0}], "attention_mask: a row has no token"),
    ],
)
def test_what_is_no_list_of_inputs(prompts: Any, text: str) -> None:
    """Somebody passes one batch, a text or lists; catches AttributeError, TypeError and IndexError."""
    model, _ = three()
    with pytest.raises(DataError, match=f"generate_many: .*{text}"):
        model.generate_many(prompts, **GREEDY)
