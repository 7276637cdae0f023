"""The README's promises: its runnable blocks run, its commands exist, its files are there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"<!-- runs as a test -->\n```python\n(.*?)```", README, re.S)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_block_runs(block: str, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "tensor" in done.stdout


def test_there_is_a_block() -> None:
    assert BLOCKS


def test_every_verb_is_in_the_readme_and_exists() -> None:
    from typer.main import get_command

    from adaskip.cli import app

    verbs = set(get_command(app).commands)  # type: ignore[attr-defined]
    commands = README.split("## On the command line")[1].split("```")[1]
    named = set(re.findall(r"^adaskip (\w+)", commands, re.M))
    assert named <= verbs
    assert verbs <= named


def test_linked_files_exist() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert links
    assert not [link for link in links if not (ROOT / link).exists()]


def test_the_tree_is_the_tree() -> None:
    tree = README.split("## The tree")[1].split("```")[1]
    named = set(re.findall(r"(\w+\.py|\w+/)", tree))
    assert not [name for name in named if not list(ROOT.rglob(name.rstrip("/")))]
