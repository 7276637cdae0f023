"""A run that is killed goes on from its newest whole checkpoint and ends with the routers of an uninterrupted one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from adaskip.errors import CheckpointError
from adaskip.recipe import load
from adaskip.theory.prices import Prices
from adaskip.training.checkpoints import checkpoints, keep_newest, newest_checkpoint
from adaskip.training.module import RouterTuner
from adaskip.verbs import train as verbs_train
from adaskip.verbs.train import train
from tests.faults.runs import EVERY, SHORT, STEPS, kill, numbers


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    train(load("digits-vlm", [*SHORT, f"output={folder}"]))
    return folder


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps that this process trains, as it trains them."""
    trained: list[int] = []
    train_one = RouterTuner.training_step

    def training_step(self: RouterTuner, batch: dict, batch_idx: int) -> torch.Tensor:
        trained.append(self.global_step)
        return train_one(self, batch, batch_idx)

    monkeypatch.setattr(RouterTuner, "training_step", training_step)
    return trained


@pytest.mark.parametrize(
    ("moment", "step", "goes_on_from", "kept"),
    [
        pytest.param("in step", 2, 0, [], marks=pytest.mark.slow),  # the next, without a file of numbers
        ("in step", 3, 0, []),
        pytest.param("in step", 5, 4, [4], marks=pytest.mark.slow),  # "between two checkpoints" is later in the same
        ("in step", 14, 12, [12, 8]),  # step 12 ends with a checkpoint and with validation
        ("in checkpoint", 12, 8, [8, 4]),
        pytest.param("after training", 16, 16, [16, 12], marks=pytest.mark.slow),
    ],
    ids=[
        "before the first number", "before the first checkpoint", "early", "between two checkpoints",
        "while one is written", "after training",
    ],
)  # fmt: skip
def test_a_run_killed_in_mid_training_goes_on(
    whole: Path, tmp_path: Path, steps: list[int], moment: str, step: int, goes_on_from: int, kept: list[int]
) -> None:
    """Would catch: no checkpoint before the end, one that is half written, draws or batches that a resume repeats.

    Before the first checkpoint: a resume that cannot do without one, and numbers of the lost steps that stay.
    """
    folder = tmp_path / "killed"
    kill(moment, step, ["train", "digits-vlm", *SHORT, f"output={folder}"])
    assert [int(path.stem) for path in checkpoints(folder)] == kept
    train(load(folder / "recipe.resolved.yaml"), resume=True)
    assert steps == list(range(goes_on_from, STEPS))
    expected, resumed = (load_file(run / "router" / "router.safetensors") for run in (whole, folder))
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)
    assert numbers(folder) == numbers(whole)
    assert (folder / "conditions.jsonl").read_text() == (whole / "conditions.jsonl").read_text()


FUNCTIONAL = [
    *SHORT,
    "objective.price=functional",
    "objective.bound_weight=1",  # so that another price would be another loss
    "objective.task_weight=0.1",
    "trainer.steps=10",
    "conditions.every=3",
]


