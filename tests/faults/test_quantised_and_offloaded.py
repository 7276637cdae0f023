"""Backbones whose weights are quantised, or kept on the host or on disk until they are needed."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import adaskip
from adaskip.errors import BackboneError
from tests import families
from tests.routed_toys import answers, batch, llama, routed, spread


def int8(seed: int = 0) -> Any:
    torchao = pytest.importorskip("torchao.quantization", reason="torchao quantises; it is no dependency")
    model = llama(seed)
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    return model


def packed(seed: int = 0) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(llama(seed), {torch.nn.Linear}, dtype=torch.qint8)


def on_host(seed: int = 0) -> Any:
    accelerate = pytest.importorskip("accelerate", reason="accelerate offloads; it is no dependency")
    return accelerate.cpu_offload(llama(seed), execution_device="cpu")


def on_disk(folder: Any, seed: int = 0) -> Any:
    pytest.importorskip("accelerate", reason="accelerate offloads; it is no dependency")
    llama(seed).save_pretrained(folder / "model")
    places = dict.fromkeys(["model.embed_tokens", "model.norm", "lm_head", "model.rotary_emb"], "cpu")
    places |= {f"model.layers.{index}": "disk" if index else "cpu" for index in range(4)}
    return AutoModelForCausalLM.from_pretrained(
        folder / "model", device_map=places, offload_folder=str(folder / "offloaded")
    ).eval()


QUANTISED = {"int8": int8, "packed": packed}


@pytest.mark.parametrize("kind", QUANTISED)
def test_quantised_backbones_save_and_load(kind: str, tmp_path) -> None:
    """Routers on an int8 model; said at attach, saved, loaded with a warning; catches an error after training."""
    base = QUANTISED[kind]()
    with pytest.warns(UserWarning, match="cannot be read as numbers|weights are packed"):
        model = spread(adaskip.attach(base))
    expected = answers(model)
    model.save_pretrained(tmp_path)
    model.detach()
    with pytest.warns(UserWarning, match=r"\d+ of \d+ weights could not be compared .* the others agree") as caught:
        again = adaskip.RoutedModel.from_pretrained(tmp_path, base)
    assert caught[0].filename == __file__
    assert torch.equal(answers(again), expected)


@pytest.mark.parametrize("kind", QUANTISED)
def test_routers_pass_between_full_precision_and_quantised(kind: str, tmp_path) -> None:
    """Trained in full precision, deployed in int8, and the other way; catches 'damaged' and 'another backbone'."""
    routed().save_pretrained(tmp_path / "full")
    with pytest.warns(UserWarning, match="weights could not be compared"):
        model = adaskip.RoutedModel.from_pretrained(tmp_path / "full", QUANTISED[kind]())
    assert answers(model).shape[0] == 2
    model.save_pretrained(tmp_path / "quantised")
    with pytest.warns(UserWarning, match="weights could not be compared"):
        back = adaskip.RoutedModel.from_pretrained(tmp_path / "quantised", llama())
    assert torch.equal(answers(back), answers(routed()))


@pytest.mark.parametrize("kind", QUANTISED)
def test_another_quantised_model_is_still_refused(kind: str, tmp_path) -> None:
    """Routers meet another model in int8; catches a check that quantisation switches off altogether."""
    routed().save_pretrained(tmp_path)
    with pytest.raises(BackboneError, match=r"another backbone: weights: .* differ, such as model\.embed_tokens"):
        adaskip.RoutedModel.from_pretrained(tmp_path, QUANTISED[kind](seed=1))
    other = QUANTISED[kind]()
    other.config.vocab_size = 95
    with pytest.raises(BackboneError, match="another backbone: vocabulary: 96 expected, 95 found"):
        adaskip.RoutedModel.from_pretrained(tmp_path, other)


@pytest.mark.parametrize("where", ["host", "disk"])
def test_offloaded_backbones_are_like_any_other(where: str, tmp_path) -> None:
    """A model larger than memory; catches routers on device meta, and fingerprints of weights that are not there."""
    model = on_host() if where == "host" else on_disk(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        attached = spread(adaskip.attach(model))
        assert attached.device == torch.device("cpu")
        assert {weight.device.type for weight in attached.routers.parameters()} == {"cpu"}
        assert torch.equal(answers(attached), answers(routed()))
        attached.save_pretrained(tmp_path / "routers")
        assert torch.equal(answers(attached.detach()), answers(llama()))
        again = adaskip.RoutedModel.from_pretrained(tmp_path / "routers", llama())  # every weight was compared
        assert torch.equal(answers(again), answers(routed()))
        again = adaskip.RoutedModel.from_pretrained(tmp_path / "routers", model)
        assert torch.equal(answers(again), answers(routed()))
    with pytest.raises(BackboneError, match="another backbone"):
        adaskip.RoutedModel.from_pretrained(tmp_path / "routers", on_host(seed=1))


def test_offloading_under_routers() -> None:
    """A routed model is offloaded, trained, detached; catches hooks lost by detach, and weights that stay frozen."""
    accelerate = pytest.importorskip("accelerate", reason="accelerate offloads; it is no dependency")
    model = routed()
    accelerate.cpu_offload(model.backbone, execution_device="cpu")
    assert torch.equal(answers(model), answers(routed()))
    model.train()
    inputs = batch()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert sum(float(weight.grad.abs().sum()) for weight in model.routers.parameters()) > 0
    assert torch.equal(answers(model.detach()), answers(llama()))
    assert all(weight.requires_grad for weight in model.backbone.parameters())


def test_offloaded_layers_are_watched_before_routing() -> None:
    """Falcon's layers return tuples; catches an offloaded one that was not run before a skip."""
    accelerate = pytest.importorskip("accelerate", reason="accelerate offloads; it is no dependency")
    toy = families.make("falcon", "sdpa")
    inputs = toy.batch([5, 9])
    plan = adaskip.SkipPlan.static([0])
    expected = adaskip.attach(families.make("falcon", "sdpa").model, plan)(**inputs).logits
    offloaded = accelerate.cpu_offload(toy.model, execution_device="cpu")
    torch.testing.assert_close(adaskip.attach(offloaded, plan)(**inputs).logits, expected)


