"""Long work names its stages on standard error: with and without a progress bar, with --json, and when interrupted."""

from __future__ import annotations

import gc
import io
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
import weakref
from pathlib import Path

import pytest
import typer

from adaskip import terminal
from adaskip.cli import main
from adaskip.recipe import load
from adaskip.stages import LineStages, Stages
from adaskip.verbs.calibrate import calibrate
from adaskip.verbs.check import check
from adaskip.verbs.evaluate import evaluate
from adaskip.verbs.generate import answer
from adaskip.verbs.profile import profile_model
from adaskip.verbs.train import train
from adaskip.verbs.trainer import make_trainer
from tests.faults.finished import SHORT, copy_of
from tests.routing import routed


class Heard(Stages):
    """Notes what a piece of work says of itself."""

    def __init__(self) -> None:
        self.stream = io.StringIO()
        self.lines = LineStages(self.stream, every=0.0)

    def __call__(self, text: str, total: int | None = None):  # type: ignore[no-untyped-def]
        return self.lines(text, total)

    def note(self, text: str) -> None:
        self.lines.note(text)

    def begun(self) -> list[str]:
        return re.findall(r"^adaskip: (.*) \.\.\.$", self.stream.getvalue(), re.M)


def test_train_without_a_bar_names_every_stage(tmp_path: Path) -> None:
    """`trainer.progress=false` printed nothing for minutes: neither what is under way nor how long it took."""
    heard = Heard()
    train(load("digits-vlm", [*SHORT, f"output={tmp_path / 'run'}"]), stages=heard)
    assert heard.begun() == [
        "reading digits-vlm",
        "loading digits-vlm",
        "measuring 12 layers on 18 validation inputs",
        "pricing 12 layers on 36 calibration inputs",
        "training for 2 steps",
        "finding the threshold for objective.keep=0.6",
        "validating, and checking the conditions",
    ]
    text = heard.stream.getvalue()
    assert re.search(r"^adaskip: training for 2 steps: \d+\.\d s$", text, re.M)
    assert re.search(
        r"^adaskip: training for 2 steps: 1 of 2 after \d+ s: loss [^,]+, KL [^,]+, keep 0?\.?\d", text, re.M
    )
    assert re.search(r"^adaskip: measuring 12 layers on 18 validation inputs: 12 of 18 after \d+ s$", text, re.M)
    assert re.search(r"^adaskip: objective.keep=0.6: mean keep rate 0\.\d+ at threshold", text, re.M)


def test_the_other_verbs_name_theirs(run: Path, tmp_path: Path) -> None:
    """Check, calibrate, eval and generate load, measure and answer for minutes on a real model."""
    copied = copy_of(run, tmp_path / "run", spread=0.5)
    heard = [Heard() for _ in range(4)]
    check(copied, stages=heard[0])
    calibrate(copied, risk=0.3, delta=0.3, stages=heard[1])
    evaluate(copied, per_kind=2, stages=heard[2])
    answer(copied, example=0, stages=heard[3])
    loading = f"loading digits-vlm and the routers of {copied}"
    assert [one.begun() for one in heard] == [
        [loading, "measuring 12 layers on 36 inputs of split test", "judging the routers' own skips"],
        [
            loading,
            "reading the routers' logits on 24 validation inputs",
            "dense answers to 30 calibration inputs",
            next(text for text in heard[1].begun() if text.startswith("testing up to ")),
        ],
        [loading, "answering 12 inputs, side by side"],
        [loading],
    ]


def test_profile_names_its_stages(tmp_path: Path) -> None:
    """A profile of a real model takes twenty minutes."""
    heard = Heard()
    profile_model("digits-vlm", group="all", examples=33, output=tmp_path, stages=heard)
    assert [text.split(",")[0] for text in heard.begun()] == [
        "loading digits-vlm",
        "measuring 12 layers on 33 inputs",
        "judging the notions and running late entries and early exits",
        "oracle: pricing 12 layers on 16 inputs",
        "oracle: planning 1 of 12 layers for all inputs together",
        "oracle: planning 1 of 12 layers for each of 16 inputs",
    ]


