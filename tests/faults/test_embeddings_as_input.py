"""`inputs_embeds` for a vision-language model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from adaskip import RoutedModel, RouterConfig, SkipPlan, attach
from tests.families import Toy, make
from tests.routing import decide, real

GENERATING = ["llava", "internvl", "vipllava"]
FORWARD = [*GENERATING, "qwen2_vl", "gemma3", "paligemma"]  # the latter transformers lets only read embedded prompts
CASES: dict[str, Any] = {
    "routers": RouterConfig(),
    "routers of vision": RouterConfig(group="vision"),
    "tokens": RouterConfig(scope="token", group="vision"),
    "plan": SkipPlan.static([1, 2], group="vision"),
}
GREEDY = {"max_new_tokens": 4, "do_sample": False}


def routed(name: str, case: str) -> tuple[Toy, RoutedModel]:
    toy = make(name)
    model = attach(toy.model, CASES[case])
    return toy, model if model.routers is None else decide(model)


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", FORWARD)
def test_placeholders_are_found_by_their_embedding(name: str, case: str) -> None:
    """Somebody embeds the prompt first: would catch a refusal, or pictures taken for text."""
    toy, model = routed(name, case)
    batch = toy.batch([5, 8])
    if name == "qwen2_vl":  # it needs ids to place its pictures
        batch["position_ids"] = torch.arange(batch["input_ids"].shape[1]).expand(3, 2, -1)
    expected, rates = model(**batch).logits, model.routing.keep_rate
    states = toy.model.get_input_embeddings()(batch.pop("input_ids"))
    embedded = model(**batch, inputs_embeds=states).logits
    assert (real(embedded, batch) - real(expected, batch)).abs().max() < 1e-4
    assert torch.equal(model.routing.keep_rate, rates)
    assert (rates < 1).any()


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", GENERATING)
def test_generation_from_embedded_prompts(name: str, case: str) -> None:
    """`generate` takes states, with the ids beside them or without: would catch another path than that of the ids."""
    toy, model = routed(name, case)
    batch = toy.batch([5, 8])
    answers, rates = model.generate(**batch, **GREEDY)[:, -4:], model.routing.keep_rate
    ids = batch.pop("input_ids")
    states = toy.model.get_input_embeddings()(ids)
    for more in ({}, {"input_ids": ids}):
        assert torch.equal(model.generate(**batch, **more, inputs_embeds=states, **GREEDY)[:, -4:], answers)
        assert torch.equal(model.routing.keep_rate, rates)


@torch.no_grad()
def test_ids_beside_states_tell_where_merged_pictures_are() -> None:
    """Pictures are merged into the states, and no placeholder is left: would catch vision taken for text."""
    toy = make("llava")
    batch = toy.batch([5, 8])
    model = attach(toy.model, SkipPlan.static([1, 2], group="vision"))
    expected = model.generate(**batch, **GREEDY, num_beams=2)
    rates = model.routing.keep_rate
    ids, pictures = batch["input_ids"], batch.pop("pixel_values")
    states = toy.model.get_input_embeddings()(ids)
    features = toy.model.get_image_features(pixel_values=pictures).pooler_output
    states[ids == 5] = torch.cat([x.reshape(-1, states.shape[-1]) for x in features])
    embedded = model.generate(**batch, inputs_embeds=states, **GREEDY, num_beams=2)
    assert torch.equal(embedded[:, -4:], expected[:, -4:])
    assert torch.equal(model.routing.keep_rate, rates)
