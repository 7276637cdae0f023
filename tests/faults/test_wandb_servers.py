"""A W&B server that refuses, hangs or answers nonsense, a key that is wrong or missing: training goes on.

What is recorded is read back from the disk, record by record, and not as W&B reports it.
"""

from __future__ import annotations

import csv
import logging
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from adaskip.training import upload
from adaskip.training.tracking import Board, RunLogger, run_id, wandb_logger
from adaskip.training.upload import find_fault
from tests import wandb_file
from tests.faults.runs import environment
from tests.own_data import SHORT, data, language_model
from tests.wandb_server import KEY, broken, serving

__all__ = ["data", "language_model"]
HANGS = 300
"""Seconds after which a process counts as one that waits for a server; a whole training takes ten."""


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No key of the machine's user, and nothing left of another test's."""
    for name in [name for name in os.environ if name.startswith("WANDB_") and name != "WANDB_SERVICE"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))


def logged(run: Path) -> dict[str, list[float]]:
    """Every series of ``metrics.csv``, in order."""
    series: dict[str, list[float]] = {}
    with (run / "metrics.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            series.setdefault(row["name"], []).append(float(row["value"]))
    return series


@pytest.mark.parametrize(
    ("server", "key", "said"),
    [
        ("refuses", KEY, "Connection refused"),
        ("hangs", KEY, "no answer within 3 s"),
        ("500", KEY, "it answers 500"),
        pytest.param("401", KEY, "401", marks=pytest.mark.slow),
        pytest.param("200", "too-short", "API key must have", marks=pytest.mark.slow),
        ("200", None, "No API key"),
    ],
    ids=["refuses", "hangs", "500", "wrong key", "no key at all", "missing key"],
)
def test_training_goes_on(
    tmp_path: Path, language_model: Path, data: Path, server: str, key: str | None, said: str
) -> None:
    """Would catch: W&B asked inside the process that trains, which then raises, or waits for minutes."""
    run, where = tmp_path / "run", [f"backbone.path={language_model}", f"data.source={data}"]
    words = ["train", "causal-lm", *where, *SHORT, "trainer.steps=12", "tracking.wandb=online", f"output={run}"]
    with broken(server) as url:
        names = environment() | {"WANDB_BASE_URL": url} | ({} if key is None else {"WANDB_API_KEY": key})
        done = subprocess.run(
            [sys.executable, "-m", "adaskip.cli", *words],
            env=names, timeout=HANGS, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (run / "report.md").is_file()
    history, written = wandb_file.read(run)["history"], logged(run)
    assert {"train/loss", "val/kl", "theory/joint_kl"} <= set(written)
    for name, values in written.items():
        assert [row[name] for row in history if name in row] == pytest.approx(values, nan_ok=True), name
    assert any(artifact.type == "model" for artifact in wandb_file.read(run)["artifacts"])
    assert done.stderr.count("nothing of it is lost. Send it later: wandb sync") == 1
    assert re.search(f"W&B at {url}: .*({said})", done.stderr), done.stderr
    assert "Traceback" not in done.stderr


def record(folder: Path, values: list[float], mode: str = "online") -> RunLogger:
    logger = wandb_logger(folder, mode, "adaskip", None, [], {"seed": 3})
    for step, value in enumerate(values):
        logger.log_metrics({"x": value}, step)
    return logger


def test_everything_arrives_while_it_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch: an upload that begins when training is over; a resume that begins anew on the server, at line 0."""
    with serving() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        logger = record(tmp_path, [1.0, 2.0])
        for _ in range(600):
            if len(server.history) == 2:
                break
            time.sleep(0.1)
        assert [line["x"] for line in server.history.values()] == [1, 2]  # the run is still open
        Board([logger]).finish()
        assert logger.upload is not None
        assert logger.upload.complete
        Board([record(tmp_path, [3.0])]).finish()
        assert [server.history[place]["x"] for place in range(3)] == [1, 2, 3]
        runs = {values["name"] for operation, values in server.asked if operation == "UpsertBucket"}
        assert runs == {run_id(tmp_path)}


def test_two_folders_of_one_path_are_two_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch: an id made of the folder's path, so that containers, and runs begun anew, write into one another."""
    first = run_id(tmp_path)
    assert first == run_id(tmp_path)
    (tmp_path / "wandb" / "run-id.txt").unlink()
    assert first != run_id(tmp_path)
    (tmp_path / "wandb" / "run-id.txt").unlink()
    monkeypatch.setenv("WANDB_RUN_ID", "of-a-sweep")
    assert run_id(tmp_path) == "of-a-sweep"


def test_a_server_that_fails_midway_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Would catch: an end that waits a minute, or as long as W&B retries, for a server that has gone since."""
    monkeypatch.setattr(upload, "ENDS_WITHIN", HANGS)
    with serving() as server, caplog.at_level(logging.WARNING):
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        logger = record(tmp_path, [1.0])
        for _ in range(600):
            if server.history:
                break
            time.sleep(0.1)
        server.status = 500
        begun = time.monotonic()
        Board([logger]).finish()
        assert time.monotonic() - begun < HANGS / 2
    assert logger.upload is not None
    assert not logger.upload.complete
    assert "it answers 500; the run is recorded on this machine" in caplog.text
    assert [row["x"] for row in wandb_file.read(tmp_path)["history"]] == [1.0]


@pytest.mark.slow
def test_a_server_that_comes_back_gets_the_whole_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch: a network that is down for the first three seconds, and a night's training that is sent by hand."""
    monkeypatch.setattr(upload, "ASKED_AGAIN", 0.2)
    with serving(500) as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        logger = record(tmp_path, [1.0, 2.0])
        assert logger.upload is not None
        assert logger.upload._asked.wait(60)
        server.status = 200
        for _ in range(600):
            if server.history:
                break
            time.sleep(0.1)
        Board([logger]).finish()
        assert logger.upload.complete
        assert [server.history[place]["x"] for place in range(2)] == [1, 2]


@pytest.mark.parametrize(
    ("how", "fault"),
    [
        ("refuses", "[Errno 111] Connection refused"),
        ("hangs", "no answer within 0.5 s"),
        ("503", "it answers 503"),
        ("401", None),
        ("200", None),
    ],
)
def test_what_is_wrong_with_a_server(how: str, fault: str | None) -> None:
    """Would catch: a wrong key called a broken server, or a server that hangs waited for without end."""
    with broken(how) as url:
        assert find_fault(url, 0.5) == fault
    assert find_fault("http://no-such-host.invalid", 0.5) is not None
    assert find_fault("no address", 0.5) is not None
