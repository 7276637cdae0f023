"""Several prompts packed into one row by their positions, as collators without padding make them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from adaskip import RouterConfig, SkipPlan, attach
from adaskip.errors import DataError
from tests import toys
from tests.routing import decide, real

PACKED = {"position_ids": torch.cat([torch.arange(6), torch.arange(9)])[None], "use_cache": False}
REFUSAL = r"expected one prompt a row, got several packed into one.*RouterConfig\(scope='token'\)"


def prompts() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(3)
    return tuple(torch.randint(10, toys.VOCABULARY, (1, length), generator=draw) for length in (6, 9))  # type: ignore[return-value]


@pytest.mark.parametrize(
    "marks",
    [
        PACKED,
        {"position_ids": torch.cat([torch.arange(6), torch.arange(9)]), "use_cache": False},  # not by row
        {"position_ids": PACKED["position_ids"], "attention_mask": torch.ones(1, 15).long()},  # with mask and cache
        {"position_ids": torch.cat([torch.zeros(1), torch.arange(14)]).long()[None]},  # the first one a single token
        {"position_ids": torch.cat([torch.arange(6), 9 + torch.arange(9)])[None], "use_cache": False},  # by a gap
        {"cu_seq_lens_q": torch.tensor([0, 6, 15]), "cu_seq_lens_k": torch.tensor([0, 6, 15])},
        {"attention_mask": torch.tensor([[1] * 6 + [2] * 9])},
        {"seq_idx": torch.tensor([[0] * 6 + [1] * 9])},
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_packed_prompts_are_refused_where_one_decision_would_rule_all(marks: dict[str, Any], training: bool) -> None:
    """Somebody packs prompts to train or score without padding; would catch one path for both, silently."""
    model = attach(toys.make("llama").model).train(training)
    with pytest.raises(DataError, match=REFUSAL):
        model(input_ids=torch.cat(prompts(), 1), **marks)


@torch.no_grad()
def test_tokens_that_decide_for_themselves_may_be_packed() -> None:
    """The way out that the refusal names: would catch that it does not work."""
    model = decide(attach(toys.make("llama").model, RouterConfig(scope="token")))
    both = prompts()
    alone = torch.cat([model(input_ids=ids, use_cache=False).logits for ids in both], 1)
    packed = model(input_ids=torch.cat(both, 1), **PACKED).logits
    assert 0 < model.routing.keep.float().mean() < 1
    assert (packed - alone).abs().max() < 1e-4


@torch.no_grad()
def test_a_plan_rules_packed_prompts_alike() -> None:
    """A plan leaves the same layers out for every prompt: would catch a refusal where there is nothing to refuse."""
    model = attach(toys.make("llama").model, SkipPlan.static([1]))
    both = prompts()
    alone = torch.cat([model(input_ids=ids, use_cache=False).logits for ids in both], 1)
    assert (model(input_ids=torch.cat(both, 1), **PACKED).logits - alone).abs().max() < 1e-4
    with model.dense():
        model.backbone(input_ids=torch.cat(both, 1), **PACKED)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("filling", [0, 1, "ends"])
def test_padding_is_no_second_prompt(side: str, filling: int | str) -> None:
    """Positions of padding are anything (0, 1, or going on): would catch a padded batch taken for a packed one."""
    toy = toys.make("llama")
    model = decide(attach(toy.model))
    batch = toy.batch([4, 7, 5], side)
    plain = model(**batch).logits
    places = batch["attention_mask"].cumsum(1) - 1
    if filling != "ends":
        places = places.masked_fill(batch["attention_mask"] == 0, int(filling))
    else:
        places = places.clamp(min=0)
    placed = model(**batch, position_ids=places).logits
    assert (real(plain, batch) - real(placed, batch)).abs().max() < 1e-4
    generated = model.generate(**batch, max_new_tokens=3, do_sample=False)
    assert generated.shape == (3, 10)


@torch.no_grad()
def test_rotary_positions_of_pictures_are_no_second_prompt() -> None:
    """Rotary positions (3 b t) stand still and go back within a picture: would catch such a prompt being refused."""
    toy = toys.make("qwen2_vl")
    model = decide(attach(toy.model))
    batch = toy.batch([4, 7])
    places, _ = toy.model.model.get_rope_index(
        batch["input_ids"],
        mm_token_type_ids=batch["mm_token_type_ids"],
        image_grid_thw=batch["image_grid_thw"],
        attention_mask=batch["attention_mask"],
    )
    assert places.shape == (3, 2, 12)
    model(**batch, position_ids=places)
    model(**batch, position_ids=torch.cat([batch["attention_mask"].cumsum(1)[None] - 1, places]))
    assert model.generate(**batch, max_new_tokens=3, do_sample=False).shape == (2, 15)
