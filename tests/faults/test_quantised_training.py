"""Backbones of 8 and 4 bits, on which routers, and adapters beside them, are trained, saved and loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import adaskip
from adaskip.backbone.quantise import quantisation
from adaskip.errors import ConfigError
from adaskip.recipe import load
from adaskip.verbs import run
from tests.tuning import DATA, loader, trainer, weights

BITS = ("8bit", "4bit")


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama whose layers are wide enough to be cut into blocks of 64 weights."""
    torch.manual_seed(0)
    shape = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4}
    config = LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, initializer_range=0.1)
    folder = tmp_path_factory.mktemp("stored")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("lora", [False, True], ids=["routers", "adapters too"])
@pytest.mark.parametrize("bits", BITS)
def test_routers_and_adapters_learn_and_come_back(bits: str, lora: bool, stored: Path, tmp_path: Path) -> None:
    """Would catch: no gradient through codes, adapters that learn nothing on them, another model after loading."""
    pytest.importorskip("bitsandbytes", reason="quantises; an extra: pip install 'adaskip[quantise]'")
    if lora:
        pytest.importorskip("peft", reason="PEFT is an extra: pip install 'adaskip[peft]'")

    def base() -> AutoModelForCausalLM:
        return AutoModelForCausalLM.from_pretrained(stored, quantization_config=quantisation(bits), dtype="float32")  # type: ignore[arg-type]

    assert base().get_memory_footprint() < 0.6 * LlamaForCausalLM.from_pretrained(stored).get_memory_footprint()
    model = adaskip.attach(base())
    if lora:
        adaskip.adapt(model, adaskip.Lora(rank=2))
    tuner = adaskip.RouterTuner(model, adaskip.Objective(bound_weight=0.0), learning_rate=0.03)
    before = weights(tuner).clone()
    with model.dense(), torch.no_grad():
        dense = model(**DATA[5].arguments()).logits
    trainer(tmp_path, steps=3).fit(tuner, loader(DATA[:3]))
    assert (weights(tuner) - before).abs().max() > 1e-2
    assert not lora or any(v.any() for name, v in model.adapters.state_dict().items() if "lora_B" in name)
    model.eval().save_pretrained(tmp_path / "router")
    again = adaskip.RoutedModel.from_pretrained(tmp_path / "router", base())
    with torch.no_grad():
        assert torch.equal(again(**DATA[5].arguments()).logits, model(**DATA[5].arguments()).logits)
        with again.dense():
            assert torch.equal(again(**DATA[5].arguments()).logits, dense)


@pytest.mark.parametrize("bits", BITS)
def test_a_recipe_loads_it_so(bits: str, stored: Path) -> None:
    """Would catch a key that nothing reads."""
    pytest.importorskip("bitsandbytes", reason="quantises; an extra: pip install 'adaskip[quantise]'")
    loaded = run.load_model(load("causal-lm", [f"backbone.path={stored}", f"backbone.quantise={bits}"]))
    assert getattr(loaded, f"is_loaded_in_{bits}")


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch a traceback out of transformers, behind minutes of loading."""
    monkeypatch.setattr("adaskip.backbone.quantise.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"quantise 4bit: needs bitsandbytes .*pip install 'adaskip\[quantise\]'"):
        run.load_model(load("digits-vlm", ["backbone.quantise=4bit"]))
