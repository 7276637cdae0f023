"""Randomly drawn plans on small models: skipping equals the soft mix, cached equals uncached, nothing is NaN."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adaskip.plan import RouterConfig
from adaskip.runtime.attach import RoutedModel, attach
from tests.contracts.test_runtime import GREEDY
from tests.families import LAYERS, Toy, make

GROUPS = {"llama": "all", "qwen2": "all", "gemma2": "all", "mixtral": "all", "llava": "vision", "qwen2_vl": "vision"}


@lru_cache
def routed(name: str, group: str, attention: str) -> tuple[Toy, RoutedModel]:
    toy = make(name, attention)
    return toy, attach(toy.model, RouterConfig(group=group))


@st.composite
def requests(draw: st.DrawFn) -> dict[str, Any]:
    name = draw(st.sampled_from(sorted(GROUPS)))
    lengths = draw(st.lists(st.integers(1, 12), min_size=1, max_size=5))
    row = st.lists(st.booleans(), min_size=LAYERS, max_size=LAYERS)
    return {
        "name": name,
        "group": draw(st.sampled_from(["all", GROUPS[name]])),
        "attention": "eager" if name == "gemma2" else draw(st.sampled_from(["eager", "sdpa"])),
        "side": draw(st.sampled_from(["left", "right"])),
        "lengths": lengths,
        "keep": draw(st.lists(row, min_size=len(lengths), max_size=len(lengths))),
        "seed": draw(st.integers(0, 2**16)),
        "new": draw(st.integers(1, 3)),
    }


@torch.no_grad()
def check(name: str, group: str, attention: str, side: str, lengths: list[int], keep: Any, seed: int, new: int) -> None:
    """A prompt of these rows; with padding on the left, where generating is defined, also ``new`` tokens both ways."""
    toy, model = routed(name, group, attention)
    batch = toy.batch(lengths, side, seed)
    routing = torch.tensor(keep).T
    real = batch["attention_mask"].bool()
    skipped = model(**batch, routing=routing).logits
    with model.soft():
        soft = model(**batch, routing=routing).logits
    assert skipped[real].isfinite().all()
    assert (soft - skipped)[real].abs().max() <= 1e-4
    if side == "left":
        options = {"max_new_tokens": new, "return_dict_in_generate": True, "output_logits": True, **GREEDY}
        cached = model.generate(**batch, routing=routing, **options)
        again = model.generate(**batch, routing=routing, **options, use_cache=False)
        assert (torch.stack(cached.logits) - torch.stack(again.logits)).abs().max() <= 1e-4


SUPPRESSED = [HealthCheck.too_slow, HealthCheck.data_too_large]


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=SUPPRESSED)
@given(requests())
def test_a_sample_of_plans(request: dict[str, Any]) -> None:
    check(**request)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(max_examples=10_000, deadline=None, suppress_health_check=SUPPRESSED)
@given(requests())
def test_ten_thousand_plans(request: dict[str, Any]) -> None:
    check(**request)
