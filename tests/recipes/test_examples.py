"""The pages' marked Python blocks run as they stand, one after the other, as a reader types them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import documents

RUN = """
import json, sys
names = {"__name__": "__main__"}
for page, text in json.load(sys.stdin):
    exec(compile(text, page, "exec"), names)
"""
MARKED = {page: [b for b in documents.blocks(page, "python") if b.runs] for page in documents.PAGES}


@pytest.mark.parametrize("page", [page for page, blocks in MARKED.items() if blocks])
def test_the_blocks_of_a_page_run(page: str, tmp_path: Path) -> None:
    """A reader types a page from top to bottom; catches a block that fails, and names the page's own line."""
    given = json.dumps([(page, block.placed) for block in MARKED[page]])
    paths = os.pathsep.join(filter(None, [str(documents.ROOT), os.environ.get("PYTHONPATH")]))  # this very checkout
    done = subprocess.run(
        [sys.executable, "-c", RUN],
        input=given,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout, "expected a page that shows something"


def test_there_are_blocks() -> None:
    """A marker that is spelt otherwise would leave every block unrun."""
    assert {"README.md", "docs/api.md", "docs/methods.md"} <= {page for page, blocks in MARKED.items() if blocks}
