"""How tests are spread over processes: those of a module stay together, for they share what is made once."""

from __future__ import annotations

import pytest

from tests.own_data import data, language_model  # noqa: F401 - fixtures

SPREAD = ("tests/contracts", "tests/properties")
"""Long rows of independent cases, which any process may take."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not item.nodeid.startswith(SPREAD):
            item.add_marker(pytest.mark.xdist_group(item.nodeid.split("::")[0]))
