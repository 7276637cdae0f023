"""The application that the verbs belong to, and the arguments that several of them take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from adaskip.version import __version__

app = typer.Typer(
    help="Teach a frozen transformer which of its layers an input does not need, and really leave that work out.",
    epilog="Start with: adaskip train digits-vlm. Exit status: 0 success, 1 a check failed, 2 bad input.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

Json = Annotated[bool, typer.Option("--json", help="One JSON object on standard output, all else on standard error.")]


def complete_recipe(incomplete: str) -> list[str]:
    """Complete the name of a shipped recipe."""
    from adaskip.recipe import recipes

    return [name for name in recipes() if name.startswith(incomplete)]


RecipeName = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE", help="A name that `adaskip ls` shows, or a YAML file.", autocompletion=complete_recipe
    ),
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY.PATH=VALUE]...", help="For example objective.keep=0.5.")
]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, for example runs/digits-vlm.")]
Longest = Annotated[
    int | None,
    typer.Option("--max-new-tokens", min=1, help="Longest answer, in tokens; default: the longest of the data."),
]


def _version(requested: bool) -> None:
    if requested:
        print(f"adaskip {__version__}")
        raise typer.Exit


Version = Annotated[
    bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
]


@app.callback()
def _common(version: Version = False) -> None: ...
