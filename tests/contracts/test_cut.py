"""A path's layers cut out: an ordinary model that answers what the routed one does along that path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import StaticCache

import adaskip
from adaskip.backbone.load import load_backbone
from adaskip.errors import BackboneError, ConfigError
from adaskip.generate.plain import save_plain
from adaskip.plan import SkipPlan
from adaskip.policies.learned.config import RouterConfig
from adaskip.runtime.attach import RoutedModel, attach
from tests import families
from tests.families import LAYERS, TEXT, VISION, Toy
from tests.routing import GREEDY

PATH = torch.tensor([True, False, True, True])
INJECTED = [name for name in ("qwen3_vl", "qwen3_vl_moe") if name in VISION]


def routed(name: str, attention: str = "eager", **config: Any) -> tuple[Toy, RoutedModel]:
    toy = families.make(name, attention)
    return toy, attach(toy.model, RouterConfig(**config))


@pytest.mark.parametrize("name", sorted({*TEXT, *VISION} - {*INJECTED}))
@torch.no_grad()
def test_it_answers_as_the_routed_model_along_its_path(name: str) -> None:
    toy, model = routed(name)
    batch = toy.batch([9, 7])
    there = batch["attention_mask"].bool()
    wanted = model(**batch, routing=PATH[:, None].expand(-1, 2)).logits
    plain = adaskip.cut(model, PATH)
    found = plain(**batch).logits
    assert (found - wanted)[there].abs().max() <= 1e-4
    assert type(plain) is type(model.backbone)
    assert {id(weight) for weight in plain.parameters()} < {id(weight) for weight in model.backbone.parameters()}
    assert not any(weight.requires_grad for weight in (*plain.parameters(), *model.backbone.parameters()))
    assert torch.equal(model(**batch, routing=PATH[:, None].expand(-1, 2)).logits, wanted)


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen2_vl"])
def test_a_static_cache_holds_it(name: str) -> None:
    """Which no routed model can have; the routed model's tokens, padding on the left included."""
    toy, model = routed(name)
    batch = toy.batch([9, 7])
    options = {"max_new_tokens": 5, **GREEDY}
    wanted = model.generate(**batch, routing=PATH[:, None].expand(-1, 2), **options)
    told = model.routing
    plain = adaskip.cut(model, PATH.tolist())
    assert torch.equal(model.routing.keep, told.keep)
    found = plain.generate(**batch, cache_implementation="static", return_dict_in_generate=True, **options)
    assert isinstance(found.past_key_values, StaticCache)
    assert len(found.past_key_values.layers) == int(PATH.sum())
    assert torch.equal(found.sequences, wanted)


def test_the_path_of_a_plan_or_of_an_answer() -> None:
    toy = families.make("llama")
    model = attach(toy.model, SkipPlan.static([1]))
    batch = toy.batch([6])
    with torch.no_grad():
        wanted = model(**batch).logits
        assert torch.allclose(adaskip.cut(model)(**batch).logits, wanted, atol=1e-5)
        assert torch.allclose(adaskip.cut(model, SkipPlan.static([1]))(**batch).logits, wanted, atol=1e-5)
    model.detach()
    model = attach(toy.model)
    answer = model.generate_many([batch], max_new_tokens=2, **GREEDY).answers[0]
    assert adaskip.cut(model, answer.path).config.num_hidden_layers == sum(answer.path)


def test_what_cannot_be_cut_is_told() -> None:
    _, model = routed("llama")
    for path, told in (
        (None, "say which, such as path=answer.path"),
        ([False] * LAYERS, "expected at least one layer to stay"),
        ([True] * 3, r"expected a path of 4 booleans, got torch.bool of shape \(3,\)"),
        ([0, 1, 2, 3], r"got torch.int64"),
        (SkipPlan.static([0], unit="mlp"), "with unit 'mlp', group 'all' and phase 'both' a part of every layer"),
        (SkipPlan.static([0], unit="sublayers"), "unit 'sublayers', .* a part of every layer still runs or may run"),
        (SkipPlan.static([9]), "layer 9 is outside the model"),
    ):
        with pytest.raises(ConfigError, match=told):
            adaskip.cut(model, path)
    _, model = routed("llava", group="vision")
    with pytest.raises(ConfigError, match="group 'vision' and phase 'both' a part of every layer"):
        adaskip.cut(model, PATH)


