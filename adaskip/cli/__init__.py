"""`adaskip VERB`: one verb for each piece of work. Heavy imports happen inside the verbs, so `--help` is instant."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import typer

from adaskip.cli import measuring, runs, training
from adaskip.cli.shared import app
from adaskip.terminal import INTERRUPTED, emit_error

__all__ = ["app", "main", "measuring", "runs", "training"]


def main(args: Sequence[str] | None = None) -> None:
    """Run a command and exit 0 on success, 1 when a check failed, 2 on bad input, 130 after Ctrl-C."""
    words = list(sys.argv[1:] if args is None else args)
    try:
        sys.exit(app(words, prog_name="adaskip", standalone_mode=False) or 0)
    except typer.Abort:
        print("adaskip: interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except Exception as error:
        if not hasattr(error, "format_message"):  # not a usage error
            raise
        if "--json" in words:
            emit_error(error.format_message())
        error.show()  # type: ignore[attr-defined]
        sys.exit(2)
