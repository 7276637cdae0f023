"""A run that is killed goes on from its newest whole checkpoint and ends with the routers of an uninterrupted one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from adaskip.errors import CheckpointError
from adaskip.recipe import load
from adaskip.training.checkpoints import checkpoints, keep_newest, newest_checkpoint
from adaskip.training.module import RouterTuner
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
        ("in step", 5, 4, [4]),
        ("in step", 14, 12, [12, 8]),  # step 12 ends with a checkpoint and with validation
        ("in checkpoint", 12, 8, [8, 4]),
        ("after training", 16, 16, [16, 12]),
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


# after every checkpoint is slow: "between two checkpoints" above goes on from one
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(["trainer.validate_every=4"], marks=pytest.mark.slow),
        ["trainer.validate_every=50", "trainer.workers=2"],
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
