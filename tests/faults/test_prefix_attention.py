"""A prefix model, which reads its prompt both ways: PaliGemma, with every kernel."""

from __future__ import annotations

from typing import Any

import pytest

from adaskip import RouterConfig, SkipPlan, attach
from adaskip.errors import DataError
from tests import families
from tests.routing import decide, real, same_both_ways

CASES: dict[str, Any] = {
    "token": RouterConfig(scope="token"),
    "token of vision, kept": RouterConfig(scope="token", group="vision", kv="kept"),
    "vision, kept": SkipPlan.static([1, 2], group="vision", kv="kept"),
    "vision": SkipPlan.static([1, 2], group="vision"),
}


@pytest.mark.parametrize("case", CASES)
def test_every_kernel_attaches_and_is_exact(case: str) -> None:
    """PaliGemma under SDPA, its default: would catch the refusal by a trial without `token_type_ids`."""
    logits = []
    for attention in ("eager", "sdpa"):
        toy = families.make("paligemma", attention)
        model = attach(toy.model, CASES[case])
        model = model if model.routers is None else decide(model)
        batch = toy.batch([5, 8])
        logits.append(real(same_both_ways(model, batch), batch))
        assert (model.routing.keep_rate < 1).all()
    assert (logits[0] - logits[1]).abs().max() < 1e-3


@pytest.mark.parametrize("case", CASES)
def test_without_token_types_sdpa_cannot_be_cut(case: str) -> None:
    """The processor's `token_type_ids` get lost: would catch two executions that differ, silently."""
    toy = families.make("paligemma", "sdpa")
    model = attach(toy.model, CASES[case])
    batch = toy.batch([5, 8])
    del batch["token_type_ids"]
    with pytest.raises(DataError, match=r"token_type_ids: .*pass everything that the processor returned"):
        model(**batch)