def test_a_library_call_prints_nothing(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Called from Python without stages, nothing is said unasked."""
    answer(run, prompt="3 plus 4 ?")
    assert "adaskip:" not in "".join(capfd.readouterr())


def test_a_library_call_changes_nothing_for_the_rest_of_the_process(tmp_path: Path) -> None:
    """`train` set Lightning's log level and added warning filters for good: a notebook's own training fell silent."""
    log = logging.getLogger("lightning.pytorch")
    before = log.level, [*warnings.filters]
    make_trainer(load("digits-vlm", [*SHORT, f"output={tmp_path}"]), tmp_path, 0, [])
    assert (log.level, [*warnings.filters]) == before


def test_json_keeps_standard_output_pure(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Stages go to standard error with --json as well, in plain text: no control codes in a log file."""
    with pytest.raises(SystemExit):
        main(["generate", str(run), "--prompt", "3 plus 4 ?", "--json"])
    out, err = capfd.readouterr()
    assert json.loads(out)["layers"] == 12
    assert f"adaskip: loading digits-vlm and the routers of {run} ...\n" in err
    assert "\x1b" not in err


def test_a_terminal_gets_bars_and_a_file_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which of the two is decided by standard error, whatever standard output is."""
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert isinstance(terminal.terminal_stages(), LineStages)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert isinstance(terminal.terminal_stages(), terminal.BarStages)
    with terminal.terminal_stages()("working", 2) as advance:
        advance(1)
    assert re.search(r"adaskip: working: 0\.\d s\n$", sys.stderr.getvalue())  # type: ignore[attr-defined]


def interrupted(words: list[str], sign: str) -> subprocess.CompletedProcess[str]:
    """A verb in a process of its own that gets Ctrl-C once its standard error holds a text."""
    command = [sys.executable, "-u", "-m", "adaskip.cli", *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ)
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if sign in line:
            time.sleep(0.2)
            process.send_signal(signal.SIGINT)
            break
    out, rest = process.communicate(timeout=100)
    return subprocess.CompletedProcess(command, process.returncode, out, "".join(lines) + rest)


def test_ctrl_c_ends_training_with_one_line(tmp_path: Path) -> None:
    """Lightning makes an exit of 1 of Ctrl-C; it is 130, with what to type to go on, and no traceback."""
    folder = tmp_path / "run"
    words = ["train", "digits-vlm", *SHORT, "trainer.steps=4000", "trainer.validate_every=2000", f"output={folder}"]
    done = interrupted(words, "training for 4000 steps ...")
    assert done.returncode == 130, done.stderr
    assert "Traceback" not in done.stderr
    resume = rf"go on with: adaskip train {folder}/recipe.resolved.yaml --resume"
    said = rf"^adaskip: interrupted at step \d+ of 4000; {resume}$"
    assert re.search(said, done.stderr, re.M)


def test_ctrl_c_that_python_swallows_is_heard_all_the_same() -> None:
    """It arrived in a weak reference's callback, where Python prints an exception and goes on: training went on."""

    def press(_: object) -> None:
        signal.raise_signal(signal.SIGINT)
        time.sleep(0)

    def work() -> dict[str, object]:
        thing = Heard()
        pressed = weakref.ref(thing, press)  # noqa: F841 - it must live for its callback to be called
        del thing
        time.sleep(5)
        return {}

    with pytest.raises(typer.Exit) as ended:
        terminal.do(work, print, as_json=True)
    assert ended.value.exit_code == 130


def test_forgetting_a_dead_tensor_runs_no_python_code() -> None:
    """Where Ctrl-C arrived in such code it was swallowed, with every forward pass of training a new chance."""
    toy, model = routed("llama", "all")
    seen: list[str] = []
    loss = model.train()(**toy.batch([3, 5])).logits.sum()
    assert model.runtime.reruns._by_tensor
    sys.setprofile(lambda frame, event, _: seen.append(frame.f_code.co_filename))
    try:
        del loss
        gc.collect()
    finally:
        sys.setprofile(None)
    assert not model.runtime.reruns._by_tensor
    assert not [name for name in seen if name.endswith("rerun.py")]


def test_ctrl_c_ends_eval_with_one_line_and_whole_files(run: Path, tmp_path: Path) -> None:
    """The evaluation before the interrupted one stays as it was."""
    copied = Path(shutil.copytree(run, tmp_path / "run"))
    (copied / "evaluation.json").write_text('{"kinds": []}')
    done = interrupted(["eval", str(copied), "--json"], "answering 1200 inputs, side by side ...")
    assert done.returncode == 130, done.stderr
    assert json.loads(done.stdout) == {"ok": False, "error": "interrupted", "faults": ["interrupted"]}
    assert "Traceback" not in done.stderr
    assert (copied / "evaluation.json").read_text() == '{"kinds": []}'
    assert not list(copied.glob("*.part"))
