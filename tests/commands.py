"""The tables of options in docs/cli.md, made of the commands themselves: `python -m tests.commands`."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

from typer.main import get_command

from adaskip.bench.settings import BenchSettings
from adaskip.cli import app
from adaskip.cli.derived import derive

PAGE = Path(__file__).parents[1] / "docs" / "cli.md"
_VALUES = {int: "N", float: "X", str: "TEXT", Path: "PATH"}
BLOCK = re.compile(r"(<!-- options of (\w+) -->\n).*?(<!-- /options -->)", re.DOTALL)


DERIVED = {"bench": BenchSettings}
"""Verbs that make their options when they are called, and what they make them of."""


def verbs() -> dict[str, Any]:
    """Return the commands by name."""
    found: dict[str, Any] = dict(get_command(app).commands)  # type: ignore[attr-defined]
    for verb, settings in DERIVED.items():
        found[verb] = get_command(derive(settings, lambda values, as_json: None, found[verb].help))
    return found


def table(verb: str) -> str:
    """Return a Markdown table of a verb's arguments and options: name, default, meaning."""
    lines = ["| argument | default | meaning |", "|---|---|---|"]
    command, fields = verbs()[verb], getattr(DERIVED.get(verb), "model_fields", {})
    types = get_type_hints(inspect.unwrap(command.callback))
    for param in command.params:
        if param.param_type_name == "argument":
            name = param.metavar or param.name.upper()
        else:
            name = ", ".join([*param.opts, *param.secondary_opts])
            name = name if param.is_flag else f"{name} {param.metavar or _value(types[param.name])}"
        if param.name in fields:  # a derived option says its default in its help as well
            about, default = fields[param.name].description, fields[param.name].default
        else:
            about, default = param.help, "required" if param.required else param.default
        about = re.sub(r"(?<!\.)\.$", "", about or "")
        cells = (cell.replace("|", r"\|") for cell in (f"`{name}`", _shown(default), about))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _value(hint: Any) -> str:
    """Return what stands for an option's value; of a type that may be left out, the type itself."""
    return next(_VALUES[kind] for kind in _parts(hint) if kind in _VALUES)


def _parts(hint: Any) -> Iterator[Any]:
    """Yield a type and those inside it, outermost first: of ``list[Path] | None`` also ``Path``."""
    yield hint
    for part in get_args(hint):
        yield from _parts(part)


def _shown(default: Any) -> str:
    """Return a default as it would be typed; nothing for a flag, for none, and for the folder one is in."""
    if default == "required":
        return "required"
    if default is None or isinstance(default, bool | list) or str(default) in ("", "."):
        return ""
    typed = ",".join(map(str, default)) if isinstance(default, tuple) else default
    return f"`{typed:g}`" if isinstance(typed, float) else f"`{typed}`"


def fill(text: str) -> str:
    """Return the page with every table made anew."""
    return BLOCK.sub(lambda found: found[1] + table(found[2]) + found[3], text)


if __name__ == "__main__":
    PAGE.write_text(fill(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
