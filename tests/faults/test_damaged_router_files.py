"""`adaskip_config.json` edited, cut short or written by something else: told before a model is touched."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import adaskip
from adaskip.errors import CheckpointError, ConfigError
from adaskip.runtime.description import read_config
from adaskip.verbs.export import export
from tests.routed_toys import answers, llama, routed


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = folder / "adaskip_config.json"
    meta = json.loads(config.read_text())
    config.write_text(json.dumps(change(meta) or meta))


def load(folder: Path, model: Any = None) -> adaskip.RoutedModel:
    return adaskip.RoutedModel.from_pretrained(folder, llama() if model is None else model)


@pytest.mark.parametrize(
    ("section", "name", "value", "text"),
    [
        ("policy", "held", "abc", r"policy: expected layer numbers such as \[1, 3\], got 'abc'"),
        ("policy", "held", None, "policy: expected layer numbers"),
        ("settings", "hidden", "64", "policy: RouterConfig: hidden: expected an integer, got '64'"),
        ("policy", "threshold", None, "policy: expected a finite number, got None"),
        ("policy", "kind", "learnt", "policy: policy 'learnt': no such kind, did you mean 'learned'"),
        ("settings", "scope", "all", "policy: RouterConfig: scope: expected prompt . token, got 'all'"),
        ("settings", "colour", 1, "policy: RouterConfig: colour: no such field"),
        ("backbone", "name", None, "backbone.name: expected str, got None"),
        ("backbone", "vocabulary", "96", "backbone.vocabulary: expected int, got '96'"),
        ("backbone", "layers", None, "backbone.layers: expected int, got None"),
        ("backbone", "quantised", None, "backbone.quantised: expected bool, got None"),
        (None, "policy", [], r"policy: expected an object, got \[\]"),
        ("policy", "settings", [], r"policy: RouterConfig: expected a dictionary of fields, got \[\]"),
        (None, "backbone", None, "backbone: expected an object, got None"),
        (None, "format", "2", "format: expected 1 to 4, got '2'"),
        (None, "format", None, "format: expected 1 to 4, got None"),
        (None, "format", True, "format: expected 1 to 4, got True"),
        (None, "facts", 3, "facts: expected an object, got 3"),
        (None, "certificate", "yes", "certificate: expected an object, got 'yes'"),
    ],
)
def test_values_that_are_wrong(section: str | None, name: str, value: Any, text: str, tmp_path: Path) -> None:
    """A value was edited by hand; catches TypeError and KeyError, and a file that loads and fails at the first call."""
    routed().save_pretrained(tmp_path)
    parts = {"settings": lambda meta: meta["policy"]["settings"], None: lambda meta: meta}
    edit(tmp_path, lambda meta: parts.get(section, lambda meta: meta[section])(meta).update({name: value}))
    model = llama()
    with pytest.raises(CheckpointError, match=rf"adaskip_config\.json: damaged \(.*{text}.*\); export the routers"):
        load(tmp_path, model)
    assert torch.equal(answers(model), answers(llama()))


@pytest.mark.parametrize("name", ["format", "backbone", "policy"])
def test_keys_that_are_missing(name: str, tmp_path: Path) -> None:
    """A part of the file is gone; catches a KeyError."""
    routed().save_pretrained(tmp_path)
    edit(tmp_path, lambda meta: meta.pop(name) and None)
    with pytest.raises(CheckpointError, match=rf"damaged \({name}: expected"):
        load(tmp_path)
    edit(tmp_path, lambda meta: [meta])
    with pytest.raises(CheckpointError, match=r"damaged \(expected an object, got list\)"):
        load(tmp_path)


@pytest.mark.parametrize(("name", "value"), [("scope", "token"), ("unit", "mlp"), ("hidden", 32), ("keep_bias", 1.0)])
def test_settings_that_the_weights_were_not_trained_for(name: str, value: Any, tmp_path: Path) -> None:
    """Somebody tries another scope by hand; catches routers that decide about something they never saw."""
    routed().save_pretrained(tmp_path)
    edit(tmp_path, lambda meta: meta["policy"]["settings"].update({name: value}))
    text = "policy: changed since the routers were trained; of it only threshold and held may be changed by hand"
    with pytest.raises(CheckpointError, match=text):
        load(tmp_path)
    edit(tmp_path, lambda meta: meta["policy"]["settings"].pop(name) and None)
    if name == "keep_bias":  # what is missing has its default
        assert torch.equal(answers(load(tmp_path)), answers(routed()))


def test_files_of_older_versions_and_free_settings(tmp_path: Path) -> None:
    """Routers were saved before settings were signed, or get another threshold; catches a check that shuts them out."""
    routed().save_pretrained(tmp_path)
    edit(tmp_path, lambda meta: meta["policy"].update({"threshold": -1.0, "held": [2]}))
    assert load(tmp_path).policy.held == (2,)
    edit(tmp_path, lambda meta: meta.pop("trained") and None)
    assert load(tmp_path).policy.threshold == -1.0
    assert read_config(tmp_path)["format"] == 3


def test_a_backbone_in_a_folder_is_found_from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative path to the backbone is saved; catches routers that load from one folder alone."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    llama().save_pretrained("bb")
    adaskip.attach(type(llama()).from_pretrained("bb")).save_pretrained("routers")
    assert f"base_model: {tmp_path}" not in (tmp_path / "routers" / "README.md").read_text()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert adaskip.RoutedModel.from_pretrained("../routers").backbone.config._name_or_path == str(tmp_path / "bb")
    (tmp_path / "bb").rename(tmp_path / "moved")
    with pytest.raises(CheckpointError, match=r"bb'.*if it has moved, .* RoutedModel\.from_pretrained\(folder, backb"):
        adaskip.RoutedModel.from_pretrained("../routers")


def test_routers_that_were_quantised_with_the_model(tmp_path: Path) -> None:
    """Somebody quantises the RoutedModel itself; catches a RuntimeError about storage after the fact."""
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is no requirement")
    model = routed()
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    with pytest.raises(ConfigError, match=r"routers are quantised .*; quantise the backbone alone: quantize_\(model"):
        model.save_pretrained(tmp_path / "routers")
    assert not (tmp_path / "routers").exists()
    model = routed()
    torchao.quantize_(model.backbone, torchao.Int8WeightOnlyConfig())
    model.save_pretrained(tmp_path / "routers")


def test_damaged_routers_are_not_shipped(tmp_path: Path) -> None:
    """`adaskip export` of routers whose file was cut short; catches an export that only its user finds damaged."""
    folder, out = tmp_path / "router", tmp_path / "out"
    routed().save_pretrained(folder)
    (folder / "README.md").unlink()
    assert "router.safetensors" in export(folder, out).files
    weights = folder / "router.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="damaged"):
        export(folder, tmp_path / "again")
    assert not (tmp_path / "again").exists()
