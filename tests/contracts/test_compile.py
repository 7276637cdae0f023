"""Static plans under torch.compile: one graph without a break, in prefill, with a cache and in decoding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from adaskip.plan import SkipPlan
from adaskip.runtime.attach import attach
from tests import families


def written(model: Any, batch: dict[str, Tensor]) -> list[Tensor]:
    """Logits of the prompt without and with a cache, and of two tokens after it."""
    out = model(**batch, use_cache=True)
    found = [model(**batch, use_cache=False).logits, out.logits]
    for step in range(2):
        token = batch["input_ids"][:, step : step + 1]
        found.append(model(input_ids=token, past_key_values=out.past_key_values, use_cache=True).logits)
    assert [layer.nbytes() > 0 for layer in out.past_key_values.layers] == [False, True, True, False]
    assert out.past_key_values.length == 8
    return found


@pytest.mark.parametrize(
    "name", ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen3", "gemma2", "gpt2"))]
)
@torch.no_grad()
def test_a_static_plan_is_one_graph(name: str) -> None:
    toy = families.make(name, "eager" if name in families.EAGER_ONLY else "sdpa")
    batch = toy.batch([6, 6])
    del batch["position_ids"]
    model = attach(toy.model, SkipPlan.static([0, 3]))
    plain = written(model, batch)
    torch._dynamo.reset()
    graphs = written(torch.compile(model, backend="eager", fullgraph=True), batch)
    assert model.routing.keep_rate.tolist() == [0.5, 0.5]
    for one, other in zip(plain, graphs, strict=True):
        assert torch.allclose(one, other, atol=1e-6)
