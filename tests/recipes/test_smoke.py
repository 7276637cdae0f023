"""Every shipped recipe runs whole: rehearsed on a small random backbone of its architecture, without a network."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig

from adaskip import cli
from adaskip.backbone.load import load_processor
from adaskip.backbone.published import published, read_config
from adaskip.errors import BackboneError, ConfigError
from adaskip.methods.evidence import Evidence
from adaskip.recipe import load, recipes
from adaskip.smoke.conversations import sentences
from adaskip.smoke.processors import make_tokenizer, special_ids
from adaskip.smoke.rehearsal import DATA, MODEL, RUN, rehearse
from adaskip.smoke.shrink import LAYERS, shrink
from adaskip.training.data import Collator, load_records

# one text model, one that sees, a mixture of experts, and one of each variant; the others take minutes together
QUICK = {
    "gemma3", "smolvlm", "olmoe", "llama3-lora", "qwen3-from-bounds", "llava-1.5-vision", "qwen3-tokens",
    "qwen2.5-vl-ddp", "smollm2-bank", "pyramid-drop",
}  # fmt: skip
NAMES = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in recipes()]


def call(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, Any]]:
    """Exit status and JSON of a command."""
    with pytest.raises(SystemExit) as stop:
        cli.main([*words, "--json"])
    return int(stop.value.code or 0), json.loads(capsys.readouterr().out.splitlines()[-1])


def test_all_recipes_are_found() -> None:
    """49 recipes in four folders; catches a folder that the search does not enter, and a quick one that is gone."""
    assert len(recipes()) == 49
    assert {path.parent.name for path in recipes().values()} == {"recipes", "policies", "models", "variants"}
    assert recipes().keys() >= QUICK


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_runs_whole(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trained, checked, exported, and asked one question, as its first lines say and with nothing from a network.

    Catches a recipe whose keys do not fit one another or its architecture, a processor that does not match the model,
    and a rehearsal that leaves a section of the recipe out.
    """
    recipe = load(name)
    if recipe.method == "gm_skip":  # goes by right answers, of which a random model has none
        monkeypatch.setattr(Evidence, "accuracy", lambda _, paths: torch.full((len(paths),), 0.5, dtype=torch.float64))
    status, done = call(capsys, "train", name, "--smoke", f"output={tmp_path / 'a'}")
    assert (status, done["ok"]) == (0, True), done
    run = tmp_path / "a-smoke" / RUN
    assert done["folder"] == str(run)
    rehearsed = load(run / "recipe.resolved.yaml")
    assert (rehearsed.method, rehearsed.router.scope, rehearsed.router.group) == (
        recipe.method, recipe.router.scope, recipe.router.group,
    )  # fmt: skip
    assert (rehearsed.lora is None) == (recipe.lora is None)
    status, checked = call(capsys, "check", str(run))
    assert status == (0 if checked["verdict"] == "hold" else 1)
    status, exported = call(capsys, "export", str(run), str(tmp_path / "out"))
    assert status == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(exported["files"])
    status, answered = call(capsys, "generate", str(run), "--example", "0", "--max-new-tokens", "3")
    assert status == 0
    assert 0 < answered["keep"] < 1.5
    assert answered["layers"] == LAYERS


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a rehearsal asked for a network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


PUBLISHED = [name for name in published() if "/smollm2" not in name]


def small(name: str) -> PreTrainedConfig:
    """The configuration of a rehearsal's backbone."""
    large = read_config(name)
    tokenizer = make_tokenizer(large, sentences())
    return shrink(large, len(tokenizer), special_ids(large, tokenizer))


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_rehearsal_has_the_architecture_of_the_recipe(name: str) -> None:
    """Only sizes shrink: model type, activation, tied embeddings, kinds of layers, experts and sharing of heads stay.

    Catches a rehearsal that would train another model than the recipe's.
    """
    before, after = read_config(name), small(name)
    assert after.model_type == before.model_type
    old, new = before.get_text_config(), after.get_text_config()
    assert new.num_hidden_layers == LAYERS < old.num_hidden_layers
    same = ("model_type", "hidden_act", "tie_word_embeddings", "attention_bias", "rms_norm_eps", "norm_topk_prob")
    for key in same:
        assert getattr(new, key, None) == getattr(old, key, None), key
    assert set(getattr(new, "layer_types", None) or ()) == set(getattr(old, "layer_types", None) or ())
    assert (new.num_key_value_heads == new.num_attention_heads) == (old.num_key_value_heads == old.num_attention_heads)
    assert (getattr(old, "num_experts", 0) > 1) == (getattr(new, "num_experts", 0) > 1)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_build_a_model_of_the_published_count(name: str) -> None:
    """To one part in a thousand of the parameters that the model's page states; catches a wrong size or a tied head."""
    config = read_config(name)
    sees = type(config) in AutoModelForImageTextToText._model_mapping
    with torch.device("meta"):
        model = (AutoModelForImageTextToText if sees else AutoModelForCausalLM).from_config(config)
    millions = sum(weight.numel() for weight in model.parameters()) / 1e6
    assert millions == pytest.approx(published()[name]["parameters"], rel=1e-3)


@pytest.mark.parametrize("torchvision", [False, True])
def test_a_processor_without_videos_takes_pictures(
    torchvision: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loaded again, with torchvision or without, it still makes pictures.

    Catches the silent change to a tokenizer that takes text only, and a folder without a part for videos that cannot be
    loaded on the next machine, which could make one.
    """
    monkeypatch.setattr("adaskip.backbone.load.is_torchvision_available", lambda: torchvision)
    recipe = rehearse(load("qwen2.5-vl", {"output": str(tmp_path / "a")}))
    folder = Path(recipe.backbone.path)
    processor = load_processor(str(folder))
    assert type(processor).__name__ == "Qwen2_5_VLProcessor"
    batch = Collator(processor)(load_records(recipe.data.source, "train", 2, 0))
    assert batch.inputs["pixel_values"].shape[0] == batch.inputs["image_grid_thw"].prod(1).sum()
    processor.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "processor_config.json").read_text())["processor_class"] == (
        "Qwen2_5_VLProcessor"
    )


def test_a_rehearsal_replaces_an_earlier_one_and_nothing_else(tmp_path: Path) -> None:
    """Twice is once; a folder with a file of the user's is left alone, and told.

    Catches a rehearsal that stops at its own leavings, and one that deletes what it has not made.
    """
    recipe = load("causal-lm", {"output": str(tmp_path / "a")})
    again = [rehearse(recipe) for _ in range(2)]
    assert again[0] == again[1]
    folder = tmp_path / "a-smoke"
    assert {path.name for path in folder.iterdir()} == {MODEL, DATA}
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"a-smoke: expected nothing there, .* found notes.txt; choose another"):
        rehearse(recipe)
    assert (folder / "notes.txt").read_text() == "mine"
    with pytest.raises(ConfigError, match="--smoke: expected a new run in one process; leave out --resume"):
        rehearse(recipe, resume=True)


def test_an_architecture_that_cannot_be_rehearsed(tmp_path: Path) -> None:
    """Its name, and what to do instead; catches a traceback out of a library."""
    config = CONFIG_MAPPING["paligemma"]()
    config.save_pretrained(tmp_path / "model")
    recipe = load("causal-lm", {"output": str(tmp_path / "a"), "backbone.path": str(tmp_path / "model")})
    with pytest.raises(BackboneError, match=r"--smoke: how the processor of paligemma is made .* trainer.steps=4"):
        rehearse(recipe)
