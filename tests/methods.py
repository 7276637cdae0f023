"""The table of methods in docs/policies.md, made of the methods themselves: `python -m tests.methods`."""

from __future__ import annotations

import re
from pathlib import Path

from adaskip.methods.method import Method, find
from adaskip.methods.names import METHODS

PAGE = Path(__file__).parents[1] / "docs" / "policies.md"
BLOCK = re.compile(r"(<!-- methods -->\n).*?(<!-- /methods -->)", re.DOTALL)
_LOOKS = {
    "nothing": "nothing",
    "states": "a dense pass",
    "costs": "exact costs",
    "answers": "right answers (labels)",
}


def row(method: Method) -> str:
    """Return a method's line: what it is, what it can leave out, what it looks at, and what is ours in it."""
    groups = ", ".join(method.groups) + (" (keys kept)" if method.kv == "kept" else "")
    looks = "a draw" if method.draws else _LOOKS[method.looks]
    cells = (f"`{method.name}`", method.title, method.source, groups, looks, method.ours or "nothing")
    return f"| {' | '.join(cells)} |"


def table() -> str:
    """Return the whole table."""
    head = ["| name | method | source | group | looks at | what is ours |", "|---|---|---|---|---|---|"]
    return "\n".join([*head, *(row(find(name)) for name in METHODS)]) + "\n"


def filled(page: str) -> str:
    """Return the page with its table made anew."""
    return BLOCK.sub(lambda match: match[1] + table() + match[2], page)


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