@pytest.mark.parametrize("name", INJECTED)
def test_layers_that_pictures_are_added_after_stay(name: str) -> None:
    _, model = routed(name)
    with pytest.raises(BackboneError, match="adds its pictures to the states after each of its first"):
        adaskip.cut(model, [False, True, True, True])


@pytest.mark.gpu
@torch.no_grad()
def test_decoding_is_captured_as_one_cuda_graph() -> None:
    """Five tokens by replaying one captured step; those of the routed model."""
    toy, model = routed("llama", "sdpa")
    model.to("cuda")
    batch = {name: value.cuda() for name, value in toy.batch([6, 6]).items()}
    wanted = model.generate(**batch, routing=PATH[:, None].expand(-1, 2), max_new_tokens=6, **GREEDY)[:, 6:]
    plain = adaskip.cut(model, PATH)
    cache = StaticCache(config=plain.config, max_cache_len=16)
    never = torch.tensor(GREEDY["suppress_tokens"], device="cuda")

    def best(logits: torch.Tensor) -> torch.Tensor:
        return logits[:, -1:].index_fill(-1, never, -torch.inf).argmax(-1)

    token = best(plain(input_ids=batch["input_ids"], past_key_values=cache).logits)
    place = torch.full_like(token, 6)

    def step() -> torch.Tensor:
        return best(plain(input_ids=token, position_ids=place, past_key_values=cache).logits)

    found = [token.clone()]
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        found.append(step())
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    token.copy_(found[-1])
    place.add_(1)
    with torch.cuda.graph(graph):
        out = step()
    for _ in range(4):
        graph.replay()
        found.append(out.clone())
        token.copy_(out)
        place.add_(1)
    assert torch.equal(torch.cat(found, 1), wanted)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2_vl"])
@torch.no_grad()
def test_adapters_are_merged_into_it(name: str) -> None:
    """And into nothing else; catches updates that are lost, added twice or to the shared weights, or transposed."""
    pytest.importorskip("peft", reason="PEFT is an extra: pip install 'adaskip[peft]'")
    toy = families.make(name)
    model = attach(toy.model, SkipPlan.static([1]))
    adapters, batch = adaskip.adapt(model, adaskip.Lora(rank=2)), toy.batch([9, 7])
    frozen = model(**batch).logits
    for weight in adapters.parameters():
        weight.normal_(std=0.1)
    wanted, there = model(**batch).logits, batch["attention_mask"].bool()
    assert (wanted - frozen)[there].abs().max() > 1e-2
    plain = adaskip.cut(model)
    assert not [part for part in plain.modules() if "lora" in type(part).__module__]
    assert (plain(**batch).logits - wanted)[there].abs().max() <= 1e-4
    assert torch.equal(model(**batch).logits, wanted)
    with model.dense():
        dense = model(**batch).logits
    assert torch.equal(model.detach()(**batch).logits, dense)


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("llama", "gemma3", "qwen2_vl") else pytest.param(name, marks=pytest.mark.slow)
        for name in sorted({*TEXT, *VISION} - {*INJECTED})
    ],
)
def test_what_is_saved_of_it_is_read_as_an_ordinary_model(name: str, tmp_path: Path) -> None:
    """Or refused; catches a configuration that would give a model of other layers, and leaves nothing half-written."""
    toy = families.make(name)
    model = attach(toy.model, SkipPlan.static([1]))
    batch = toy.batch([9, 7])
    try:
        plain = save_plain(model, tmp_path / "plain")
    except BackboneError as error:
        assert "ship the routers instead" in str(error)  # noqa: PT017
        assert not [*tmp_path.iterdir()]
        return
    read = load_backbone(str(tmp_path / "plain")).eval()
    assert type(read) is type(toy.model)
    with torch.no_grad():
        there = batch["attention_mask"].bool()
        assert (read(**batch).logits - plain(**batch).logits)[there].abs().max() <= 1e-4
    assert "without layers 1" in (tmp_path / "plain" / "README.md").read_text()


def test_a_configuration_that_does_not_say_which_layers_are_left_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a folder that is handed out without having been read."""
    toy = families.make("llama")
    model = attach(toy.model, SkipPlan.static([1]))
    write = type(toy.model.config).save_pretrained

    def forget(config: Any, folder: Any, **options: Any) -> None:
        config.num_hidden_layers = LAYERS
        write(config, folder, **options)

    monkeypatch.setattr(type(toy.model.config), "save_pretrained", forget)
    with pytest.raises(BackboneError, match="ship the routers instead"):
        save_plain(model, tmp_path / "plain")
    assert not [*tmp_path.iterdir()]