def test_accelerate_prepares_a_routed_model() -> None:
    """A script of one's own trains the routers under accelerate; catches routers that get no gradient."""
    accelerate = pytest.importorskip("accelerate", reason="accelerate prepares; it is no dependency")
    accelerator = accelerate.Accelerator(cpu=True)
    model = routed().train()
    optimizer = torch.optim.AdamW(model.routers.parameters(), lr=1e-2)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    before = [weight.clone() for weight in model.routers.parameters()]
    inputs = batch()
    accelerator.backward(prepared(**inputs, labels=inputs["input_ids"]).loss)
    optimizer.step()
    assert accelerator.unwrap_model(prepared) is model
    assert any(not torch.equal(one, two) for one, two in zip(before, model.routers.parameters(), strict=True))


def test_hooks_removed_under_routers() -> None:
    """accelerate's hooks are removed after attach, and take our forwards with them; catches layers that run dense."""
    accelerate = pytest.importorskip("accelerate", reason="accelerate offloads; it is no dependency")
    base = accelerate.dispatch_model(llama(), {"": "cpu"}, force_hooks=True)
    model = spread(adaskip.attach(base))
    assert torch.equal(answers(model), answers(routed()))
    accelerate.hooks.remove_hook_from_module(base, recurse=True)
    with pytest.raises(BackboneError, match=r"layer \d: its LlamaDecoderLayer got another forward .* attach again"):
        answers(model)
    bare = model.detach()
    assert torch.equal(answers(bare), answers(llama()))
    assert torch.equal(answers(spread(adaskip.attach(bare))), answers(routed()))
