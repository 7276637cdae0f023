"""Fixtures of all tests, and how tests are spread over processes."""

from __future__ import annotations

from tests.own_data import data, language_model, vision_model  # noqa: F401 - fixtures
from tests.spreading import pytest_xdist_make_scheduler  # noqa: F401 - a hook
