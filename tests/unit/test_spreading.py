"""Which tests share a process, in a small suite of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
MODULE = """
import os
from pathlib import Path
import pytest

def note(name):
    with Path("log").open("a") as log:
        print(name, os.getpid(), file=log)
"""
RUN = """
@pytest.mark.parametrize("step", range(6))
def test_long(step):
    note(Path(__file__).stem)
"""
ROW = """
@pytest.mark.parametrize("case", "abcdef")
class TestRow:
    def test_one(self, case):
        note(case)
    def test_other(self, case):
        note(case)
"""


def test_what_is_made_once_is_made_in_one_process(tmp_path: Path) -> None:
    """Would catch: both processes with tests of one module, whose long run each of them would make anew."""
    for name, tests in (("faults/test_run", RUN), ("faults/test_another", RUN), ("contracts/test_row", ROW)):
        path = tmp_path / "tests" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(MODULE + tests)
    command = ["-m", "pytest", "-q", "-n2", "--dist", "loadgroup", "-p", "tests.spreading", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, *command], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True,
        text=True,
    )  # fmt: skip
    assert "24 passed" in done.stdout, done.stdout + done.stderr
    processes: dict[str, set[str]] = {}
    for line in (tmp_path / "log").read_text().splitlines():
        name, process = line.split()
        processes.setdefault(name, set()).add(process)
    assert processes.keys() == {"test_run", "test_another", *"abcdef"}
    assert {name: len(own) for name, own in processes.items()} == dict.fromkeys(processes, 1)
    assert len(set.union(*processes.values())) == 2
