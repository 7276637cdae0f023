"""Routers meet their backbone again in another precision, fine-tuned, with more tokens, or from an older adaskip."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import adaskip
from adaskip.errors import BackboneError, CheckpointError
from tests.routed_toys import answers, llama, routed, spread

PRECISIONS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def extreme(seed: int = 0) -> Any:
    """A model with weights that float16 rounds, cannot tell from zero, or cannot hold."""
    model = llama(seed).to(torch.bfloat16)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight.mul_(1e-6)
        model.model.layers[0].mlp.down_proj.weight.view(-1)[0] = 3e38
    return model


@pytest.mark.parametrize("after", PRECISIONS)
@pytest.mark.parametrize("before", PRECISIONS)
def test_a_checkpoint_is_known_in_every_precision(before: torch.dtype, after: torch.dtype, tmp_path) -> None:
    """Routers are trained in bfloat16 and used in float16; catches 'trained on another backbone'."""
    adaskip.attach(extreme().to(before)).save_pretrained(tmp_path)
    adaskip.RoutedModel.from_pretrained(tmp_path, extreme().to(after))
    with pytest.raises(BackboneError, match="another backbone: weights: "):
        adaskip.RoutedModel.from_pretrained(tmp_path, extreme(seed=1).to(after))


@pytest.mark.parametrize(("after", "change"), [(torch.float32, 1e-6), (torch.bfloat16, 0.02), (torch.float16, 0.02)])
def test_a_fine_tuned_copy_is_another_backbone(after: torch.dtype, change: float, tmp_path) -> None:
    """Routers meet a fine-tuned copy; catches a tolerance wider than what the precisions round."""
    routed().save_pretrained(tmp_path)
    tuned = llama()
    with torch.no_grad():
        tuned.model.layers[2].self_attn.v_proj.weight.mul_(1 + change)
    with pytest.raises(BackboneError, match=r"weights: 1 of 39 differ, such as model\.layers\.2\.self_attn\.v_proj"):
        adaskip.RoutedModel.from_pretrained(tmp_path, tuned.to(after))
    with pytest.warns(UserWarning, match="another backbone") as caught:
        adaskip.RoutedModel.from_pretrained(tmp_path, tuned, strict=False)
    assert caught[0].filename == __file__


@pytest.mark.parametrize("size", [104, 90])
def test_a_resized_vocabulary_is_the_same_backbone(size: int, tmp_path) -> None:
    """A padding token was added after training; catches a refusal, and a vocabulary that is not looked at."""
    routed().save_pretrained(tmp_path)
    base = llama()
    base.resize_token_embeddings(size)
    with pytest.warns(UserWarning, match=f"a vocabulary of 96, and this backbone's is {size}; .* agree"):
        adaskip.RoutedModel.from_pretrained(tmp_path, base)
    other = llama(seed=1)
    other.resize_token_embeddings(size)
    with pytest.raises(BackboneError, match=f"vocabulary: 96 expected, {size} found; weights: "):
        adaskip.RoutedModel.from_pretrained(tmp_path, other)


def old_routers(model: adaskip.RoutedModel, folder: Path) -> None:
    """What adaskip 0.1 wrote, format 1: a hash of values rounded to bfloat16, and the routers' weights alone."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.backbone.named_parameters()):
        flat = weight.detach().reshape(-1)
        picks = torch.linspace(0, flat.numel() - 1, min(8, flat.numel()), dtype=torch.float64).long()
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        digest.update(flat[picks].to(torch.bfloat16).view(torch.int16).numpy().tobytes())
    backbone = {"name": "", "class": "LlamaForCausalLM", "model_type": "llama", "layers": 4, "width": 32}
    backbone |= {"vocabulary": 96, "weights": digest.hexdigest()[:32]}
    router = {"scope": "prompt", "unit": "block", "group": "all", "kv": "absent", "hidden": 64, "keep_bias": 2.0}
    router |= {"threshold": 0.0, "held": []}
    meta = {"format": 1, "adaskip": "0.1.0", "backbone": backbone, "router": router, "facts": {}, "certificate": None}
    folder.mkdir(exist_ok=True)
    (folder / "adaskip_config.json").write_text(json.dumps(meta))
    save_file(model.routers.state_dict(), folder / "router.safetensors")


MEANS = adaskip.RouterConfig(features="mean")
"""What routers of adaskip 0.1 read, and their files do not say."""


def test_routers_of_format_1_are_read(tmp_path) -> None:
    """Routers saved by an earlier adaskip; catches an upgrade that loses them, or stops checking them."""
    old_routers(spread(adaskip.attach(llama(), MEANS)), tmp_path)
    for precision in (torch.float32, torch.bfloat16):
        adaskip.RoutedModel.from_pretrained(tmp_path, llama().to(precision))
    expected = spread(adaskip.attach(llama(), MEANS))
    assert torch.equal(answers(adaskip.RoutedModel.from_pretrained(tmp_path, llama())), answers(expected))
    with pytest.raises(BackboneError, match=r"another backbone: weights: hash '\w+' expected, '\w+' found"):
        adaskip.RoutedModel.from_pretrained(tmp_path, llama(seed=1))
    adaskip.RoutedModel.from_pretrained(tmp_path, llama()).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adaskip_config.json").read_text())["format"] == 3


def test_routers_of_format_1_in_float16(tmp_path) -> None:
    """A hash of bfloat16 values cannot be made of float16 ones; catches 'another backbone' where it is the same."""
    old_routers(spread(adaskip.attach(extreme(), MEANS)), tmp_path / "bfloat16")
    with pytest.warns(UserWarning, match="cannot be made in this precision.*save the routers anew"):
        adaskip.RoutedModel.from_pretrained(tmp_path / "bfloat16", extreme().to(torch.float16))
    old_routers(spread(adaskip.attach(extreme().to(torch.float16), MEANS)), tmp_path / "float16")
    adaskip.RoutedModel.from_pretrained(tmp_path / "float16", extreme())
    with pytest.raises(BackboneError, match="another backbone"):
        adaskip.RoutedModel.from_pretrained(tmp_path / "float16", extreme(seed=1))


def test_a_newer_format_says_upgrade(tmp_path) -> None:
    """Routers saved by a later adaskip; catches a guess at what they mean."""
    routed().save_pretrained(tmp_path)
    config = tmp_path / "adaskip_config.json"
    config.write_text(config.read_text().replace('"format": 3', '"format": 5'))
    with pytest.raises(CheckpointError, match="format 5, this adaskip reads formats 1 to 4; upgrade adaskip"):
        adaskip.RoutedModel.from_pretrained(tmp_path, llama())


def test_the_weights_file_holds_routers_and_samples(tmp_path) -> None:
    """Somebody opens the weights file; catches backbone weights that are saved whole."""
    routed().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "router.safetensors")
    assert {name for name in tensors if not name.startswith("backbone.")} == set(routed().policy.state_dict())
    assert all(value.numel() <= 8 for name, value in tensors.items() if name.startswith("backbone."))
