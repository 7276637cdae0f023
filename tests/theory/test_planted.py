"""Backbones with planted redundancy: verdicts find every planted layer, and call nothing admissible that costs more."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import adaskip
from adaskip.batch import Batch
from adaskip.errors import ConfigError
from adaskip.plan import Group
from adaskip.policies.learned.config import RouterConfig
from adaskip.survey.skips import measure_bands, measure_skips
from adaskip.theory.bands import Band, early_exits, judge_bands, late_entries
from adaskip.theory.conditions import judge
from adaskip.theory.prices import calibrate_prices
from tests import toys

LAYERS, TOLERANCE = 4, 0.01


@dataclass
class Planting:
    """A model and what was planted in it; layers of neither set are whatever chance made them."""

    model: Any
    group: Group
    admissible: set[int] = field(default_factory=set)
    inadmissible: set[int] = field(default_factory=set)


def scale(layer: Any, attention: float = 1.0, mlp: float = 1.0) -> None:
    with torch.no_grad():
        layer.self_attn.o_proj.weight.mul_(attention)
        layer.mlp.down_proj.weight.mul_(mlp)


def text(kind: str, seed: int) -> Planting:
    """A Llama whose every layer counts, but for the planted ones."""
    toy = toys.make("llama", seed=seed)
    layers = toy.model.model.layers
    place = torch.randperm(LAYERS, generator=torch.Generator().manual_seed(seed)).tolist()
    found = Planting(toy.model, "all")
    if kind in ("redundant", "eps-redundant"):
        for i in place[: 1 + seed % 2]:
            scale(layers[i], *[0.0 if kind == "redundant" else 1e-3] * 2)
            found.admissible.add(i)
        found.inadmissible = set(place) - found.admissible
    elif kind == "duplicated":  # a copy acts a second time: equal weights are no redundancy
        i = place[0] % (LAYERS - 1)
        layers[i + 1].load_state_dict(layers[i].state_dict())
        found.inadmissible = {i, i + 1}
    elif kind == "critical":  # all others are nearly idle
        for i in place[1:]:
            scale(layers[i], 1e-3, 1e-3)
        found.admissible, found.inadmissible = set(place[1:]), {place[0]}
    return found


def picture(kind: str, seed: int) -> Planting:
    """A LLaVA in which one layer alone carries vision to text: elsewhere attention writes nothing."""
    toy = toys.make("llava", seed=seed)
    layers = toy.model.model.language_model.layers
    carrier = seed % LAYERS
    for i, layer in enumerate(layers):
        scale(layer, attention=4.0 if i == carrier else 0.0)
    found = Planting(toy.model, "vision" if kind == "carrier, vision" else "all", inadmissible={carrier})
    if found.group == "vision":
        found.admissible = set(range(carrier + 1, LAYERS))  # after it nobody looks at vision again
    else:
        for i in set(range(LAYERS)) - {carrier}:
            scale(layers[i], mlp=1e-3)
            found.admissible.add(i)
    return found


KINDS = {
    "redundant": text,
    "eps-redundant": text,
    "duplicated": text,
    "critical": text,
    "carrier, vision": picture,
    "carrier, all": picture,
}


def batches(group: Any, count: int, seed: int, rows: int = 32) -> list[Batch]:
    """Random prompts, with a picture each where the model sees; what is predicted is their last token."""
    toy = toys.Toy(None, images=group.images, qwen=False)  # type: ignore[arg-type]
    found = []
    for i in range(count):
        draw = torch.Generator().manual_seed(1000 * seed + i)
        inputs = toy.batch(torch.randint(4, 9, (rows,), generator=draw).tolist(), seed=1000 * seed + i)
        prompt = inputs["attention_mask"].bool()
        prompt[:, -1] = False
        labels = torch.full_like(inputs["input_ids"], -100)
        labels[:, -1] = inputs["input_ids"][:, -1]
        found.append(Batch(inputs, labels, prompt))
    return found


CASES = [(kind, seed) for seed in range(4) for kind in KINDS]


@pytest.mark.parametrize(
    ("kind", "seed"),
    [pytest.param(*case, marks=[] if case[1] == 0 else pytest.mark.slow) for case in CASES],
)
def test_verdicts_recover_what_was_planted(kind: str, seed: int) -> None:
    planting = KINDS[kind](kind, seed)
    images = toys.Toy(None, images=KINDS[kind] is picture, qwen=False)  # type: ignore[arg-type]
    model = adaskip.attach(planting.model, RouterConfig(group=planting.group))
    attention = planting.group == "vision"
    fresh = measure_skips(model, batches(images, 2, seed), attention=attention)
    prices = calibrate_prices(fresh, fresh.mass.mean(0), alpha=0.1)
    measured = measure_skips(model, batches(images, 4, seed + 50), attention=attention)
    found = judge(measured, prices, planting.group, TOLERANCE).layers
    cost = measure_skips(model, batches(images, 12, seed + 100)).kl.double().mean(0)  # the truth, near enough
    assert {layer for layer in planting.admissible if found[layer] != "admissible"} == set(), (found, cost)
    assert {layer for layer in planting.inadmissible if found[layer] != "inadmissible"} == set(), (found, cost)
    assert all(cost[layer] <= TOLERANCE for layer, verdict in found.items() if verdict == "admissible")
    assert all(cost[layer] < TOLERANCE / 10 for layer in planting.admissible)  # the planting itself took
    assert all(cost[layer] > TOLERANCE * 2 for layer in planting.inadmissible)


def cancelling(seed: int) -> Any:
    """A Llama whose layer 1 adds a constant that layer 2 takes away; neither does anything else."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**toys.TEXT, mlp_bias=True)).eval()
    push = torch.randn(32) * 5
    for i, sign in ((1, 1.0), (2, -1.0)):
        layer = model.model.layers[i]
        scale(layer, 0.0, 0.0)
        with torch.no_grad():
            layer.mlp.down_proj.bias.copy_(sign * push)
    return model


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_a_band_is_judged_as_a_whole(seed: int) -> None:
    """Two layers that cancel: each alone is critical, both together can go."""
    model = adaskip.attach(cancelling(seed))
    data = toys.Toy(None, images=False, qwen=False)  # type: ignore[arg-type]
    fresh = measure_skips(model, batches(data, 2, 0))
    alone = judge(
        measure_skips(model, batches(data, 4, 1)), calibrate_prices(fresh, fresh.mass.mean(0), 0.1), "all", TOLERANCE
    )
    assert (alone.verdict(1), alone.verdict(2)) == ("inadmissible", "inadmissible")
    bands = [Band(1, 2), *late_entries(LAYERS), *early_exits(LAYERS)]
    fresh = measure_bands(model, batches(data, 2, 0), bands)
    judged = judge_bands(
        measure_bands(model, batches(data, 4, 1), bands),
        bands,
        calibrate_prices(fresh, fresh.mass.mean(0), 0.1),
        "all",
        TOLERANCE,
    )
    assert {found.band for found in judged if found.verdict == "admissible"} == {Band(1, 2)}
    assert [found.verdict for found in judged].count("inadmissible") == 6
    assert [row.layer for row in judged[0].rows] == [1, 1, 1]
    assert [row.n for row in judged[0].rows] == [128] * 3


