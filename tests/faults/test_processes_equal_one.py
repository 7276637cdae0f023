"""Two processes that share every batch train as one does that reads it alone: losses, routers, validation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.faults import shared_training
from tests.faults.ranks import finish_ranks, start_ranks
from tests.faults.shared_training import CASES, STEPS, fit


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where both processes left what they ended with, a folder a case."""
    folder = tmp_path_factory.mktemp("two")
    finish_ranks(start_ranks([str(Path(shared_training.__file__)), str(folder), *CASES], folder), folder)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_losses_routers_and_validation_are_those_of_one_process(name: str, two: Path, tmp_path: Path) -> None:
    """29 records in batches of 8 and 13 to validate on, of many lengths: no share is as large as the other.

    Would catch: draws of each process's own; rows that count less because their process has more of them; the square
    of each process's own gap in the budget; losses of one process in the files; rows that both validate on; a layer
    held on one process alone. ``sharded`` stops after four steps and goes on, each process with half of every layer:
    gradients that nobody averages, and a checkpoint of halves.
    """
    alone = fit(tmp_path, 1, **CASES[name])
    both: list[dict[str, Any]] = [json.loads((two / name / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert both[0] == both[1] | {"seen": both[0]["seen"]}
    assert len(alone["losses"]) == STEPS * CASES[name].get("micro", 1)
    assert both[0]["losses"][:3] == pytest.approx(alone["losses"][:3], rel=1e-6)
    assert both[0]["losses"] == pytest.approx(alone["losses"], rel=1e-4)
    expected, found = (torch.tensor(run["routers"]) for run in (alone, both[0]))
    # Adam gives a gradient that is all rounding a step of full size: 0.03 here, six times
    assert (found - expected).abs().max() < 2e-3
    assert (found - expected).abs().mean() < 1e-6
    assert both[0]["multiplier"] == pytest.approx(alone["multiplier"], rel=1e-5)
    assert both[0]["held"] == alone["held"]
    assert name != "held" or len(alone["held"]) > 1, "nothing was held while training"
    seen = [sum(run["seen"]) for run in both]
    assert sum(seen) == 13, "rows were validated on twice"
    assert min(seen) > 0
    assert both[0]["kinds"] == alone["kinds"]
    assert both[0]["validation"] == pytest.approx(alone["validation"], rel=1e-4)
    looks = [json.loads(line)["step"] for line in (two / name / "conditions.jsonl").read_text().splitlines()]
    assert looks == sorted({*looks}), "written by both"
    assert looks[-1] == STEPS
    assert both[0]["backbone"] == alone["backbone"], "saved routers know another backbone"
    assert both[0]["share"] == (0.5 if CASES[name].get("sharded") else 1.0)
