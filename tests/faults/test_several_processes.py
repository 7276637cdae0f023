"""Two processes train one set of routers, by the command line and by torchrun; where one dies, the other says so."""

from __future__ import annotations

import json
import logging
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from adaskip.ranks import says_when_lost
from adaskip.recipe import load
from adaskip.training.checkpoints import checkpoints
from adaskip.verbs.train import train
from tests.faults.ranks import start_ranks
from tests.faults.runs import KILLER, SHORT, STEPS, environment, numbers

# records that neither processes nor batches divide; how many processes there are is torchrun's to say
JOINED = [*SHORT, "trainer.accelerator=cpu", "trainer.batch_size=4", "data.examples.validation=49"]
TWO = [*JOINED, "trainer.devices=2", "trainer.strategy=ddp"]
COMMAND = [sys.executable, str(KILLER), "train"]
LAUNCHER = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29513"]
TORCHRUN = [sys.executable, *LAUNCHER, str(KILLER), "train"]


def run(command: list[str], **death: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=environment() | death, capture_output=True, text=True, timeout=600)


def routers(done: subprocess.CompletedProcess[str]) -> list[tuple[str, ...]]:
    """Of each rank: the digest of its routers and its multiplier."""
    return sorted(re.findall(r"ROUTERS (\d) (\w+) (\S+)", done.stderr))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """An uninterrupted run by the command line."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    done = run([*COMMAND, "digits-vlm", *TWO, "--json", f"output={folder}"])
    assert done.returncode == 0, done.stderr
    return folder, done


def test_two_processes_end_with_the_same_routers_and_one_set_of_files(
    whole: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    """Would catch: a second process that finds the folder taken, an in-place reduction, files or results twice.

    And a group of processes that is left open, whose threads now and then abort a process that has done all its work.
    """
    folder, done = whole
    first, second = routers(done)
    assert re.findall(r"OPEN (\w+)", done.stderr) == ["False"] * 2
    assert first[1:] == second[1:]
    assert float(first[2]) > 0
    assert json.loads(done.stdout)["steps"] == STEPS  # one JSON object, not one a process
    names = {path.name for path in folder.iterdir()}
    assert names >= {"recipe.resolved.yaml", "metrics.csv", "conditions.jsonl", "summary.json", "router", "report.md"}
    assert not [name for name in names if name.endswith(".part")]
    looks = [json.loads(line)["step"] for line in (folder / "conditions.jsonl").read_text().splitlines()]
    assert looks == [6, 12, 16, 16]
    assert all(len({step for step, _ in rows}) == len(rows) or name.startswith("val/")
               for name, rows in numbers(folder).items())  # fmt: skip


def test_a_process_that_dies_is_said_by_the_other_and_the_run_goes_on(
    whole: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    """Would catch: a process that waits for a dead one, and a resume of two processes that is not the same run."""
    folder = tmp_path / "run"
    started = time.monotonic()
    done = run([*TORCHRUN, "digits-vlm", *JOINED, f"output={folder}"], MOMENT="in step", STEP="10", VICTIM="1")
    assert done.returncode != 0
    assert time.monotonic() - started < 150
    # the broken collective says it, or the signal that torchrun sends the survivor, whichever comes first
    assert f"go on with: adaskip train {folder / 'recipe.resolved.yaml'} --resume" in done.stderr
    assert [int(path.stem) for path in checkpoints(folder)] == [8, 4]
    resumed = run([*TORCHRUN, str(folder / "recipe.resolved.yaml"), "--resume"])
    assert resumed.returncode == 0, resumed.stderr
    assert "going on from step 8" in resumed.stderr
    assert routers(resumed) == routers(whole[1])
    expected, found = (load_file(path / "router" / "router.safetensors") for path in (whole[0], folder))
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert numbers(folder) == numbers(whole[0])


def test_they_end_as_one_process_that_reads_the_same_batches(
    whole: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    """Batches of 8 rows, or of twice 4: would catch all that an own script's test would, on the way of the recipe.

    And a validation set of 49 rows that both processes read whole, or of which the odd row is counted twice or never.
    """
    folder, _ = whole
    train(load("digits-vlm", [*JOINED, "trainer.batch_size=8", f"output={tmp_path / 'one'}"]))
    one, two = numbers(tmp_path / "one"), numbers(folder)
    assert one.keys() == two.keys()
    for name in one:
        for (step, expected), (at, found) in zip(one[name], two[name], strict=True):
            assert step == at
            # the budget's threshold is the logit of some row, and rounding decides on which side that row falls
            close = 0.02 if name.startswith("val/") and step == STEPS else 1e-5
            assert float(found) == pytest.approx(float(expected), rel=1e-3, abs=close, nan_ok=True), (name, step)
    expected, found = (load_file(run / "router" / "router.safetensors") for run in (tmp_path / "one", folder))
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-5, msg=name)
    rates = [json.loads((run / "keep_rates.json").read_text()) for run in (tmp_path / "one", folder)]
    assert rates[0].keys() == rates[1].keys()
    for kind, expected_rates in rates[0].items():
        assert rates[1][kind] == pytest.approx(expected_rates, abs=0.2), kind


def test_a_process_that_nobody_watches_ends_when_the_other_is_killed(tmp_path: Path) -> None:
    """Neither torchrun nor Lightning looks after it, as under SLURM: would catch one that waits for half an hour."""
    command = [str(KILLER), "train", "digits-vlm", *JOINED, f"output={tmp_path / 'run'}"]
    survivor, victim = start_ranks(command, tmp_path, MOMENT="in step", STEP="5", VICTIM="1")
    try:
        assert victim.wait(240) == -signal.SIGKILL
        assert survivor.wait(60) not in (0, -signal.SIGKILL, -signal.SIGABRT)
    finally:
        for process in (survivor, victim):
            process.kill()
    said = (tmp_path / "rank0.log").read_text()
    assert f"go on with: adaskip train {tmp_path / 'run' / 'recipe.resolved.yaml'} --resume" in said
    assert "Traceback" not in said


# that of 1 is slow: torchrun kills it above, and the test below holds what Lightning does then
@pytest.mark.parametrize("victim", ["0", pytest.param("1", marks=pytest.mark.slow)])
def test_either_process_of_the_command_line_may_die(tmp_path: Path, victim: str) -> None:
    """Would catch: a process left behind that waits for ever, or that ends without a word on what to do."""
    folder = tmp_path / "run"
    done = run([*COMMAND, "digits-vlm", *TWO, f"output={folder}"], MOMENT="in step", STEP="5", VICTIM=victim)
    assert done.returncode != 0
    assert "another process of this run has ended" in done.stderr
    assert f"adaskip train {folder / 'recipe.resolved.yaml'} --resume" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_process_that_is_killed_for_a_dead_one_says_so_first(capfd: pytest.CaptureFixture[str]) -> None:
    """Lightning looks before the collective fails, and kills: would catch an end without a word on what to do."""
    log = logging.getLogger("lightning.fabric.strategies.launchers.subprocess_script")
    with says_when_lost("go on with --resume"):
        log.info("Child process with PID 1 terminated with code -9.")
    log.info("nobody listens any more")
    assert capfd.readouterr().err.count("adaskip: go on with --resume") == 1
