"""What a terminal shows: a bar with the time left and how training goes; colours and codes only where they belong."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from adaskip import terminal
from adaskip.recipe import load
from adaskip.stages import LineStages
from adaskip.terminal import BarStages
from adaskip.training.steps import describe_step
from adaskip.verbs.train import train
from tests.faults.runs import environment
from tests.own_data import SHORT, data, language_model

__all__ = ["data", "language_model"]
CODES = re.compile(r"\x1b\[[\d;?]*[A-Za-z]")


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def screened(monkeypatch: pytest.MonkeyPatch) -> Screen:
    """Standard error of a terminal that is wide enough; no fixture, since pytest puts its own back after those."""
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("TERM", "xterm-256color")
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    return screen


def test_a_bar_tells_count_time_left_and_how_it_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch: a bar that only moves; and numbers read off the device for every step, drawn or not."""
    asked, screen = [], screened(monkeypatch)

    def tell() -> str:
        asked.append(1)
        return "loss 1.25, keep 0.61"

    stages = terminal.terminal_stages()
    assert isinstance(stages, BarStages)
    with stages("training", 1000) as advance:
        for step in range(1, 501):
            advance(step, tell)
    text = screen.getvalue()
    assert "loss 1.25, keep 0.61" in text
    assert "500/1000" in text
    assert len(re.findall(r"[\d-]:[\d-]{2}:[\d-]{2}", CODES.sub("", text).split("500/1000")[1])) == 2  # gone, left
    assert len(asked) < 20
    assert "\x1b[" in text


def test_no_color_keeps_the_bar_and_drops_its_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch: colours where https://no-color.org asks for none."""
    screen, colour = screened(monkeypatch), re.compile(r"\x1b\[[\d;]*3[0-8][;\dm]")
    with terminal.terminal_stages()("counting", 2) as advance:
        advance(1)
    assert colour.search(screen.getvalue())
    screen.truncate(0)
    monkeypatch.setenv("NO_COLOR", "1")
    with terminal.terminal_stages()("counting", 2) as advance:
        advance(1)
    assert "1/2" in screen.getvalue()
    assert not colour.search(screen.getvalue())


@pytest.mark.parametrize("term", ["dumb", "unknown"])
def test_a_dumb_terminal_gets_lines(monkeypatch: pytest.MonkeyPatch, term: str) -> None:
    """Would catch: minutes of silence, or control codes as text, in the shell of an editor."""
    screen = screened(monkeypatch)
    monkeypatch.setenv("TERM", term)
    stages = terminal.terminal_stages()
    assert isinstance(stages, LineStages)
    with stages("counting", 2):
        pass
    assert "adaskip: counting ...\n" in screen.getvalue()
    assert "\x1b" not in screen.getvalue()


def test_a_line_tells_how_training_goes(language_model: Path, data: Path, tmp_path: Path) -> None:
    """Would catch: a log file of a night's training that says how far it is, and not whether it gets anywhere."""
    stream = io.StringIO()
    where = [f"backbone.path={language_model}", f"data.source={data}", f"output={tmp_path / 'run'}"]
    train(load("causal-lm", [*where, *SHORT]), stages=LineStages(stream, every=0.0))
    lines = re.findall(r"^adaskip: training for 4 steps: \d of 4 after \d+ s: (.*)$", stream.getvalue(), re.M)
    assert len(lines) == 4
    shown = re.compile(r"loss -?[\d.e+-]+, KL [\d.e+-]+, keep [\d.]+(, conditions \d of \d)?")
    assert all(shown.fullmatch(line) for line in lines), lines
    assert "conditions" in lines[-1]


def test_training_on_a_terminal(language_model: Path, data: Path, tmp_path: Path) -> None:
    """Would catch: two bars at once, Lightning's and ours, or no last table."""
    words = ["train", "causal-lm", f"backbone.path={language_model}", f"data.source={data}", *SHORT]
    words += ["trainer.progress=true", f"output={tmp_path / 'run'}"]
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "adaskip.cli", *words],
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=theirs,
        env=environment() | {"TERM": "xterm-256color", "COLUMNS": "150", "NO_COLOR": "1"},
    )
    os.close(theirs)
    said = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # the other side has gone
            break
        if not part:
            break
        said += part
    os.close(ours)
    text = CODES.sub("", said.decode(errors="replace").replace("\r\n", "\n"))
    assert process.wait(60) == 0, text
    assert re.search(r"training for 4 steps .*[01234]/4", text), text
    assert "Epoch" not in text  # Lightning's own bar
    assert re.search(r"^ ?side +accuracy +kl +keep *$", text, re.M), text
    assert re.search(r"^ ?routers +[\d.]+ +[\d.e-]+ +[\d.]+ *$", text, re.M), text


def test_recipes_are_completed_in_a_shell() -> None:
    """Would catch: `adaskip train dig<TAB>` that finds nothing."""
    names = {"_ADASKIP_COMPLETE": "complete_bash", "COMP_WORDS": "adaskip train digits-vlm-v", "COMP_CWORD": "2"}
    code = "from adaskip.cli import app; app(prog_name='adaskip')"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment() | names, capture_output=True, text=True, check=False
    )
    assert "digits-vlm-vision" in done.stdout.split(), done.stderr


def test_nothing_is_told_before_anything_is_logged() -> None:
    assert describe_step(SimpleNamespace(callback_metrics={}, callbacks=[])) == ""  # type: ignore[arg-type]
