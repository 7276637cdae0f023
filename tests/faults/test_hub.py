"""Routers go to the Hugging Face Hub with their card and come back by id and revision, through the Hub's own client."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import adaskip
from adaskip.backbone.load import load_backbone
from adaskip.errors import CheckpointError, ConfigError
from adaskip.plan import SkipPlan
from adaskip.verbs.export import export
from tests.hub_server import Hub, hub
from tests.routed_toys import batch, llama, routed


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with hub(monkeypatch, tmp_path / "cache") as running:
        yield running


def route(model: adaskip.RoutedModel) -> torch.Tensor:
    model(**batch())
    return model.routing.keep


def test_routers_come_back_by_id(server: Hub) -> None:
    """Would catch: a card that loads from a folder nobody has, other files than three, routers of another revision."""
    first, second = routed(), routed(seed=0)
    second.set_threshold(0.7)
    address = first.push_to_hub("me/routers", private=True)
    assert address == f"{server.url}/me/routers"
    assert server.private == {"me/routers": True}
    held = server.commits["me/routers"][server.branches["me/routers"]["main"]]
    assert set(held) == {"adaskip_config.json", "router.safetensors", "README.md"}
    assert 'from_pretrained("me/routers")' in held["README.md"].decode()
    assert "library_name: adaskip" in held["README.md"].decode()
    assert server.messages == ["Upload routers"]
    before = server.branches["me/routers"]["main"]
    second.push_to_hub("me/routers", commit_message="Another threshold")
    second.set_threshold(-0.4)
    second.push_to_hub("me/routers", revision="careful")

    now = adaskip.RoutedModel.from_pretrained("me/routers", llama())
    assert now.policy.threshold == 0.7
    past = adaskip.RoutedModel.from_pretrained("me/routers", llama(), revision=before)
    assert past.policy.threshold == first.policy.threshold
    assert torch.equal(route(past), route(first))
    other = adaskip.RoutedModel.from_pretrained(llama(), "me/routers", revision="careful")
    assert other.policy.threshold == -0.4


def test_what_the_hub_says_is_said(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch: a traceback of the client's where a name, a revision, the key or the network is wrong."""
    with pytest.raises(CheckpointError, match=r"me/none: no such folder here, and no such repository on the Hub"):
        adaskip.RoutedModel.from_pretrained("me/none", llama())
    model = routed()
    model.push_to_hub("me/routers")
    with pytest.raises(CheckpointError, match=r"me/routers: has no revision 'v9' on the Hub; leave it out"):
        adaskip.RoutedModel.from_pretrained("me/routers", llama(), revision="v9")
    with pytest.raises(ConfigError, match=r"as USER/NAME, such as me/routers, got 'routers'"):
        model.push_to_hub("routers")
    with pytest.raises(ConfigError, match=r"from_pretrained: dtype would load a backbone, but one is given already"):
        adaskip.RoutedModel.from_pretrained("me/routers", llama(), revision="main", dtype="auto")
    server.status = 401
    with pytest.raises(
        CheckpointError, match=r"me/routers: the upload failed \(.*401.*\); where it is the key: hf auth"
    ):
        model.push_to_hub("me/routers")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"the Hub cannot be reached, and its cache holds nothing"):
        adaskip.RoutedModel.from_pretrained("me/others", llama())


def test_a_folder_here_comes_before_the_hub(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch: ``runs/mine``, which lies here, looked for on the Hub, where it may be somebody else's."""
    monkeypatch.chdir(tmp_path)
    model = routed()
    model.push_to_hub("runs/mine")
    model.set_threshold(0.3)
    model.save_pretrained("runs/mine")
    assert adaskip.RoutedModel.from_pretrained("runs/mine", llama()).policy.threshold == 0.3


def test_exports_are_uploaded(server: Hub, run: Path, tmp_path: Path) -> None:
    """Would catch: an export that is lost, or called complete, where its upload fails."""
    done = export(run, tmp_path / "out", push="me/digits", revision="v1")
    assert done.url == f"{server.url}/me/digits"
    held = server.commits["me/digits"][server.branches["me/digits"]["v1"]]
    assert {name: (tmp_path / "out" / name).read_bytes() for name in done.files} == held
    assert 'from_pretrained("me/digits")' in held["README.md"].decode()
    server.status = 403
    with pytest.raises(
        CheckpointError, match=r"upload failed .*; the export lies whole in .*: hf upload me/other .*late"
    ):
        export(run, tmp_path / "late", push="me/other")
    assert (tmp_path / "late" / "router.safetensors").is_file()
    with pytest.raises(ConfigError, match="as USER/NAME"):
        export(run, tmp_path / "never", push="other")
    assert not (tmp_path / "never").exists()


def test_a_cut_model_is_uploaded_as_an_ordinary_one(server: Hub, run: Path, tmp_path: Path) -> None:
    """Would catch: weights left out, or a card that asks for adaskip."""
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    adaskip.attach(load_backbone("digits-vlm"), SkipPlan(skip=[3, 7])).save_pretrained(copy / "router")
    done = export(copy, tmp_path / "cut", cut=True, push="me/cut")
    held = server.commits["me/cut"][server.branches["me/cut"]["main"]]
    assert {"config.json", "model.safetensors", "README.md"} <= set(held) == set(done.files)
    assert "library_name: transformers" in held["README.md"].decode()
