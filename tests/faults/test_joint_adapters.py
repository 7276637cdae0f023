"""`lora:` in a recipe: adapters that train along with the routers, through a resume and a second process."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import adaskip
from adaskip.errors import ConfigError
from tests import tuning
from tests.faults.runs import KILLER, SHORT, environment

pytest.importorskip("peft", reason="PEFT is an extra: pip install 'adaskip[peft]'")

LORA = [*SHORT, "lora.rank=2", "lora.dropout=0.1"]


def tuner_of(steps: int, dropout: float = 0.0) -> adaskip.RouterTuner:
    model = tuning.eager({})
    adaskip.adapt(model, adaskip.Lora(rank=2, dropout=dropout))
    return adaskip.RouterTuner(model, adaskip.Objective(bound_weight=0.0), learning_rate=0.01, steps=steps)


def test_a_resumed_run_ends_with_the_adapters_of_one_in_one_go(tmp_path: Path) -> None:
    """Catches adapters that no checkpoint holds or no resume reads, and dropout that a resume draws anew."""
    whole, first, second = (tuner_of(6, dropout=0.3) for _ in range(3))
    tuning.trainer(tmp_path / "whole", 6).fit(whole, tuning.loader(tuning.DATA[:6]))
    torch.rand(5)  # other draws between the two, as another process has made them
    stopped = tuning.trainer(tmp_path / "first", 3, saves=True)
    stopped.fit(first, tuning.loader(tuning.DATA[:3]))
    stopped.save_checkpoint(tmp_path / "at.ckpt")
    stored = torch.load(tmp_path / "at.ckpt", weights_only=True)["state_dict"]
    assert {name.partition(".")[0] for name in stored} == {"model", "multiplier", "adapters"}
    assert not [name for name in stored if name.startswith("model.backbone.")]
    rest = [*tuning.DATA[3:6], *tuning.DATA[3:6]]  # Lightning skips what it has read of this epoch
    tuning.trainer(tmp_path / "second", 6).fit(
        second, tuning.loader(rest), ckpt_path=tmp_path / "at.ckpt", weights_only=True
    )
    expected, found = (tuner.model.adapters.state_dict() for tuner in (whole, second))
    assert any(value.any() for name, value in expected.items() if "lora_B" in name), "nothing was trained"
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert torch.equal(tuning.weights(second), tuning.weights(whole))


def test_the_dense_model_is_what_it_was_while_routers_and_adapters_learn(tmp_path: Path) -> None:
    """Catches adapters that a dense pass goes through, and ones that the optimiser was not given."""
    tuner, inputs = tuner_of(3), tuning.DATA[4].arguments()
    model, adapters = tuner.model, tuner.model.adapters
    with model.dense():
        before = model(**inputs).logits.detach().clone()
    tuning.trainer(tmp_path, 3).fit(tuner, tuning.loader(tuning.DATA[:4]))
    assert all(weight.any() for weight in adapters.parameters())
    with model.eval().dense():
        assert torch.equal(model(**inputs).logits, before)


def test_adapters_that_ask_for_no_gradient_stay_as_they_are(tmp_path: Path) -> None:
    """Catches an optimiser that takes them all, and flips refused where nothing but routers is trained."""
    model = tuning.eager({})
    adapters = adaskip.adapt(model, adaskip.Lora(rank=2))
    with pytest.raises(ConfigError, match="expected straight-through where adapters are trained along"):
        adaskip.RouterTuner(model, adaskip.Objective(bound_weight=0.0, gradient="flips"))
    for weight in adapters.parameters():
        weight.requires_grad_(False)
    tuner = adaskip.RouterTuner(model, adaskip.Objective(bound_weight=0.0, gradient="flips"), steps=2)
    tuning.trainer(tmp_path, 2).fit(tuner, tuning.loader(tuning.DATA[:2]))
    assert not any(value.any() for name, value in adapters.state_dict().items() if "lora_B" in name)


def test_a_method_without_a_gradient_says_how_to_heal() -> None:
    with pytest.raises(ConfigError, match=r"lora: expected none with method token-plan, .*adaskip heal"):
        adaskip.recipe.load("token-plan", ["lora.rank=2"])


def test_two_processes_end_with_the_same_adapters(tmp_path: Path) -> None:
    """Catches adapters that each process trains for itself, and weights that a reduction waits for in vain."""
    two = ["trainer.accelerator=cpu", "trainer.batch_size=4", "trainer.devices=2", "trainer.strategy=ddp"]
    command = [sys.executable, str(KILLER), "train", "digits-vlm", *LORA, *two, "trainer.steps=4", "--json"]
    command.append(f"output={tmp_path / 'run'}")
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode in (0, 1), done.stderr
    assert json.loads(done.stdout)["steps"] == 4
    digests = re.findall(r"ROUTERS \d (\w+ \S+)", done.stderr)
    assert len(digests) == 2
    assert digests[0] == digests[1]
    model = adaskip.RoutedModel.from_pretrained(tmp_path / "run" / "router")
    assert model.adapters is not None
    assert (model.adapters.lora.rank, model.adapters.lora.dropout) == (2, 0.1)
    assert any(value.any() for name, value in model.adapters.state_dict().items() if "lora_B" in name)
