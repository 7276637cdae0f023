"""A folder that nothing can be written into is refused before anything is loaded, by every verb that writes."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adaskip.cli import main
from adaskip.errors import CheckpointError
from adaskip.recipe import load
from adaskip.verbs.calibrate import calibrate
from adaskip.verbs.evaluate import evaluate
from adaskip.verbs.export import export
from adaskip.verbs.generate import Answer, _store
from adaskip.verbs.profile import profile_model
from adaskip.verbs.run import Run, check_writable
from adaskip.verbs.train import train

VERBS: dict[str, Callable[[Path, Path], Any]] = {
    "train": lambda run, place: train(load("digits-vlm", [f"output={place}", "tracking.wandb=disabled"])),
    "profile": lambda run, place: profile_model("digits-vlm", output=place),
    "export": lambda run, place: export(run, place),
}


def no_room(*args: object, **options: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.fixture(autouse=True)
def nothing_is_loaded(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading anything fails the test; ``run`` is made before."""
    for name in ("adaskip.backbone.load.load_backbone", "adaskip.backbone.load.load_processor"):
        monkeypatch.setattr(name, lambda *_, **__: pytest.fail("a model or processor was loaded"))
    monkeypatch.setattr("adaskip.verbs.export.read_weights", lambda *_: pytest.fail("the weights were read"))


@pytest.mark.parametrize("verb", VERBS)
def test_a_folder_below_a_file(run: Path, tmp_path: Path, verb: str) -> None:
    """Would catch: minutes of loading before the fault, and an errno instead of the file that is in the way."""
    file = tmp_path / "notes.txt"
    file.write_text("mine")
    with pytest.raises(
        CheckpointError, match=rf"{file}/a/b: cannot be written to \({file} is a file\).*another folder"
    ):
        VERBS[verb](run, file / "a" / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="/proc, where not even root can write, is Linux's")
@pytest.mark.parametrize("verb", VERBS)
def test_a_folder_where_nobody_can_write(run: Path, verb: str) -> None:
    """Would catch: a check of permissions, which are none to root, though the system takes no file there."""
    with pytest.raises(CheckpointError, match=r"/proc/runs/mine: cannot be written to \(/proc: .*another folder"):
        VERBS[verb](run, Path("/proc/runs/mine"))


@pytest.mark.parametrize("verb", [evaluate, lambda run: calibrate(run, risk=0.5, delta=0.5)], ids=["eval", "calibrate"])
def test_a_run_that_cannot_be_written(run: Path, verb: Callable[[Path], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch: an hour of answering, and then no room on the disk for the figures."""
    monkeypatch.setattr(tempfile, "TemporaryFile", no_room)
    with pytest.raises(CheckpointError, match=rf"{run}: cannot be written to \({run}: No space .* copy the folder"):
        verb(run)


def test_an_answer_needs_no_room(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch: an answer lost because the report beside it could not be made anew."""
    copied = shutil.copytree(run, tmp_path / "run")
    (copied / "evaluation.json").write_text("{}")
    monkeypatch.setattr(tempfile, "TemporaryFile", no_room)
    monkeypatch.setattr("adaskip.verbs.generate.write_json", no_room)
    result = Answer("w1", "w2", "w2", None, 0.5, (True, False), 2, 4, ())
    _store(Run(copied, load("digits-vlm"), None, None), result)  # type: ignore[arg-type]
    assert (copied / "evaluation.json").read_text() == "{}"


def test_a_recipe_is_copied_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch: an empty recipe on a full disk, which a second attempt then takes for one that exists."""
    monkeypatch.setattr("os.fsync", no_room)
    monkeypatch.setattr("shutil._USE_CP_SENDFILE", False)
    monkeypatch.setattr("shutil.copyfileobj", no_room)
    with pytest.raises(SystemExit, match="2"):
        main(["cp", "causal-lm", str(tmp_path / "mine.yaml")])
    assert not [*tmp_path.iterdir()]


def test_looking_leaves_nothing_behind(tmp_path: Path) -> None:
    """Would catch: a file, or folders of a path that was mistyped, left by the question alone."""
    check_writable(tmp_path / "runs" / "mine", "the run")
    assert not [*tmp_path.iterdir()]


def test_a_recipe_is_copied_to_no_such_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Would catch: ``[Errno 2]`` for a user who wants to edit a recipe."""
    with pytest.raises(SystemExit, match="2"):
        main(["cp", "causal-lm", str(tmp_path / "no" / "mine.yaml")])
    assert "mine.yaml: cannot be written (No such file or directory); name another: adaskip cp causal-lm" in (
        capsys.readouterr().err
    )
