"""The tables of options in docs/cli.md, made of the commands themselves: `python -m tests.commands`."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any, get_args, get_type_hints

from typer.main import get_command

from adaskip.cli import app

PAGE = Path(__file__).parents[1] / "docs" / "cli.md"
_VALUES = {int: "N", float: "X", str: "TEXT", Path: "PATH"}
BLOCK = re.compile(r"(<!-- options of (\w+) -->\n).*?(<!-- /options -->)", re.DOTALL)


def verbs() -> dict[str, Any]:
    """Return the commands by name."""
    found: dict[str, Any] = get_command(app).commands  # type: ignore[attr-defined]
    return found


def table(verb: str) -> str:
    """Return a Markdown table of a verb's arguments and options: name, default, meaning."""
    lines = ["| argument | default | meaning |", "|---|---|---|"]
    command = verbs()[verb]
    types = get_type_hints(inspect.unwrap(command.callback))
    for param in command.params:
        if param.param_type_name == "argument":
            name, about = param.metavar or param.name.upper(), param.help
        else:
            name, about = ", ".join([*param.opts, *param.secondary_opts]), param.help
            name = name if param.is_flag else f"{name} {_value(types[param.name])}"
        about = re.sub(r"(?<!\.)\.$", "", (about or "").replace("|", r"\|"))
        lines.append(f"| `{name}` | {_default(param)} | {about} |")
    return "\n".join(lines) + "\n"


def _value(hint: Any) -> str:
    """Return what stands for an option's value; of a type that may be left out, the type itself."""
    return next(_VALUES[kind] for kind in (hint, *get_args(hint)) if kind in _VALUES)


def _default(param: Any) -> str:
    """Return the default as it would be typed; nothing for a flag, for none, and for what has to be given."""
    if param.required:
        return "required"
    if param.default is None or isinstance(param.default, bool | list) or str(param.default) in ("", "."):
        return ""
    return f"`{param.default}`"


def fill(text: str) -> str:
    """Return the page with every table made anew."""
    return BLOCK.sub(lambda found: found[1] + table(found[2]) + found[3], text)


if __name__ == "__main__":
    PAGE.write_text(fill(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
