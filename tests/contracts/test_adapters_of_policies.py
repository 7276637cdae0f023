"""Adapters that heal: active in routed passes alone, whoever asks, and gone without a trace."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import adaskip
from adaskip.backbone.weights import effective_weights
from adaskip.errors import CheckpointError, ConfigError
from adaskip.survey.record import record
from tests import families, toys
from tests.routing import LENGTHS, same_both_ways
from tests.tuning import with_answers

pytest.importorskip("peft", reason="PEFT is an extra: pip install 'adaskip[peft]'")


def healed(model: Any, policy: Any, **lora: Any) -> adaskip.RoutedModel:
    """A routed model whose adapters change it."""
    routed = adaskip.attach(model, policy)
    draw = torch.Generator().manual_seed(0)
    for weight in adaskip.adapt(routed, adaskip.Lora(**{"rank": 4} | lora)).parameters():
        weight.data.normal_(std=0.1, generator=draw)
    return routed


@torch.no_grad()
def logits_of(model: Any, batch: Any) -> Tensor:
    return model(**batch.arguments()).logits


SOME = ("llama", "gemma2", "gpt2", "mixtral", "llava", "qwen2_vl")


@pytest.mark.parametrize(
    "name",
    [
        name if name in SOME else pytest.param(name, marks=pytest.mark.slow)
        for name in sorted({*families.TEXT, *families.VISION})
    ],
)
def test_dense_passes_stay_the_original(name: str) -> None:
    """Bitwise, with adapters that move routed passes; catches ones that dense passes run, or that outlive detach."""
    toy = families.make(name)
    batch = toy.batch(LENGTHS)
    with torch.no_grad():
        before = toy.model(**batch).logits
    model = healed(toy.model, adaskip.SkipPlan.static([1]))
    with torch.no_grad():
        routed = model(**batch).logits
        with model.dense():
            assert torch.equal(model(**batch).logits, before)
        weights = [weight.clone() for weight in model.adapters.parameters()]
        for weight in model.adapters.parameters():
            weight.zero_()
        plain = model(**batch).logits
        for weight, value in zip(model.adapters.parameters(), weights, strict=True):
            weight.copy_(value)
    assert not torch.equal(routed, plain)
    names = {name for name, _ in families.make(name).model.named_parameters()}
    inner = model.detach()
    assert {name for name, _ in inner.named_parameters()} == names
    with torch.no_grad():
        assert torch.equal(inner(**batch).logits, before)


@pytest.mark.parametrize(
    ("name", "policy"),
    [
        ("llama", adaskip.SkipPlan.static([1, 2])),
        ("llama", adaskip.SkipPlan.static([1], unit="mlp")),
        ("llava", adaskip.SkipPlan.static([1, 2], group="vision")),
        ("llava", adaskip.SkipPlan.static([1, 2], group="vision", kv="kept")),
    ],
    ids=["all", "mlp", "vision", "kept"],
)
def test_every_way_of_running_has_them(name: str, policy: Any) -> None:
    """Training, skipping, cached and uncached agree, adapters included."""
    toy = families.make(name, "eager")
    same_both_ways(healed(toy.model, policy), toy.collate(toy.rows(LENGTHS)))


def test_what_never_runs_gets_none() -> None:
    """A plan's layers, which would learn nothing; catches adapters that only take memory."""
    model = healed(toys.make("llama").model, adaskip.SkipPlan.static([1, 2]))
    assert {name.split(".")[2] for name in model.adapters.modules} == {"0", "3"}
    model.detach()
    model = healed(model.backbone, adaskip.SkipPlan.static([1, 2], phase="decode"))
    assert {name.split(".")[2] for name in model.adapters.modules} == {"0", "1", "2", "3"}


