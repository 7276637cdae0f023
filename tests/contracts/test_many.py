"""Many prompts at once: the answers of one by one, from groups of one path each; fewer paths on request."""

from __future__ import annotations

from contextlib import ExitStack
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig

from adaskip.errors import ConfigError, DataError
from adaskip.generate.consolidate import consolidate, path_cost
from adaskip.plan import SkipPlan
from adaskip.runtime.attach import RoutedModel, attach
from tests.families import LAYERS, Toy
from tests.routing import GREEDY, count_tokens, routed

NEW = {"max_new_tokens": 4, **GREEDY}
KINDS = [("llama", "all"), ("mistral", "all"), ("gpt2", "all"), ("llava", "vision"), ("qwen2_vl", "all")]


def single(toy: Toy, lengths: list[int]) -> list[dict[str, Tensor]]:
    """One item a prompt, as a processor makes them."""
    items = [toy.collate([row]) for row in toy.rows(lengths)]
    return [{name: value for name, value in item.items() if name != "position_ids"} for item in items]


def alone(model: RoutedModel, item: dict[str, Tensor], **options: Any) -> Tensor:
    return model.generate(**item, **NEW, **options)[0, item["input_ids"].shape[1] :]


@pytest.mark.parametrize(("name", "group"), KINDS)
def test_each_answer_is_the_one_the_prompt_gets_alone(name: str, group: str) -> None:
    """One prompt an item, or several with padding on either side; results come in the order given."""
    toy, model = routed(name, group)
    items = single(toy, [5, 9, 1, 5])
    expected = []
    for item in items:
        expected.append((alone(model, item), model.routing))
    batches = [toy.batch([5, 9], "right"), *items[2:]] if group == "all" and name != "gpt2" else items
    many = model.generate_many([{k: v for k, v in b.items() if k != "position_ids"} for b in batches], **NEW)
    if batches is not items:  # the same draw of prompts
        assert torch.equal(batches[0]["input_ids"][1], items[1]["input_ids"][0])
    for answer, (tokens, routing) in zip(many.answers, expected, strict=True):
        assert torch.equal(answer.tokens, tokens)
        assert answer.path == answer.asked == tuple(routing.keep[:, 0].tolist())
        assert answer.keep_rate == pytest.approx(float(routing.keep_rate), abs=0.02)
        assert answer.executed == answer.wanted
    assert sum(count for _, count in many.groups) == 4
    assert len({path for path, _ in many.groups}) > 1
    assert many.added == 0


def test_a_group_is_decoded_whole() -> None:
    """A layer on the path sees all rows of the group at once, any other layer none; groups are no larger than asked."""
    toy, model = routed("llama", "all")
    items = single(toy, [6, 6, 6, 6, 6])
    keep = torch.ones(LAYERS, 1, dtype=torch.bool)
    keep[1] = False
    model = attach(model.detach(), SkipPlan.static([1]))
    model.generate_many(items[:1], **NEW)  # the first time the model itself is tried
    with ExitStack() as counting:
        seen = [counting.enter_context(count_tokens(layer)) for layer in model.spec.layers]
        many = model.generate_many(items, group_size=3, **NEW)
    assert many.groups == (((True, False, True, True), 3), ((True, False, True, True), 2))
    steps = [3] * 4 + [2] * 4
    for ran, calls in zip(keep[:, 0].tolist(), seen, strict=True):
        assert (next(iter(calls.values()))[5:] == steps) if ran else not calls
    assert {answer.keep_rate for answer in many.answers} == {0.75}


def test_an_answer_ends_with_its_own_end_of_sequence() -> None:
    toy, model = routed("llama", "all")
    items = single(toy, [5, 8, 3])
    ends = int(alone(model, items[0])[1])
    many = model.generate_many(items, **NEW, eos_token_id=ends, pad_token_id=0)
    for item, answer in zip(items, many.answers, strict=True):
        assert torch.equal(answer.tokens, alone(model, item, eos_token_id=ends, pad_token_id=0))
    assert len(many.answers[0].tokens) <= 2


@pytest.mark.parametrize(("name", "group"), [("llama", "all"), ("llava", "vision")])
def test_fewer_paths_are_supersets_and_static_subnetworks(name: str, group: str) -> None:
    toy, model = routed(name, group)
    items = single(toy, [5, 9, 3, 7])
    many = model.generate_many(items, paths=1, measure=True, **NEW)
    assert len(many.groups) == 1
    asked = torch.tensor([answer.asked for answer in many.answers])
    assert torch.equal(torch.tensor(many.answers[0].path), asked.any(0))
    grown = 0
    for item, answer in zip(items, many.answers, strict=True):
        assert torch.equal(answer.tokens, alone(model, item, routing=torch.tensor(answer.path)[:, None]))
        if answer.path != answer.asked:
            assert answer.executed > answer.wanted
            grown += not torch.equal(answer.tokens, alone(model, item))
        else:
            assert answer.executed == answer.wanted
    assert many.added > 0
    assert many.changed == pytest.approx(grown / len(items))


