"""PEFT adapters and routers on one model: attached, trained, merged, detached, saved."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import adaskip
from adaskip.errors import BackboneError
from tests.routed_toys import answers, batch, llama, routed, spread

peft = pytest.importorskip("peft", reason="PEFT is an extra: pip install 'adaskip[peft]'")


def lora(model: Any, started: bool = True, **options: Any) -> Any:
    """Adapters that change the model at once, or as yet not at all."""
    torch.manual_seed(1)
    targets = ["q_proj", "v_proj", "down_proj"]
    config = peft.LoraConfig(
        r=4, target_modules=targets, init_lora_weights=not started, task_type="CAUSAL_LM", **options
    )
    return peft.get_peft_model(model, config).eval()


def trainable(model: Any) -> set[str]:
    return {name for name, weight in model.named_parameters() if weight.requires_grad}


def test_attach_to_a_peft_model() -> None:
    """Somebody attaches to a PeftModel; catches a refusal, and a PeftModel that does not follow the routing."""
    wrapped = lora(llama())
    model = spread(adaskip.attach(wrapped))
    assert model.backbone is wrapped.get_base_model()
    routed_answers = answers(model)
    assert not bool(model.routing.keep.all())
    assert torch.equal(answers(wrapped), routed_answers)
    assert not torch.equal(routed_answers, answers(routed()))
    with wrapped.disable_adapter():
        assert torch.equal(answers(wrapped), answers(routed()))
    model.detach()
    assert torch.equal(answers(wrapped), answers(lora(llama())))


def test_adapters_beside_the_weights_are_refused() -> None:
    """Somebody attaches to prompt tuning, whose tokens stand outside the model; catches routes that never see them."""
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    wrapped = peft.get_peft_model(llama(), config)
    with pytest.raises(BackboneError, match="PROMPT_TUNING puts tokens or keys of its own before the prompt"):
        adaskip.attach(wrapped)


@pytest.mark.parametrize("when", ["training", "inference"])
def test_detach_leaves_adapters_alone(when: str) -> None:
    """LoRA was added while routers were on; catches a detach() that turns LoRA off and the base on for training."""
    model = spread(adaskip.attach(llama()))
    wrapped = lora(model.backbone)
    if when == "training":
        wrapped.train()
    else:
        wrapped.requires_grad_(False)
    before, modes = trainable(wrapped), [module.training for module in wrapped.modules()]
    model.detach()
    assert trainable(wrapped) == before
    assert [module.training for module in wrapped.modules()] == modes
    assert all("lora_" in name for name in before)


def test_detach_restores_an_adapted_model() -> None:
    """Routers come and go on a LoRA model in training; catches adapters that stay frozen."""
    wrapped = lora(llama()).train()
    before = trainable(wrapped)
    model = adaskip.attach(wrapped)
    assert not trainable(wrapped)
    model.detach()
    assert trainable(wrapped) == before
    assert all(module.training for module in wrapped.get_base_model().modules())


def test_detach_restores_what_it_changed_and_nothing_else() -> None:
    """Half a model trained, some parts in eval(); catches a detach() that sets all of it alike."""
    model = llama().train()
    model.model.embed_tokens.requires_grad_(False)
    model.model.layers[1].eval()
    before, modes = trainable(model), [module.training for module in model.modules()]
    adaskip.attach(model).detach()
    assert trainable(model) == before
    assert [module.training for module in model.modules()] == modes

    handle = adaskip.attach(model)
    model.lm_head.requires_grad_(True)  # somebody decides anew what trains
    handle.detach()
    assert trainable(model) == {"lm_head.weight"}


def test_routers_of_an_adapted_model_on_the_merged_one(tmp_path) -> None:
    """Routers are trained on LoRA and deployed on the merged model; catches 'trained on another backbone'."""
    wrapped = lora(llama())
    model = spread(adaskip.attach(wrapped))
    expected = answers(model)
    model.save_pretrained(tmp_path)
    model.detach()
    merged = wrapped.merge_and_unload()
    assert torch.equal(answers(adaskip.RoutedModel.from_pretrained(tmp_path, merged)), expected)


ADAPTERS = {
    "dora": lambda: peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], use_dora=True),
    "loha": lambda: peft.LoHaConfig(r=4, target_modules=["q_proj", "v_proj"]),
    "ia3": lambda: peft.IA3Config(target_modules=["v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "embedding": lambda: peft.LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"]),
    "tokens": lambda: peft.LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[3, 4]),
    "head": lambda: peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_every_kind_of_adapter_counts_as_merged(kind: str, tmp_path) -> None:
    """Other adapters than LoRA are merged before deployment; catches a fingerprint made for one kind alone."""
    wrapped = peft.get_peft_model(llama(), ADAPTERS[kind]()).eval()
    with torch.no_grad():
        for weight in wrapped.parameters():
            if weight.requires_grad:
                weight.add_(0.1)
    spread(adaskip.attach(wrapped)).save_pretrained(tmp_path)
    with pytest.raises(BackboneError, match="another backbone: weights"):
        adaskip.RoutedModel.from_pretrained(tmp_path, llama())
    merged = peft.get_peft_model(llama(), ADAPTERS[kind]()).eval()
    merged.load_state_dict(wrapped.state_dict())
    adaskip.RoutedModel.from_pretrained(tmp_path, merged.merge_and_unload())


def test_routers_of_a_model_on_its_adapted_self(tmp_path) -> None:
    """Routers meet base and LoRA; the same while LoRA does nothing, another backbone once it does."""
    routed().save_pretrained(tmp_path)
    adaskip.RoutedModel.from_pretrained(tmp_path, lora(llama(), started=False))
    wrapped = lora(llama())
    with pytest.raises(BackboneError, match=r"another backbone: weights: \d+ of \d+ differ, such as .*q_proj\.weight"):
        adaskip.RoutedModel.from_pretrained(tmp_path, wrapped)
    with wrapped.disable_adapter():
        adaskip.RoutedModel.from_pretrained(tmp_path, wrapped).detach()
    saved = lora(llama(), modules_to_save=["lm_head"])
    with torch.no_grad():
        saved.get_base_model().lm_head.modules_to_save["default"].weight.add_(0.1)
    with pytest.raises(BackboneError, match="weights: 13 of"):
        adaskip.RoutedModel.from_pretrained(tmp_path, saved)


def test_merging_while_attached() -> None:
    """merge_and_unload() under routers; catches layers that lose their routing."""
    wrapped = lora(llama())
    model = spread(adaskip.attach(wrapped))
    expected = answers(model)
    assert wrapped.merge_and_unload() is model.backbone
    assert torch.equal(answers(model), expected)


def test_taking_a_fingerprint_changes_nothing() -> None:
    """Saving merges copies of single layers; catches adapters merged in place, or copies of the whole model."""
    wrapped = lora(llama(), modules_to_save=["lm_head"])
    model = spread(adaskip.attach(wrapped))
    expected, weights = answers(model), {name: weight.clone() for name, weight in wrapped.named_parameters()}
    from adaskip.runtime.fingerprint import fingerprint

    taken = fingerprint(model.spec)
    assert sorted(taken.samples) == sorted(name for name, _ in llama().named_parameters())
    assert all(torch.equal(weights[name], weight) for name, weight in wrapped.named_parameters())
    assert torch.equal(answers(model), expected)
    assert model(**batch()).logits.shape[0] == 2


def test_an_adapter_around_a_routed_sublayer_is_refused() -> None:
    """PEFT trains a copy of each MLP, put in under routers; catches a copy that runs whatever is decided."""
    model = adaskip.attach(llama(), adaskip.RouterConfig(unit="mlp"))
    inputs = batch()
    model(**inputs)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["mlp"], task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(model.backbone, config).eval()
    with pytest.raises(
        BackboneError, match=r"layer 0: its LlamaMLP was put into a ModulesToSaveWrapper .* attach again"
    ):
        model(**inputs)
    model.detach()
    with wrapped.disable_adapter():
        torch.testing.assert_close(wrapped(**inputs).logits, llama()(**inputs).logits)
