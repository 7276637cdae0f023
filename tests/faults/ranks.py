"""Start two processes of one program as torchrun starts them, with nobody who watches over them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

from tests.faults.runs import environment


def start_ranks(command: list[str], logs: Path, **more: str) -> list[subprocess.Popen[str]]:
    """Start ``python COMMAND`` twice; what each says goes to ``rank0.log`` and ``rank1.log`` in a folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    root = str(Path(__file__).parents[2])
    shared = {
        **environment(),
        "PYTHONPATH": os.pathsep.join([root, environment()["PYTHONPATH"]]),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "GROUP_RANK": "0",
        "TORCHELASTIC_RUN_ID": "test",
        **more,
    }
    processes = []
    for rank in range(2):
        with (logs / f"rank{rank}.log").open("w") as log:
            processes.append(
                subprocess.Popen(
                    [sys.executable, *command],
                    env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
    return processes


def finish_ranks(processes: list[subprocess.Popen[str]], logs: Path, seconds: float = 240) -> None:
    """Wait until both have ended well; what they said is in the error where one has not."""
    try:
        for process in processes:
            process.wait(seconds)
    finally:
        for process in processes:
            process.kill()
    said = "\n".join((logs / f"rank{rank}.log").read_text()[-3000:] for rank in range(2))
    assert [process.returncode for process in processes] == [0, 0], said
