"""The rank of this process in a run of several; read from the environment, which launchers set before any import."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID")  # torchrun, Lightning's own launcher, srun


def is_first_process() -> bool:
    """Return whether this process is the one that makes folders, writes files and prints results."""
    return all(os.environ.get(name, "0") == "0" for name in _RANKS)


def launched() -> tuple[int, int]:
    """Count the processes that torchrun has started on this machine, and the machines; (1, 1) without torchrun."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return 1, 1
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return local, int(os.environ.get("WORLD_SIZE", local)) // local


def is_lost_process(error: BaseException) -> bool:
    """Return whether an error says that another process of the run is gone."""
    text = str(error).lower()
    return any(word in text for word in ("gloo", "nccl", "connection closed by peer", "connection reset by peer"))


class _LossHandler(logging.Handler):
    """Print a sentence on standard error when Lightning reports a child process that has ended."""

    def __init__(self, sentence: str) -> None:
        super().__init__(logging.INFO)
        self.sentence = sentence

    def emit(self, record: logging.LogRecord) -> None:
        """Write at once: the process is killed right after this."""
        print(f"adaskip: {self.sentence}", file=sys.stderr, flush=True)


@contextmanager
def says_when_lost(sentence: str) -> Iterator[None]:
    """Print this sentence, inside the context, when a process that Lightning has started dies.

    Lightning watches its children every few seconds and, when one is dead, kills this process with SIGKILL. If that
    happens before the next collective operation fails here, no exception is raised that could tell the user.
    """
    log = logging.getLogger("lightning.fabric.strategies.launchers.subprocess_script")
    handler = _LossHandler(sentence)
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)


@contextmanager
def closes_its_group() -> Iterator[None]:
    """Close the group of processes that was opened inside, once all is done there.

    The threads of a group that is left open may abort a process on its way out, and a launcher then calls a run lost
    that is whole. After an error it stays open: closing waits for processes that may be gone.
    """
    from torch import distributed

    if not distributed.is_available() or distributed.is_initialized():
        yield
        return
    yield
    if distributed.is_initialized():
        distributed.destroy_process_group()
