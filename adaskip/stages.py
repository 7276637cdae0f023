"""Say which piece of work is under way, and how long it took: one line a stage.

Library code takes a `Stages` and names its pieces; the base class says nothing, so nothing is printed unasked.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, TextIO

Tell = Callable[[], str]
"""Says in a few words how a stage goes; called only when somebody is about to show them."""


class Advance(Protocol):
    """Hear how much of a stage is done."""

    def __call__(self, done: int, tell: Tell | None = None) -> None:
        """Take the new count, and what says how it goes."""
        ...


class Stages:
    """Receive the stages of a long piece of work, and print nothing.

    >>> with Stages()("counting", total=3) as advance:
    ...     advance(1)
    """

    @contextmanager
    def __call__(self, text: str, total: int | None = None) -> Iterator[Advance]:
        """Enter a stage, which lasts as long as the context; ``total`` is what ``advance`` counts up to, if known."""
        yield lambda done, tell=None: None

    def note(self, text: str) -> None:
        """Receive something the user should know that is no stage."""


SILENT = Stages()


class LineStages(Stages):
    """Print a line when a stage begins and one when it ends, and in between how far it is, every ``every`` seconds.

    Plain text without control codes, for log files and pipes.
    """

    def __init__(self, stream: TextIO | None = None, every: float = 30.0) -> None:
        self._stream, self.every = stream, every

    @contextmanager
    def __call__(self, text: str, total: int | None = None) -> Iterator[Advance]:
        """Print ``adaskip: TEXT ...``, then ``adaskip: TEXT: SECONDS s``."""
        self.note(f"{text} ...")
        started = last = time.monotonic()

        def advance(done: int, tell: Tell | None = None) -> None:
            nonlocal last
            if (now := time.monotonic()) - last >= self.every:
                last, words = now, "" if tell is None else tell()
                place = f"{done}{'' if total is None else f' of {total}'} after {now - started:.0f} s"
                self.note(f"{text}: {place}{words and f': {words}'}")

        yield advance
        self.note(f"{text}: {time.monotonic() - started:.1f} s")

    def note(self, text: str) -> None:
        """Print ``adaskip: TEXT``."""
        # looked up at each line: standard error may be another one by then
        print(f"adaskip: {text}", file=self._stream or sys.stderr, flush=True)
