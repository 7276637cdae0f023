"""Masks and ids of another shape than the tokenizer's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2DoubleHeadsModel

from adaskip import RouterConfig, attach
from adaskip.errors import BackboneError, DataError
from tests import toys

IDS = torch.randint(10, toys.VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(0))
CAUSAL = torch.ones(2, 1, 6, 6).tril().bool()


@pytest.mark.parametrize(
    ("mask", "arrived"),
    [
        (CAUSAL, r"shape \(2, 1, 6, 6\)"),
        (CAUSAL[:, 0], r"shape \(2, 6, 6\)"),
        (torch.ones(6).long(), r"shape \(6,\)"),
        ({"full_attention": CAUSAL}, "a dict"),
        (torch.ones(2, 4).long(), r"\(2, 4\)"),
        (torch.ones(1, 6).long(), r"\(1, 6\)"),
    ],
)
@pytest.mark.parametrize("scope", ["prompt", "token"])
def test_a_mask_of_ones_own_is_refused_plainly(mask: Any, arrived: str, scope: Any) -> None:
    """Somebody passes a mask that is not the tokenizer's: would catch an AttributeError, or a mask cut wrongly."""
    model = attach(toys.make("llama").model, RouterConfig(scope=scope))
    with pytest.raises(DataError, match=rf"attention_mask: expected .* got {arrived}"):
        model(input_ids=IDS, attention_mask=mask)
    if isinstance(mask, torch.Tensor) and mask.dim() == 4:
        with torch.no_grad(), model.dense():
            model.backbone(input_ids=IDS, attention_mask=mask)


@pytest.mark.parametrize("kind", ["input_ids", "inputs_embeds"])
def test_several_sequences_a_row_are_refused_plainly(kind: str) -> None:
    """Multiple-choice input (b choices t): would catch a RuntimeError from inside the routers."""
    model = attach(toys.make("llama").model)
    source = torch.randint(10, 90, (2, 3, 6)) if kind == "input_ids" else torch.randn(2, 3, 6, 32)
    with pytest.raises(DataError, match=rf"{kind}: expected shape \(batch, tokens.*give every sequence a row"):
        model(**{kind: source})


@pytest.mark.parametrize("shape", [(0, 4), (2, 0)])
@pytest.mark.parametrize("scope", ["prompt", "token"])
def test_nothing_to_read_is_refused_plainly(shape: Any, scope: Any) -> None:
    """An empty batch or empty prompts: would catch ZeroDivisionError, or logits made of nothing."""
    model = attach(toys.make("llama").model, RouterConfig(scope=scope))
    with pytest.raises(DataError, match=r"input_ids: expected at least one row and one token"):
        model(input_ids=torch.zeros(shape).long())


def test_a_model_with_a_second_head_for_whole_rows_is_refused() -> None:
    """A multiple-choice model, whose inputs have one more axis: would catch that it attaches and fails when called."""
    model = GPT2DoubleHeadsModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=99)).eval()
    before = dict(vars(model))
    with pytest.raises(BackboneError, match=r"a second head .*multiple_choice_head.* load it with AutoModel"):
        attach(model)
    assert vars(model).keys() == before.keys()
