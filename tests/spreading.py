"""How tests are spread over processes: those of a module stay together, for they share what is made once.

xdist's own groups are renamed node ids, which pytest 9.2 no longer takes: every fixture was made in every process.
"""

from __future__ import annotations

from typing import Any

import pytest

SPREAD = ("tests/contracts", "tests/properties")
"""Long rows of independent cases, which any process may take."""


def unit_of(nodeid: str) -> str:
    """What one process runs as a whole: a module; of a long row one test, or a class's tests of one case."""
    module, *names = nodeid.split("::")
    if not module.startswith(SPREAD):
        return module
    case = names[-1].partition("[")[2]
    return "::".join((module, *names[:-1], case)) if case and names[:-1] else nodeid


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Hand out whole units, whatever ``--dist`` says; the small ones come last, so that all processes end together."""
    from xdist.scheduler import LoadScopeScheduling

    class ByUnit(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return unit_of(nodeid)

        def schedule(self) -> None:
            super().schedule()
            for unit in [unit for unit in self.workqueue if unit.startswith(SPREAD)]:
                self.workqueue.move_to_end(unit)

    return ByUnit(config, log)