def test_threads_do_not_disturb_one_another() -> None:
    """One thread asks the dense model while another asks the routed one; catches a switch that is the process's."""
    toy = toys.make("llama", seed=3)
    batch = with_answers(toy.batch([5, 9, 3, 7]))
    model = healed(toy.model, adaskip.SkipPlan.static([1]))
    routed = logits_of(model, batch)
    with model.dense():
        dense = logits_of(model, batch)
    wrong: list[str] = []

    def ask(name: str, expected: Tensor) -> None:
        for _ in range(30):
            if name == "dense":
                with model.dense():
                    found = logits_of(model, batch)
            else:
                found = logits_of(model, batch)
            if not torch.equal(found, expected):
                wrong.append(name)

    threads = [threading.Thread(target=ask, args=pair) for pair in (("dense", dense), ("routed", routed))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_reruns_have_the_adapters_that_the_recorded_pass_had() -> None:
    """What is left out of a dense pass is priced without; catches prices of a healed model."""
    toy = toys.make("llama", seed=3)
    batch = with_answers(toy.batch([5, 9, 3, 7]))
    model = healed(toy.model, adaskip.RouterConfig())
    keep = torch.ones(4, 4, dtype=torch.bool)
    keep[2] = False
    with torch.no_grad():
        whole = model(**batch.arguments(), routing=keep).logits[:, :-1][batch.supervised]
    assert torch.allclose(record(model, batch, routed=True).rerun(keep), whole, atol=1e-5)
    frozen = adaskip.attach(toys.make("llama", seed=3).model, adaskip.RouterConfig())
    with torch.no_grad():
        plain = frozen(**batch.arguments(), routing=keep).logits[:, :-1][batch.supervised]
    assert torch.allclose(record(model, batch).rerun(keep), plain, atol=1e-5)


def test_they_are_saved_with_the_policy(tmp_path: Path) -> None:
    """Loaded they answer alike, and the backbone is known in spite of them; catches a fingerprint that counts them."""
    toy = toys.make("llama", seed=3)
    batch = with_answers(toy.batch([5, 9, 3, 7]))
    model = healed(toy.model, adaskip.SkipPlan.static([1]))
    weights = dict(effective_weights(model.backbone))
    model.save_pretrained(tmp_path)
    routed = logits_of(model, batch)
    inner = model.detach()
    plain = dict(effective_weights(inner))
    assert weights.keys() == plain.keys()
    assert all(torch.equal(weights[name], plain[name]) for name in plain)
    loaded = adaskip.RoutedModel.from_pretrained(tmp_path, inner)
    assert torch.equal(logits_of(loaded, batch), routed)
    assert loaded.adapters.lora == adaskip.Lora(rank=4)


def test_a_file_without_adapters_is_read_by_older_versions(tmp_path: Path) -> None:
    """Its format is the one of before; catches a number that locks everybody out."""
    model = adaskip.attach(toys.make("llama").model, adaskip.SkipPlan.static([1]))
    model.save_pretrained(tmp_path / "plain")
    assert '"format": 3' in (tmp_path / "plain" / "adaskip_config.json").read_text()
    adaskip.adapt(model)
    model.save_pretrained(tmp_path / "healed")
    assert '"format": 4' in (tmp_path / "healed" / "adaskip_config.json").read_text()


def test_their_flops_count_where_they_run() -> None:
    """2 r (in + out) for every linear module and token that runs it; none in a layer that is left."""
    toy = toys.make("llama", seed=3)
    batch = with_answers(toy.batch([5, 9, 3, 7]))
    model = adaskip.attach(toy.model, adaskip.RouterConfig())
    keep = torch.ones(4, 4, dtype=torch.bool)
    keep[2, 1] = False
    logits = model(**batch.arguments(), routing=keep)
    before, dense = model.routing.executed, model.routing.dense
    adapters = adaskip.adapt(model, adaskip.Lora(rank=3, targets=("q_proj", "down_proj")))
    model(**batch.arguments(), routing=keep)
    sizes = [module.weight.shape for name, module in adapters.modules.items() if name.startswith("model.layers.0.")]
    tokens = batch.inputs["attention_mask"].sum(1).double()
    layers = torch.tensor([4.0, 3.0, 4.0, 4.0])
    expected = 2 * 3 * sum(sum(size) for size in sizes) * tokens * layers
    assert torch.allclose(model.routing.executed - before, expected)
    assert torch.equal(model.routing.dense, dense)
    assert logits is not None


def test_what_cannot_be_adapted_is_refused(tmp_path: Path) -> None:
    model = adaskip.attach(toys.make("llama").model, adaskip.SkipPlan.static([1]))
    with pytest.raises(ConfigError, match=r"Lora: targets: expected some of down_proj, .* got q_prj"):
        adaskip.adapt(model, adaskip.Lora(targets=("q_prj",)))
    with pytest.raises(ConfigError, match="AdapterTuner: expected a RoutedModel with adapters"):
        adaskip.AdapterTuner(model)
    with pytest.raises(ConfigError, match=r"Lora: rank: expected an integer >= 1, got 0; dropout: .* got 1"):
        adaskip.Lora(rank=0, dropout=1)
    adapters = adaskip.adapt(model)
    with pytest.raises(ConfigError, match="this model has adapters already"):
        adaskip.adapt(model)
    state = adapters.state_dict()
    state.popitem()
    with pytest.raises(CheckpointError, match="adapters: expected 42 weights of rank 8, got 41"):
        adapters.load_state_dict(state)
    adapters.remove()
    assert model.adapters is None
    other = replace(adapters.lora, rank=2)
    assert adaskip.adapt(model, other).lora.rank == 2  # as the refusal said
    assert not any("lora" in name for name, _ in model.detach().named_parameters())


def test_healed_drafts_are_verified_by_the_dense_model() -> None:
    """Lossless decoding: tokens are the original model's; catches a verification that has the adapters too."""
    toy = toys.make("llama", seed=3)
    batch = toy.batch([5, 9, 3, 7])
    options = {"max_new_tokens": 12, "do_sample": False}
    expected = toy.model.generate(**batch, **options)
    model = healed(toy.model, adaskip.SkipPlan.static([1]))
    assert torch.equal(model.generate(**batch, **options, lossless=3), expected)
    assert not torch.equal(model.generate(**batch, **options), expected)
    assert model.adapters is not None


def test_dropout_leaves_inputs_out_in_training_alone() -> None:
    """Catches dropout that is never on, that stays on, or that draws from elsewhere than its seed."""
    toy = toys.make("llama")
    model, inputs = healed(toy.model, adaskip.SkipPlan.static([1]), dropout=0.5), with_answers(toy.batch([5, 4]))
    assert model.adapters is not None
    plain = logits_of(model, inputs)
    torch.manual_seed(0)
    drawn = torch.rand(3)
    torch.manual_seed(0)
    found = []
    for seed in (1, 1, 2):
        with model.adapters.dropping(seed):
            found.append(logits_of(model, inputs))
    assert torch.equal(torch.rand(3), drawn), "the draws of others have moved"
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert not torch.equal(found[0], plain)
    assert torch.equal(logits_of(model, inputs), plain)
