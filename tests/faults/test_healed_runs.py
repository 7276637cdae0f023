"""`adaskip heal`: a finished run gets adapters, in one go or after a stop, and every verb takes it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor
from typer.testing import CliRunner

import adaskip
from adaskip.cli import app
from adaskip.errors import ConfigError
from adaskip.training.data import load_records
from adaskip.training.healing import AdapterTuner
from tests.faults.finished import copy_of
from tests.keys_of import keys_of

pytest.importorskip("peft", reason="PEFT is an extra: pip install 'adaskip[peft]'")

KEYS = json.loads(Path(__file__).with_name("json_keys.json").read_text())["heal"]
SMALL: dict[str, Any] = {"steps": 6, "batch_size": 8, "checkpoint_every": 2, "learning_rate": 1e-3, "task_weight": 0.5}


def planned(run: Path, folder: Path) -> Path:
    """A copy of the run that leaves four layers out, at some cost."""
    copied = copy_of(run, folder)
    base = adaskip.RoutedModel.from_pretrained(copied / "router").detach()
    adaskip.attach(base, adaskip.SkipPlan.static([3, 4, 7, 8])).save_pretrained(copied / "router")
    return copied


def test_a_healed_run_is_nearer_to_the_dense_model(run: Path, tmp_path: Path) -> None:
    """By its own figures and by `eval`; catches adapters that are trained and not saved, or counted for nothing."""
    folder = planned(run, tmp_path / "run")
    before = (folder / "router" / "router.safetensors").read_bytes()
    found = adaskip.heal(folder, **SMALL)
    assert json.dumps(keys_of(json.loads(json.dumps(found.to_dict())))) == json.dumps(KEYS)
    assert found.ok
    assert found.saved["estimate"] == pytest.approx(found.before["kl"] - found.after["kl"])
    assert found.before["keep"] < found.after["keep"] < found.before["keep"] + 0.3  # what adapters compute is counted
    assert (folder / "healing" / "router" / "router.safetensors").read_bytes() == before
    assert json.loads((folder / "healing" / "healing.json").read_text())["after"] == found.after
    judged = adaskip.evaluate(folder, split="validation", per_kind=4).to_dict()
    assert judged["mean"]["routed_accuracy"] is not None
    adaskip.export(folder, tmp_path / "shipped")
    model = adaskip.RoutedModel.from_pretrained(tmp_path / "shipped")
    assert model.adapters is not None
    assert model.facts["healed_steps"] == 6
    _check_cut(folder, model, tmp_path / "plain")
    for again in (SMALL, SMALL | {"steps": 8}):  # which must not be told to remove the routers as they were
        with pytest.raises(ConfigError, match=r"healed already; to heal it anew, put .*healing/router in the place of"):
            adaskip.heal(folder, **again)
    assert (folder / "healing" / "router" / "router.safetensors").read_bytes() == before


def _check_cut(folder: Path, model: adaskip.RoutedModel, place: Path) -> None:
    """What `export --cut` writes answers as the healed run does, with nothing of adaskip in it."""
    found = CliRunner().invoke(app, ["export", str(folder), str(place), "--cut", "--json"])
    assert found.exit_code == 0, found.output
    plain = AutoModelForImageTextToText.from_pretrained(place).eval()
    collate = adaskip.Collator(AutoProcessor.from_pretrained(place))
    batch = collate(load_records("digits-vlm", "test", 8, 0))
    with torch.no_grad():
        wanted = model(**batch.arguments()).logits[:, :-1][batch.supervised]
        assert (plain(**batch.inputs).logits[:, :-1][batch.supervised] - wanted).abs().max() < 1e-3
    assert plain.config.get_text_config().num_hidden_layers == 8


def test_a_run_of_routers_has_no_layers_to_cut_out(run: Path, tmp_path: Path) -> None:
    """Routers choose for every prompt: a sentence, and nothing written."""
    with pytest.raises(ConfigError, match="routers choose a path for every prompt"):
        adaskip.export(run, tmp_path / "plain", cut=True)
    assert not [*tmp_path.iterdir()]


def test_a_healing_that_was_stopped_goes_on(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in step 5 it repeats from checkpoint 4 on, and ends with the adapters of one in one go.

    Catches a start from nothing, batches that are read twice, and a schedule that begins anew.
    """
    whole = planned(run, tmp_path / "whole")
    adaskip.heal(whole, **SMALL)
    folder, train_one, trained = planned(run, tmp_path / "run"), AdapterTuner.training_step, []

    def step(self: AdapterTuner, batch: Any, batch_idx: int) -> Any:
        if self.global_step == 5 and 5 not in trained:
            trained.append(5)
            raise OSError("the disk is gone")
        trained.append(self.global_step)
        return train_one(self, batch, batch_idx)

    monkeypatch.setattr(AdapterTuner, "training_step", step)
    with pytest.raises(OSError, match="the disk is gone"):
        adaskip.heal(folder, **SMALL)
    assert not (folder / "healing" / "router").exists()
    with pytest.raises(ConfigError, match=r"begun with another steps \(6, now 8\); ask for the same"):
        adaskip.heal(folder, **SMALL | {"steps": 8})
    saved, other = folder / "router", tmp_path / "other"
    saved.rename(other)  # another policy in its place, such as one with a threshold of `adaskip calibrate`
    base = adaskip.RoutedModel.from_pretrained(other).detach()
    adaskip.attach(base, adaskip.SkipPlan.static([3, 4, 7])).save_pretrained(saved)
    with pytest.raises(ConfigError, match=r"begun with another policy \('\w+', now '\w+'\); ask for the same"):
        adaskip.heal(folder, **SMALL)
    shutil.rmtree(saved)
    other.rename(saved)
    del trained[:-1]
    adaskip.heal(folder, **SMALL)
    assert trained == [5, 4, 5]
    expected, resumed = (load_file(f / "router" / "router.safetensors") for f in (whole, folder))
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)


def test_a_start_that_failed_may_be_asked_for_otherwise(run: Path, tmp_path: Path) -> None:
    """Somebody mistypes a module, and then types it right; catches settings that a start without a step has left."""
    folder = planned(run, tmp_path / "run")
    with pytest.raises(ConfigError, match="Lora: targets: expected some of"):
        adaskip.heal(folder, **SMALL, lora=adaskip.Lora(targets=("q_prj",)))
    assert adaskip.heal(folder, **SMALL | {"steps": 2}, lora=adaskip.Lora(targets=("q_proj",))).parameters > 0


def test_settings_out_of_range_are_refused_before_anything_is_written(run: Path, tmp_path: Path) -> None:
    folder = copy_of(run, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"heal: steps: expected an integer >= 1, got 0"):
        adaskip.heal(folder, steps=0)
    with pytest.raises(ConfigError, match=r"heal: seed: expected an integer from 0 to 4294967295, got 10000000000"):
        adaskip.heal(folder, seed=10**10)
    assert not (folder / "healing").exists()
