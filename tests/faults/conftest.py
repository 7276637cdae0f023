"""One short run for all tests of the verbs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.finished import short_run


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short, whole run; change copies of it only."""
    return short_run(tmp_path_factory.mktemp("verbs") / "run")
