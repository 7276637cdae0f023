"""What every verb shares: its result for people or for programs, its exit status, its errors."""

from __future__ import annotations

import _thread
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Any, Protocol

import typer
from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table

from adaskip.errors import AdaSkipError, CheckpointError, did_you_mean
from adaskip.ranks import is_first_process
from adaskip.stages import SILENT, Advance, LineStages, Stages, Tell

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""
WIDTH = 100
"""Columns of a table that is written to a file or a pipe."""
REDRAWN = 0.5
"""Seconds between two readings of how a stage goes, which may have to wait for a GPU."""
AGAIN = 0.05
"""Seconds after which a swallowed Ctrl-C is raised again, so that the callback that swallowed it is over."""


class Result(Protocol):
    """Hold the result of a verb: a frozen dataclass that can say itself in plain values."""

    def to_dict(self) -> dict[str, Any]:
        """Return what ``--json`` prints; ``ok``, where it is there, decides on the exit status."""
        ...


def do(work: Callable[[], Result | dict[str, Any]], show: Callable[[dict[str, Any]], None], as_json: bool) -> None:
    """Do a verb's work, then print its result for people or for programs, and turn it into an exit status."""
    try:
        with _keeping_interrupts(), _stdout_to_stderr() if as_json else nullcontext():
            result = work()
            values = result if isinstance(result, dict) else result.to_dict()
    except (AdaSkipError, OSError) as error:
        _tell(str(error), as_json)
        raise typer.Exit(2) from None
    except KeyboardInterrupt as error:
        _tell(str(error) or "interrupted", as_json)
        raise typer.Exit(INTERRUPTED) from None
    if not is_first_process():
        raise typer.Exit(0 if values.get("ok", True) else 1)
    if as_json:
        emit(values)
    else:
        show(values)
    if not values.get("ok", True):
        raise typer.Exit(1)


@contextmanager
def _keeping_interrupts() -> Iterator[None]:
    """Raise Ctrl-C a second time where Python swallows the first: in ``__del__`` or a weak reference's callback."""

    def hear(swallowed: Any) -> None:
        if issubclass(swallowed.exc_type, KeyboardInterrupt):
            threading.Timer(AGAIN, _thread.interrupt_main).start()
        else:
            before(swallowed)

    before, sys.unraisablehook = sys.unraisablehook, hear
    try:
        yield
    finally:
        sys.unraisablehook = before


def _tell(text: str, as_json: bool) -> None:
    if as_json:
        emit_error(text)
    else:
        print(f"adaskip: {text}", file=sys.stderr)


class BarStages(Stages):
    """Show a bar while a stage lasts, and a line with its seconds when it has ended; for terminals."""

    @contextmanager
    def __call__(self, text: str, total: int | None = None) -> Iterator[Advance]:
        """Show the bar on standard error: count, time gone, time left; where a stage contains another, it pauses."""
        console, started, last = Console(stderr=True), time.monotonic(), -REDRAWN
        columns: list[ProgressColumn] = [
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
        ]
        columns += [MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()] if total is not None else []
        with Progress(
            *columns, TextColumn("{task.fields[words]}", markup=False), console=console, transient=True
        ) as bar:
            task = bar.add_task(text, total=total, words="")

            def advance(done: int, tell: Tell | None = None) -> None:
                nonlocal last
                if tell is not None and (now := time.monotonic()) - last >= REDRAWN:
                    last = now
                    bar.update(task, words=tell())
                bar.update(task, completed=done)

            yield advance
        self.note(f"{text}: {time.monotonic() - started:.1f} s")

    def note(self, text: str) -> None:
        """Print ``adaskip: TEXT``."""
        print(f"adaskip: {text}", file=sys.stderr, flush=True)


def terminal_stages(bars: bool = True) -> Stages:
    """Choose how stages are shown: bars on a terminal that can draw them, else plain lines; by one process of a run."""
    if not is_first_process():
        return SILENT
    draws = sys.stderr.isatty() and os.environ.get("TERM", "").lower() not in ("dumb", "unknown")
    return BarStages() if bars and draws else LineStages()


@contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Send what libraries and child processes print to standard error, at the level of the file descriptor as well."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def emit(values: dict[str, Any]) -> None:
    """Print one strict JSON object: NaN and infinity, which JSON does not know, become null."""
    text = json.dumps(values, default=str)
    print(json.dumps(json.loads(text, parse_constant=lambda _: None)))


def emit_error(text: str) -> None:
    head, *faults = text.splitlines()
    emit({"ok": False, "error": head, "faults": [fault.strip() for fault in faults] or [head]})


def existing(run: Path) -> Path:
    """Return the folder itself.

    Raises CheckpointError where there is none; names a sibling folder of a similar name.
    """
    if run.is_dir():
        return run
    if run.exists():
        raise CheckpointError(f"{run}: is a file; expected a run folder, which `adaskip train` makes")
    siblings = [path.name for path in run.parent.iterdir() if path.is_dir()] if run.parent.is_dir() else []
    hint = did_you_mean(run.name, siblings)
    near = f"; {hint}" if hint.startswith("did") else "."
    raise CheckpointError(f"{run}: no such run folder{near} Train one with: adaskip train digits-vlm output={run}")


def say(text: str) -> None:
    Console(markup=False, highlight=False, soft_wrap=True).print(text)


def table(rows: list[dict[str, Any]], hidden: Sequence[str] = (), shown: Sequence[str] | None = None) -> None:
    """Print rows as a table that fits 100 columns; the first row names the columns, ``shown`` some of them."""
    names = [name for name in (rows[0] if rows else ()) if name not in hidden and (shown is None or name in shown)]
    if len(names) < 2 and shown is not None:
        return
    columns = [Column(name.replace("_", "\n"), no_wrap=name != "sentence", vertical="top") for name in names]
    table = Table(*columns, box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    for row in rows:
        table.add_row(*(_cell(row.get(name)) for name in names))
    # without a terminal there is no edge to cut figures off at; rich would take 80 columns for one
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else WIDTH
    Console(markup=False, highlight=False, width=width).print(table)


def pairs(values: dict[str, Any], prefix: str = "") -> None:
    """Print one `name  value` a line; the name of a nested value is its path."""
    for name, value in values.items():
        if isinstance(value, dict):
            pairs(value, f"{prefix}{name}.")
        else:
            say(f"{prefix + name:28} {_cell(value)}")


def sourced(values: dict[str, Any], sources: dict[str, str], prefix: str = "") -> None:
    """Print one `name  value  source` a line, as `pairs` does."""
    for name, value in values.items():
        if isinstance(value, dict) and value:
            sourced(value, sources, f"{prefix}{name}.")
        else:
            say(f"{prefix + name:28} {_cell(value):28} {sources.get(prefix + name, '')}".rstrip())


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
