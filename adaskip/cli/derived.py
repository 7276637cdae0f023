"""Derive a command's options from a closed section of settings, when the command is called and not before."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any, Literal, get_args, get_origin

import typer

Work = Callable[[dict[str, str], bool], None]
POSITIONAL = "target"
"""The one setting that is an argument without a name."""


def call(settings: Any, work: Work, ctx: typer.Context, about: str) -> None:
    """Parse the words behind a command by the fields of its settings, and hand on those that were typed.

    Values stay texts: the section itself judges them, all at once.

    Args:
        settings: a pydantic model; descriptions of its fields are the help.
        work: gets the values by name, and whether ``--json`` was typed.
        ctx: of the outer command, which takes any words and has no help of its own.
        about: the help's first lines.
    """
    status = derive(settings, work, about)(ctx.args, prog_name=ctx.command_path, standalone_mode=False)
    if status:
        raise typer.Exit(status)


def derive(settings: Any, work: Work, about: str) -> typer.Typer:
    """Make the application of one command whose options are the fields of a section; arguments as in `call`."""

    def command(as_json: bool = False, **values: str | None) -> None:
        work({name: value for name, value in values.items() if value is not None}, as_json)

    parameters = [_parameter(name, info) for name, info in settings.model_fields.items()]
    as_json = Annotated[bool, typer.Option("--json", help="One JSON object on standard output, the rest on error.")]
    parameters.append(inspect.Parameter("as_json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=as_json))
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    command.__doc__ = about
    inner = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    inner.command()(command)
    return inner


def _parameter(name: str, info: Any) -> inspect.Parameter:
    shown = ",".join(map(str, info.default)) if isinstance(info.default, tuple) else info.default
    default = "" if shown in (None, "") else f" ({shown})"
    about = f"{info.description.removesuffix('.')}{default}."
    if name == POSITIONAL:
        declared = typer.Argument(help=about, metavar="[RUN]", show_default=False)
    else:
        declared = typer.Option(f"--{name.replace('_', '-')}", help=about, metavar=_metavar(info.annotation))
    annotation = Annotated[str | None, declared]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _metavar(kind: Any) -> str:
    """Say what a field's value looks like.

    >>> _metavar(int | None), _metavar(Literal["a", "b"]), _metavar(tuple[float, ...] | None)
    ('INTEGER', 'a|b', 'NUMBER,...')
    """
    if get_origin(kind) is Annotated:
        return _metavar(get_args(kind)[0])
    if get_origin(kind) is Literal:
        return "|".join(get_args(kind))
    if get_origin(kind) is tuple:
        return f"{_metavar(get_args(kind)[0])},..."
    if get_args(kind):  # a union with None
        return _metavar(next(part for part in get_args(kind) if part is not type(None)))
    return {int: "INTEGER", float: "NUMBER"}.get(kind, "TEXT")
