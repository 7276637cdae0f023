"""The examples of docs/theory.md run, and print what they say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCUMENT = Path(__file__).parents[2] / "docs" / "theory.md"
EXAMPLES = re.findall(r"^```python\n(.*?)^```", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_an_example_prints_what_it_says(example: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(example, {})
    said = re.search(r"^print\(.*\)  # (True .*)$", example, re.MULTILINE)
    printed = capsys.readouterr().out.strip()
    assert printed == said[1] if said else printed