def prices(layers: int, prompts: int, seed: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    run = torch.rand(layers, prompts, generator=draw, dtype=torch.float64) + 0.5
    return run, torch.zeros_like(run)


@pytest.mark.parametrize("seed", range(5))
def test_consolidation(seed: int) -> None:
    asked = torch.rand(6, 7, generator=torch.Generator().manual_seed(seed)) > 0.5
    prompt, answer = prices(6, 7, seed + 10), prices(6, 7, seed + 20)
    distinct = len({tuple(path) for path in asked.T.tolist()})
    assert torch.equal(consolidate(asked, distinct, prompt, answer), asked)
    spent = 0.0
    for at_most in range(distinct - 1, 0, -1):
        path = consolidate(asked, at_most, prompt, answer)
        assert (path | ~asked).all()
        assert len({tuple(one) for one in path.T.tolist()}) <= at_most
        added = path_cost(path, asked, prompt, answer)
        assert (added[(path == asked).all(0)] == 0).all()
        assert (added[(path != asked).any(0)] > 0).all()
        assert float(added.sum()) >= spent
        spent = float(added.sum())
        if at_most == distinct - 1:  # one merge: the cheapest of all pairs
            assert spent == pytest.approx(min(merged(asked, i, j, prompt, answer) for i, j in pairs(asked)))
    assert torch.equal(path, asked.any(1, keepdim=True).expand_as(asked))


def pairs(asked: Tensor) -> list[tuple[tuple[bool, ...], tuple[bool, ...]]]:
    return list(combinations(sorted({tuple(path) for path in asked.T.tolist()}), 2))


def merged(asked: Tensor, one: Any, other: Any, prompt: Any, answer: Any) -> float:
    path = asked.clone()
    union = torch.tensor(one) | torch.tensor(other)
    for column, own in enumerate(asked.T.tolist()):
        if tuple(own) in (one, other):
            path[:, column] = union
    return float(path_cost(path, asked, prompt, answer).sum())


def test_what_does_not_go_with_many_prompts_is_refused() -> None:
    toy, model = routed("llava", "all")
    item = toy.batch([5])
    for options, text in [
        ({"num_beams": 2}, "num_beams asks for several rows a prompt; call generate"),
        ({"num_return_sequences": 2}, "num_return_sequences asks for several rows a prompt; call generate"),
        ({"past_key_values": object()}, "past_key_values does not go with many prompts; call generate"),
        ({"group_size": 0}, "group_size: expected at least 1 prompt, got 0"),
        ({"paths": 0}, "paths: expected at least 1 path to be left, got 0"),
    ]:
        with pytest.raises(ConfigError, match=text):
            model.generate_many([item], **NEW, **options)
    with pytest.raises(ConfigError, match=r"paths: expected one prompt an item .* \(.*pixel_values.*\), got 2"):
        model.generate_many([toy.batch([5, 6])], paths=2, **NEW)
    with pytest.raises(DataError, match="expected input_ids in each item, got pixel_values"):
        model.generate_many([{"pixel_values": item["pixel_values"]}], **NEW)
    ending = {**item, "input_ids": item["input_ids"].roll(5, 1)}
    with pytest.raises(DataError, match="a prompt ends with a vision token; put text after the picture"):
        model.generate_many([ending], **NEW)
    with model.dense(), pytest.raises(ConfigError, match=r"inside dense\(\) there is only one path; call generate"):
        model.generate_many([item], **NEW)
    nothing = model.generate_many([], **NEW)
    assert nothing.answers == ()
    assert nothing.keep_rate == 1


def test_places_given_with_padding_on_the_right_move_with_their_tokens() -> None:
    toy, model = routed("gpt2", "all")
    items = single(toy, [5, 9])
    batch = toy.batch([5, 9], "right")
    assert "position_ids" in batch
    for answer, item in zip(model.generate_many([batch], **NEW).answers, items, strict=True):
        assert torch.equal(answer.tokens, alone(model, item))


def test_what_a_generation_config_leaves_open_the_model_says() -> None:
    """As ``generate`` does: where an answer ends, and that beams are not for many prompts."""
    toy, model = routed("llama", "all")
    items = single(toy, [5, 8, 3])
    own = model.backbone.generation_config
    own.eos_token_id, own.pad_token_id = int(alone(model, items[0])[1]), 0
    config = GenerationConfig(max_new_tokens=4, **GREEDY)
    told = model.generate_many(items, **NEW).answers
    assert len(told[0].tokens) <= 2
    for answer, other in zip(model.generate_many(items, generation_config=config).answers, told, strict=True):
        assert torch.equal(answer.tokens, other.tokens)
    own.num_beams = 4
    with pytest.raises(ConfigError, match="num_beams asks for several rows"):
        model.generate_many(items, generation_config=GenerationConfig(max_new_tokens=4))