def test_early_exit_of_vision_is_admissible_after_the_layer_that_reads_it() -> None:
    planting = picture("carrier, vision", 1)
    data = toys.Toy(None, images=True, qwen=False)  # type: ignore[arg-type]
    model = adaskip.attach(planting.model, RouterConfig(group="vision"))
    bands = [*late_entries(LAYERS), *early_exits(LAYERS)]
    fresh = measure_bands(model, batches(data, 2, 0), bands, attention=True)
    measured = measure_bands(model, batches(data, 4, 1), bands, attention=True)
    judged = judge_bands(measured, bands, calibrate_prices(fresh, fresh.mass.mean(0), 0.1), "vision", TOLERANCE)
    verdicts = {found.band.name(LAYERS): found.verdict for found in judged}
    assert {name for name, verdict in verdicts.items() if verdict == "admissible"} == {"early exit 2", "early exit 3"}
    assert {verdicts[f"late entry {k}"] for k in (2, 3)} == {"inadmissible"}
    assert verdicts["early exit 1"] == "inadmissible"


def test_a_band_of_one_layer_is_that_layer() -> None:
    model = adaskip.attach(toys.make("llama").model)
    data = batches(toys.Toy(None, images=False, qwen=False), 1, 0, rows=6)  # type: ignore[arg-type]
    single, banded = measure_skips(model, data), measure_bands(model, data, [Band(i, i) for i in range(LAYERS)])
    for name in ("cosine", "rho", "kl", "s", "u", "mass"):
        torch.testing.assert_close(getattr(banded, name), getattr(single, name), rtol=1e-4, atol=1e-6)
    with pytest.raises(ConfigError, match=r"expected bands within layers 0 to 3, got \[Band\(first=2, last=4\)\]"):
        measure_bands(model, data, [Band(2, 4)])
