"""The map of the package in docs/tree.md, made of the first line of each module's docstring: `python -m tests.tree`."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "tree.md"
HEAD = """# The package, module by module

Each line is the first line of the module's docstring. `python -m tests.tree` writes this page, and a test compares it
with the package; to change a line, change the docstring. The order in which folders may import one another stands in
[CONTRIBUTING.md](../CONTRIBUTING.md).
"""


def first_line(path: Path) -> str:
    """Return what a module says of itself in one line.

    Raises:
        ValueError: it has no docstring.
    """
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    if not docstring:
        raise ValueError(f"{path}: expected a docstring whose first line says what the module is for")
    return docstring.splitlines()[0].replace("|", r"\|").removesuffix(".")


def page() -> str:
    """Return the whole page: one table a folder, the folder's own line above it."""
    folders: dict[Path, list[Path]] = {}
    for path in sorted((ROOT / "adaskip").rglob("*.py")):
        folders.setdefault(path.parent, []).append(path)
    parts = [HEAD]
    for folder, modules in sorted(folders.items()):
        start = folder / "__init__.py"
        parts.append(f"\n## {folder.relative_to(ROOT)}\n\n{first_line(start)}.\n")
        rows = [
            f"| [{path.name}](../{path.relative_to(ROOT)}) | {first_line(path)} |" for path in modules if path != start
        ]
        if rows:
            parts.append("\n".join(["", "| module | what it is for |", "|---|---|", *rows, ""]))
    return "".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
