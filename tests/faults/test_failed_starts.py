"""A start that failed before its first step leaves nothing that blocks the next; one that got further is never lost."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from lightning.pytorch.loggers.logger import DummyLogger

import adaskip.verbs.train
import adaskip.verbs.trainer
from adaskip.errors import CheckpointError, ConfigError, DataError
from adaskip.recipe import load
from adaskip.training.tracking import Board, wandb_logger
from adaskip.verbs.export import export
from adaskip.verbs.start import opened
from adaskip.verbs.train import train
from tests.faults.runs import SHORT, environment, kill


class Begun(Exception):
    """Raised where pricing would begin: the start has worked."""


@pytest.fixture
def starts_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def begin(*args: object) -> None:
        raise Begun

    monkeypatch.setattr(adaskip.verbs.train, "_price", begin)


def recipe(folder: Path, *more: str) -> adaskip.recipe.Recipe:
    return load("digits-vlm", [*SHORT, f"output={folder}", *more])


@pytest.mark.usefixtures("starts_only")
@pytest.mark.parametrize("resume", [pytest.param(False, marks=pytest.mark.slow), True], ids=["start", "resume"])
def test_a_start_that_failed_blocks_nothing(tmp_path: Path, resume: bool) -> None:
    """Would catch: "already holds a run", or "started with another data", after a typo that was mended."""
    folder = tmp_path / "run"
    with pytest.raises(DataError, match="nodata"):
        train(recipe(folder, "data.source=nodata"))
    assert not folder.exists()  # a typo is seen before anything is written
    with pytest.raises(Begun):
        train(recipe(folder, "seed=1"))  # fails later, with its folder made
    assert (folder / "recipe.resolved.yaml").is_file()
    with pytest.raises(Begun):
        train(recipe(folder, "seed=2"), resume=resume)
    assert load(folder / "recipe.resolved.yaml").seed == 2
    assert not (folder / ".lock").exists()


def test_a_run_offline_leaves_the_process_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch: ``WANDB_MODE`` left behind by a run offline, so that the next one, online, is sent nowhere."""
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    logger = wandb_logger(tmp_path, "offline", "adaskip", None, [], {})
    logger.log_metrics({"loss": 1.0}, 0)
    Board([logger]).finish()
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert logger.upload is None
    assert "WANDB_MODE" not in os.environ


@pytest.mark.usefixtures("starts_only")
def test_offline_in_the_environment_needs_no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch: "none is configured" where a cluster's ``WANDB_MODE=offline`` makes every run one without a key."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(Begun):
        train(recipe(tmp_path / "run", "tracking.wandb=online"))


@pytest.mark.parametrize(
    ("wanted", "said", "loggers"),
    [("offline", "disabled", 1), ("online", "disabled", 1), ("disabled", "online", 1), ("offline", "online", 2),
     ("online", "dryrun", 2), ("offline", "", 2), ("offline", "nonsense", 2)],
)  # fmt: skip
def test_the_environment_makes_wandb_quieter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: str, said: str, loggers: int
) -> None:
    """Would catch: ``WANDB_MODE=disabled`` that is overwritten, or a recipe that says no and is made to say yes."""
    monkeypatch.setenv("WANDB_MODE", said)
    made: list[str] = []
    monkeypatch.setattr(adaskip.verbs.trainer, "wandb_logger", lambda _, mode, *__: made.append(mode) or DummyLogger())
    trainer = adaskip.verbs.trainer.make_trainer(recipe(tmp_path, f"tracking.wandb={wanted}"), tmp_path, 0, [])
    assert len(trainer.loggers) == loggers
    assert made == ["offline"] * (loggers - 1)


def test_a_run_with_progress_is_kept(tmp_path: Path) -> None:
    """Would catch: a killed run that a second start wipes, or goes on under other settings."""
    folder = tmp_path / "run"
    kill("in step", 5, ["train", "digits-vlm", *SHORT, f"output={folder}"])
    with pytest.raises(ConfigError, match="already holds a run; go on with it"):
        train(recipe(folder))
    with pytest.raises(ConfigError, match=r"started with another seed \(0, now 7\)"):
        train(recipe(folder, "seed=7"), resume=True)
    with pytest.raises(CheckpointError, match="has not finished; go on with"):
        export(folder, tmp_path / "never")
    moved = folder.rename(tmp_path / "moved")
    assert load(moved / "recipe.resolved.yaml").output == str(moved)


@pytest.mark.usefixtures("starts_only")
def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    """Would catch: files of the user's that a start removes or writes between."""
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"expected a new or empty folder, found notes.txt"):
        train(recipe(tmp_path))
    with pytest.raises(CheckpointError, match="no run to resume here"):
        train(recipe(tmp_path), resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(ConfigError, match="a file of that name"):
        train(recipe(tmp_path / "notes.txt"))


def test_two_processes_do_not_train_in_one_folder(tmp_path: Path) -> None:
    """Would catch: two starts at once that write one metrics.csv and one checkpoint."""
    folder = tmp_path / "run"
    code = (
        "import sys; from pathlib import Path\n"
        "from adaskip.recipe import load; from adaskip.verbs.start import opened\n"
        "recipe = load('digits-vlm', [f'output={sys.argv[1]}'])\n"
        "with opened(recipe, Path(sys.argv[1]), False):\n"
        "    print('inside', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert other.stdout is not None
    assert other.stdout.readline() == b"inside\n"
    with (
        pytest.raises(ConfigError, match="another process is training in this folder"),
        opened(recipe(folder), folder, False),
    ):
        pass
    other.kill()  # its lock goes with it
    other.wait()
    with opened(recipe(folder), folder, False) as (checkpoint, step):
        assert (checkpoint, step) == (None, 0)


def test_torchrun_and_the_recipe_must_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch: processes of torchrun that each train alone and write over one another's files."""
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"torchrun has started 2 processes .* asks for 1; .*trainer.devices=2"):
        train(recipe(tmp_path / "run", "trainer.devices=1"))


def test_slurm_requeues_nothing_behind_our_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch: a checkpoint in mid-round, written at SLURM's signal, that a resume prefers to the run's own."""
    assert adaskip.verbs.trainer._cluster() == []
    for name, value in {"SLURM_NTASKS": "1", "SLURM_JOB_NAME": "train", "SLURM_JOB_ID": "5"}.items():
        monkeypatch.setenv(name, value)
    assert [cluster.auto_requeue for cluster in adaskip.verbs.trainer._cluster()] == [False]
