"""Randomly drawn plans on small models: skipping equals the soft mix, cached equals uncached, nothing is NaN."""

from __future__ import annotations

from functools import cache
from itertools import product
from typing import Any, get_args

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adaskip.errors import ConfigError
from adaskip.plan import KV, Group, Scope, Unit
from adaskip.policies.learned.config import RouterConfig
from adaskip.runtime.attach import RoutedModel, attach
from tests.families import EAGER_ONLY, LAYERS, TOKEN_REFUSED, UNIT_REFUSED, VISION, Toy, make
from tests.routing import GREEDY

NAMES = ["bloom", "falcon", "gemma2", "llama", "llava", "mixtral", "mpt", "qwen2", "qwen2_vl"]


@cache
def admitted(name: str) -> list[RouterConfig]:
    """Every scope, unit, group and kv that goes together and that this family does not refuse."""
    found = []
    for scope, unit, group, kv in product(*(get_args(kind) for kind in (Scope, Unit, Group, KV))):
        refused = name in UNIT_REFUSED.get(unit, ()) or (scope == "token" and name in TOKEN_REFUSED)
        if refused or (group == "vision" and name not in VISION):
            continue
        try:
            found.append(RouterConfig(scope=scope, unit=unit, group=group, kv=kv))
        except ConfigError:  # keys that nobody would read
            continue
    return found


@cache
def routed(name: str, config: RouterConfig, attention: str) -> tuple[Toy, RoutedModel]:
    toy = make(name, attention)
    return toy, attach(toy.model, config)


@st.composite
def requests(draw: st.DrawFn, names: list[str]) -> dict[str, Any]:
    name = draw(st.sampled_from(names))
    config = draw(st.sampled_from(admitted(name)))
    lengths = draw(st.lists(st.integers(1, 12), min_size=1, max_size=5))
    share = st.sampled_from([0.0, 0.5, 1.0] if config.scope == "token" else [0.0, 1.0])
    row = st.lists(share, min_size=len(config.sites(LAYERS)), max_size=len(config.sites(LAYERS)))
    return {
        "name": name,
        "config": config,
        "attention": "eager" if name in EAGER_ONLY else draw(st.sampled_from(["eager", "sdpa"])),
        "side": draw(st.sampled_from(["left", "right"])),
        "lengths": lengths,
        "shares": draw(st.lists(row, min_size=len(lengths), max_size=len(lengths))),
        "seed": draw(st.integers(0, 2**16)),
        "new": draw(st.integers(1, 3)),
    }


@torch.no_grad()
def check(
    name: str,
    config: RouterConfig,
    attention: str,
    side: str,
    lengths: list[int],
    shares: list[list[float]],
    seed: int,
    new: int,
) -> None:
    """A prompt of these rows; with padding on the left, where generating is defined, also ``new`` tokens both ways.

    ``shares`` (b s) says how many tokens of a row run a site: none, all, or under scope ``token`` about half, drawn
    one by one, the generated ones included.
    """
    toy, model = routed(name, config, attention)
    batch = toy.batch(lengths, side, seed)
    routing = torch.tensor(shares).T == 1
    if config.scope == "token":
        width = batch["input_ids"].shape[1] + new - 1
        drawn = torch.rand(len(model.sites), len(lengths), width, generator=torch.Generator().manual_seed(seed))
        routing = drawn < torch.tensor(shares).T[..., None]
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


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_of_plans(name: str) -> None:
    @settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=SUPPRESSED)
    @given(requests([name]))
    def sample(request: dict[str, Any]) -> None:
        check(**request)

    sample()


@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(max_examples=10_000, deadline=None, suppress_health_check=SUPPRESSED)
@given(requests(NAMES))
def test_ten_thousand_plans(request: dict[str, Any]) -> None:
    check(**request)