@pytest.fixture(scope="module")
def priced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of price functional."""
    folder = tmp_path_factory.mktemp("runs") / "priced"
    train(load("digits-vlm", [*FUNCTIONAL, f"output={folder}"]))
    return folder


# priced alike is slow: whoever keeps the old prices when new ones differ keeps them when they do not
@pytest.mark.parametrize(
    "otherwise", [pytest.param(False, marks=pytest.mark.slow), True], ids=["priced alike", "priced otherwise"]
)
def test_a_run_of_price_functional_goes_on_with_the_prices_it_began_with(
    priced: Path, tmp_path: Path, steps: list[int], monkeypatch: pytest.MonkeyPatch, otherwise: bool
) -> None:
    """Stopped two steps behind a checkpoint, and one behind a look that the resume takes again.

    Would catch: a predictor or its factor that the checkpoint does not keep, or that a resume fits anew: on another
    machine it comes out otherwise, and the loss, the looks and ``prices.json`` with it; a look that is written twice.
    """
    folder, train_one, price = tmp_path / "stopped", RouterTuner.training_step, verbs_train.price_layers

    def stopping(self: RouterTuner, batch: dict, batch_idx: int) -> torch.Tensor:
        if self.global_step == 7:
            raise KeyboardInterrupt
        return train_one(self, batch, batch_idx)

    with monkeypatch.context() as until_stopped:
        until_stopped.setattr(RouterTuner, "training_step", stopping)
        with pytest.raises(KeyboardInterrupt):
            train(load("digits-vlm", [*FUNCTIONAL, f"output={folder}"]))
    assert [int(path.stem) for path in checkpoints(folder)] == [4]
    looks = [json.loads(line)["step"] for line in (folder / "conditions.jsonl").read_text().splitlines()]
    assert looks[-1] == 6
    steps.clear()

    def dearer(*arguments: Any, **options: Any) -> Prices:
        prices = price(*arguments, **options)
        assert prices.functional is not None
        return replace(prices, functional=replace(prices.functional, factor=8 * prices.functional.factor))

    if otherwise:
        monkeypatch.setattr(verbs_train, "price_layers", dearer)
    train(load(folder / "recipe.resolved.yaml"), resume=True)
    assert steps == list(range(4, 10))
    expected, resumed = (load_file(run / "router" / "router.safetensors") for run in (priced, folder))
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)
    assert numbers(folder) == numbers(priced)
    for name in ("prices.json", "conditions.jsonl"):
        assert (folder / name).read_text() == (priced / name).read_text(), name


# both are slow: "between two checkpoints" above goes on from one
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(["trainer.validate_every=4"], marks=pytest.mark.slow),
        pytest.param(["trainer.validate_every=50", "trainer.workers=2"], marks=pytest.mark.slow),
    ],
    ids=["after every checkpoint", "never, with workers"],
)
def test_killed_twice_whenever_it_validates(tmp_path: Path, steps: list[int], settings: list[str]) -> None:
    """Would catch: a resume that trains a step too many or too few as validation falls on a checkpoint or not."""
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    train(load("digits-vlm", [*SHORT, *settings, f"output={whole}"]))
    kill("in step", 6, ["train", "digits-vlm", *SHORT, *settings, f"output={folder}"])
    kill("in step", 9, ["train", str(folder / "recipe.resolved.yaml"), "--resume"])
    steps.clear()
    train(load(folder / "recipe.resolved.yaml"), resume=True)
    assert steps == list(range(8, STEPS))
    expected, resumed = (load_file(run / "router" / "router.safetensors") for run in (whole, folder))
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)
    assert numbers(folder) == numbers(whole)
    # the two newest, and the one that the last resume went on from; not one more for every resume
    assert [int(path.stem) for path in checkpoints(folder)] == [STEPS, STEPS - EVERY, 8]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk that is always full is Linux's")
def test_a_disk_that_fills_ends_in_a_sentence(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch: a traceback out of torch's file writer, or a good checkpoint that is lost to an unfinished one."""
    folder, train_one = tmp_path / "full", RouterTuner.training_step
    monkeypatch.setattr("adaskip.runfiles.uuid.uuid4", lambda: SimpleNamespace(hex="unlucky0"))

    def training_step(self: RouterTuner, batch: dict, batch_idx: int) -> torch.Tensor:
        if self.global_step == 7:  # the next checkpoint's unfinished file lies on a disk without room
            (folder / "checkpoints" / "00000008.ckpt.unlucky0.part").symlink_to("/dev/full")
        return train_one(self, batch, batch_idx)

    with monkeypatch.context() as while_full:
        while_full.setattr(RouterTuner, "training_step", training_step)
        with pytest.raises(CheckpointError, match=rf"{folder}: No space left on device; make room, .* --resume$"):
            train(load("digits-vlm", [*SHORT, f"output={folder}"]))
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["00000004.ckpt"]
    train(load(folder / "recipe.resolved.yaml"), resume=True)
    expected, resumed = (load_file(run / "router" / "router.safetensors") for run in (whole, folder))
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)


def test_a_run_keeps_its_two_newest_checkpoints(whole: Path) -> None:
    """Would catch: a disk that fills, or one checkpoint that is overwritten in place."""
    assert [int(path.stem) for path in checkpoints(whole)] == [STEPS, STEPS - EVERY]
    assert not list(whole.rglob("*.part"))
    assert not (whole / ".lock").exists()


def test_a_damaged_checkpoint_is_passed_over(whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Would catch: a resume that ends in a traceback because the disk was full when the last checkpoint was written."""
    folder = tmp_path / "run"
    for path in checkpoints(whole):
        copy = folder / "checkpoints" / path.name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes()[: None if path.stem == "00000012" else 5000])
    assert newest_checkpoint(folder) == (folder / "checkpoints" / "00000012.ckpt", 12)
    assert "00000016.ckpt: damaged" in caplog.text
    (folder / "checkpoints" / "00000020.ckpt.part").touch()
    keep_newest(folder, newest_checkpoint(folder)[0])
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["00000012.ckpt"]
