"""Folders that cannot be written or read, that hold something else, or that two processes write at once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import adaskip
from adaskip.errors import CheckpointError, ConfigError
from adaskip.plan import SkipPlan
from adaskip.policies import Policy
from adaskip.runtime import persist
from tests.routed_toys import answers, llama, routed


def load(folder: Any, model: Any = None) -> adaskip.RoutedModel:
    return adaskip.RoutedModel.from_pretrained(folder, llama() if model is None else model)


def test_a_file_where_a_folder_belongs(tmp_path) -> None:
    """Somebody passes the file instead of its folder; catches a traceback, and advice to pass what was passed."""
    routed().save_pretrained(tmp_path / "routers")
    config = tmp_path / "routers" / "adaskip_config.json"
    with pytest.raises(CheckpointError, match=r"expected a folder of saved routers, got a file; pass .*routers$"):
        load(config)
    with pytest.raises(CheckpointError, match=r"the routers cannot be written here .*; choose another folder"):
        routed().save_pretrained(config)


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full or read-only after training; catches a traceback, and half a file left behind."""
    routed().save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def refuse(self: Path, content: bytes) -> int:
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(CheckpointError, match="No space left on device"):
        routed(seed=1).save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_folder_that_is_not_here() -> None:
    """Somebody mistypes a path; catches a search on the Hub for what can only be a folder."""
    with pytest.raises(CheckpointError, match="no such folder here; of a Hugging Face repository write user/name"):
        load("runs/none/router")


def test_a_readme_of_something_else_is_left_alone(tmp_path) -> None:
    """Somebody saves into their project's folder; catches their README overwritten by a model card."""
    (tmp_path / "README.md").write_text("# My project")
    with pytest.warns(
        UserWarning, match=r"README\.md: left as it is, because it is no model card of adaskip"
    ) as caught:
        routed().save_pretrained(tmp_path)
    assert caught[0].filename == __file__
    assert (tmp_path / "README.md").read_text() == "# My project"
    assert torch.equal(answers(load(tmp_path)), answers(routed()))


def test_two_saves_at_once_do_not_mix(tmp_path) -> None:
    """Two processes save into one folder; catches the configuration of one beside the weights of the other."""
    routed().save_pretrained(tmp_path / "one")
    routed(seed=1).save_pretrained(tmp_path / "two")
    shutil.copy(tmp_path / "two" / "router.safetensors", tmp_path / "one" / "router.safetensors")
    with pytest.raises(CheckpointError, match=r"not saved together with adaskip_config\.json"):
        load(tmp_path / "one")


def test_an_unfinished_save_of_somebody_else_is_not_touched(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second save begins before the first is done; catches two writers of one temporary file."""
    first = persist.write
    seen: list[str] = []

    def watch(path: Path, content: bytes) -> None:
        replace = Path.replace
        monkeypatch.setattr(Path, "replace", lambda part, target: seen.append(part.name) or replace(part, target))
        first(path, content)
        monkeypatch.setattr(Path, "replace", replace)

    monkeypatch.setattr(persist, "write", watch)
    routed().save_pretrained(tmp_path)
    routed().save_pretrained(tmp_path)
    assert len(set(seen)) == len(seen) == 6
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([persist.CARD, persist.CONFIG, persist.WEIGHTS])


def test_weights_of_another_shape(tmp_path) -> None:
    """The configuration was edited by hand; catches a traceback, and a model that stays patched."""
    routed().save_pretrained(tmp_path)
    config = tmp_path / "adaskip_config.json"
    meta = json.loads(config.read_text()) | {"trained": None}
    meta["policy"]["settings"]["hidden"] = 32
    config.write_text(json.dumps(meta))
    model = llama()
    with pytest.raises(
        CheckpointError,
        match=r"not of this configuration: heads\.0\.inner\.bias: expected \(32,\), got \(64,\), and 11",
    ):
        load(tmp_path, model)
    assert torch.equal(answers(model), answers(llama()))
    assert all(weight.requires_grad for weight in model.parameters())


def test_an_interrupted_load_leaves_the_model_untouched(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while the weights are compared; catches a model that stays patched and frozen."""

    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    routed().save_pretrained(tmp_path)
    monkeypatch.setattr(persist, "check_fingerprint", interrupt)
    model = llama()
    with pytest.raises(KeyboardInterrupt):
        load(tmp_path, model)
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert all(weight.requires_grad for weight in model.parameters())


def test_weights_that_are_no_numbers_of_this_file(tmp_path) -> None:
    """The weights were written by another tool; catches routers that load without their check."""
    routed().save_pretrained(tmp_path)
    weights = tmp_path / "router.safetensors"
    save_file(load_file(weights), weights)
    with pytest.raises(CheckpointError, match="damaged, or not saved together"):
        load(tmp_path)
    (tmp_path / "router.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="damaged"):
        load(tmp_path)


def test_a_plan_comes_back(tmp_path) -> None:
    """Somebody saves a model that follows a plan; catches an empty folder, and routers in its place."""
    model = adaskip.attach(llama(), SkipPlan(skip=(1,), leave=3, unit="attention"))
    expected = answers(model)
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert again.policy.plan == SkipPlan(skip=(1,), leave=3, unit="attention")
    assert again.routers is None
    assert torch.equal(answers(again), expected)
    assert "A policy of the kind `static`" in (tmp_path / "README.md").read_text()


def test_a_policy_that_nobody_registered(tmp_path) -> None:
    """Somebody saves a policy of their own without registering it; catches a file that nothing can read."""

    class Nameless(Policy):
        def known(self, layers: int) -> torch.Tensor:
            return torch.arange(layers) != 1

    model = adaskip.attach(llama(), Nameless())
    answers(model)
    assert model.routing.keep[:, 0].tolist() == [True, False, True, True]
    with pytest.raises(ConfigError, match=r"Nameless is no registered policy, .*@adaskip\.policies\.register"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_thresholds_may_be_edited_by_hand(tmp_path) -> None:
    """Somebody changes the threshold in the JSON file; catches a checksum that forbids it."""
    routed().save_pretrained(tmp_path)
    config = tmp_path / "adaskip_config.json"
    meta = json.loads(config.read_text())
    meta["policy"]["threshold"] = -1.0
    config.write_text(json.dumps(meta))
    assert load(tmp_path).policy.threshold == -1.0


def test_a_backbone_without_a_name_has_to_be_passed(tmp_path) -> None:
    """The backbone was built in memory; catches advice about the name of a repository."""
    routed().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"built in memory .* RoutedModel\.from_pretrained\(folder, backbone\)"):
        adaskip.RoutedModel.from_pretrained(tmp_path)
