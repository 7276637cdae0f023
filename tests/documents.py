"""The pages that users read, taken apart: their Python, their command lines, their links, and the errors they quote."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = {
    str(path.relative_to(ROOT)): path
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
}
RUNS = "<!-- runs as a test -->"
_FENCE = re.compile(rf"^({re.escape(RUNS)}\n)?```(\w*)\n(.*?)^```$", re.M | re.S)


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    page: str
    line: int  # of its first line within the page, counted from 1
    language: str
    text: str
    runs: bool  # marked to be run, and not only read

    @property
    def placed(self) -> str:
        """Its text behind as many empty lines as stand before it, so that a traceback names the page's own line."""
        return "\n" * (self.line - 1) + self.text


def read(page: str) -> str:
    return PAGES[page].read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[Block]:
    """Return the page's blocks of one language, in order."""
    text = read(page)
    found = []
    for match in _FENCE.finditer(text):
        if match[2] == language:
            found.append(Block(page, text[: match.start(3)].count("\n") + 1, match[2], match[3], bool(match[1])))
    return found


def commands(page: str) -> list[str]:
    """Return the arguments of each command line of the page's shell blocks that calls adaskip, as one string a line."""
    lines = [line for block in blocks(page, "bash") for line in block.text.replace("\\\n", " ").splitlines()]
    called = (re.match(r"(?:adaskip|torchrun .*-m adaskip\.cli)\s+(.*)", line) for line in lines)
    return [match[1] for match in called if match]


def spans(page: str) -> list[str]:
    """Return what stands between backticks in the page's prose; a span may go over a line's end."""
    prose = _FENCE.sub("", read(page))
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]


@cache
def sentences() -> tuple[str, ...]:
    """Return every text in the package's source, with ``…`` where a value is filled in."""
    found: list[str] = []
    for path in sorted((ROOT / "adaskip").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found += _texts(tree)
    return tuple(found)


def _texts(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            parts = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
            yield "".join(map(str, parts))
