"""What a recipe is estimated to need: sizes by hand, and memory beside what autograd really keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import adaskip
from adaskip.backbone.footprint import measure_footprint
from adaskip.backbone.published import read_config
from adaskip.errors import BackboneError
from adaskip.recipe import load, recipes
from adaskip.runtime.lora import Lora
from adaskip.verbs.estimate import Estimate, _kept, estimate, try_estimate
from tests import memory
from tests.tuning import with_answers


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No backbone lies here that would be taken instead of the published sizes."""
    monkeypatch.chdir(tmp_path)


def test_sizes_of_a_dense_model_and_of_a_mixture() -> None:
    """By hand: a Llama layer's matrices, and of OLMoE's 64 experts the 8 that a token meets.

    Catches sizes of a vision tower taken for the decoder's, and a mixture counted as if a token met every expert.
    """
    llama = measure_footprint(read_config("meta-llama/Llama-3.1-8B-Instruct"))
    layer = 4096 * (4096 + 1024 + 1024 + 4096) + 3 * 4096 * 14336 + 2 * 4096
    assert (llama.decoder, llama.active, llama.layers, llama.attention) == (32 * layer, 32 * layer, 32, 4096)
    assert (llama.inner, llama.vocabulary) == (14336, 128256)
    mixture = measure_footprint(read_config("allenai/OLMoE-1B-7B-0924-Instruct"))
    outside = 4 * 2048**2 + 64 * 2048 + 4 * 2048
    expert = 3 * 2048 * 1024
    assert (mixture.decoder, mixture.active) == (16 * (outside + 64 * expert), 16 * (outside + 8 * expert))
    assert mixture.inner == 8 * 1024
    sees = measure_footprint(read_config("google/gemma-3-4b-it"))
    assert (sees.layers, sees.width, sees.attention, sees.inner) == (34, 2560, 2048, 10240)


def test_adapters_are_counted_where_they_stand() -> None:
    """Of two modules by hand; of all, as many as peft would adapt in the decoder, and none of a vision tower."""
    size = measure_footprint(read_config("meta-llama/Llama-3.1-8B-Instruct"))
    assert size.adapters(8, ("q_proj", "v_proj")) == 32 * 8 * (4096 + 4096 + 4096 + 1024)
    assert size.adapters(1, ()) > size.adapters(1, ("q_proj", "v_proj"))
    recipe = load("llama3-lora")
    assert recipe.lora == Lora(targets=("q_proj", "v_proj"))
    bare = estimate(load(recipe, {"lora": None}), timed=False)
    assert estimate(recipe, timed=False).trained - bare.trained == 16 * size.adapters(8, ("q_proj", "v_proj"))


def kept(layers: int, rows: int, tokens: int) -> int:
    """Bytes of all that autograd keeps of one training step's routed pass, weights apart."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 352, "num_attention_heads": 4, "vocab_size": 64}
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, max_position_embeddings=256, **sizes)).eval()
    routed = adaskip.attach(model, adaskip.RouterConfig(hidden=4))
    batch = with_answers(
        {"input_ids": torch.randint(3, 60, (rows, tokens)), "attention_mask": torch.ones(rows, tokens).long()}
    )
    weights = {weight.untyped_storage().data_ptr() for weight in routed.parameters()}
    found: dict[int, Any] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage  # held, so that no other takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), routed.soft():
        routed(**batch.arguments())
    return sum(storage.nbytes() for storage in found.values())


def test_a_layer_keeps_what_is_estimated() -> None:
    """Of two more layers, beside what autograd saves in a soft pass: within a fifth.

    Catches a part that is forgotten, such as the MLP's, and bytes taken for numbers.
    """
    rows, tokens = 4, 64
    measured = (kept(4, rows, tokens) - kept(2, rows, tokens)) / 2 / rows / tokens
    config = LlamaConfig(hidden_size=128, intermediate_size=352, num_attention_heads=4, vocab_size=64)
    assert _kept(measure_footprint(config), 4) == pytest.approx(measured, rel=0.2)


def test_a_gpu_has_a_fifth_to_spare() -> None:
    """Catches a GPU that the estimate alone would just fit into, and a size that no GPU has."""
    assert Estimate(1, int(16e9 / 1.2) - 1, 0, 0, 0, 1.0, 0.0).gpu == 16
    assert Estimate(1, int(16e9 / 1.2) + 2, 0, 0, 0, 1.0, 0.0).gpu == 24
    assert Estimate(1, int(500e9), 0, 0, 0, 1.0, 0.0).gpu is None


def test_memory_follows_the_recipe() -> None:
    """Rows and tokens count once each; no activations are kept where no gradient goes through the model."""
    once, twice = (estimate(load("llama3", {"trainer.batch_size": rows}), timed=False) for rows in (1, 2))
    assert (twice.activations, twice.logits, twice.weights) == (2 * once.activations, 2 * once.logits, once.weights)
    longer = estimate(load("llama3", {"trainer.batch_size": 1, "data.max_tokens": 4096}), timed=False)
    assert longer.activations == twice.activations
    fitted = estimate(load("qwen3-from-bounds", {"trainer.batch_size": 1}), timed=False)
    tuned = estimate(load("qwen3", {"trainer.batch_size": 1}), timed=False)
    assert fitted.activations < tuned.activations / 10
    timed = estimate(load("digits-vlm"))
    assert timed.steps_an_hour is not None
    assert timed.steps_an_hour == pytest.approx(3600 * 0.5 * timed.rate / timed.flops)


@pytest.mark.parametrize("name", recipes())
def test_every_recipe_says_what_its_estimate_says(name: str) -> None:
    """`python -m tests.memory` writes the line; catches settings that were changed without it."""
    text = recipes()[name].read_text(encoding="utf-8")
    assert text.split("\n")[2] == memory.line(name)
    assert memory.filled(name, text) == text


def test_no_estimate_is_no_fault(tmp_path: Path) -> None:
    """A backbone that cannot be reached is told as missing; catches `validate` failing for want of a network."""
    recipe = load("causal-lm", {"backbone.path": str(tmp_path / "none")})
    assert "its configuration cannot be read" in try_estimate(recipe)["missing"]
    with pytest.raises(BackboneError, match=r"llama: cannot be built from its configuration \("):
        measure_footprint(LlamaConfig(hidden_size=32, num_attention_heads=4, hidden_act="none such"))
