"""Every example in a docstring of the package is run as it stands."""

from __future__ import annotations

import doctest
from importlib import import_module
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "adaskip"
WITH_EXAMPLES = sorted(p for p in PACKAGE.rglob("*.py") if ">>> " in p.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", WITH_EXAMPLES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_examples_give_what_they_say(path: Path) -> None:
    """A reader copies an example out of `help()`; this catches one that fails, and one that doctest passes over."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    module = import_module(".".join(part for part in parts if part != "__init__"))
    written = path.read_text(encoding="utf-8").count(">>> ")
    result = doctest.testmod(module)
    assert result.attempted == written, f"{written} examples are written, {result.attempted} were run"
    assert not result.failed
