"""The ledger of prices: what is asked once, and what a stopped search finds again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from adaskip.survey.greedy import greedy_paths
from adaskip.survey.ledger import Ledger
from adaskip.survey.price_file import PriceFile


def prices(folder: Path) -> PriceFile:
    return PriceFile(folder / "prices", {"inputs": "those of this test"})


class Meter:
    """Prices that add up, with a count of what was measured; after ``limit`` of them the machine is switched off."""

    def __init__(self, limit: int = 10**9) -> None:
        self.count, self.limit = 0, limit

    def __call__(self, paths: Sequence[tuple[int, ...]], rows: Sequence[int]) -> torch.Tensor:
        self.count += len(paths) * len(rows)
        if self.count > self.limit:
            raise KeyboardInterrupt
        single = torch.arange(1.0, 7.0).double()
        return torch.tensor([[float(single[list(path)].sum()) + row for path in paths] for row in rows]).double()


def test_a_price_is_measured_once() -> None:
    meter = Meter()
    ledger = Ledger(meter, inputs=4)
    assert ledger([(0,), (1, 2)], [3, 0]).tolist() == [[4.0, 8.0], [1.0, 5.0]]
    assert meter.count == 4
    assert ledger([(1, 2), (4,), (1, 2)], [0, 1]).tolist() == [[5.0, 5.0, 5.0], [6.0, 6.0, 6.0]]
    assert meter.count == 7, "(1, 2) for input 1 and (4,) for both were not known"


def test_a_search_that_was_stopped_measures_only_what_it_had_not(tmp_path: Path) -> None:
    """Catches a file that is not read, is written at the end only, or mixes up paths: minutes of pricing were lost."""
    file, single = prices(tmp_path), torch.arange(1.0, 7.0)
    whole = Meter()
    expected = greedy_paths(Ledger(whole, 4), range(4), single, 4, width=3)
    with pytest.raises(KeyboardInterrupt):
        greedy_paths(Ledger(Meter(limit=2 * whole.count // 3), 4, file), range(4), single, 4, width=3)
    rest = Meter()
    assert greedy_paths(Ledger(rest, 4, file), range(4), single, 4, width=3) == expected
    assert 0 < rest.count < whole.count / 2


def test_prices_come_in_the_order_that_they_were_asked_in() -> None:
    """Catches columns in an order of the ledger's own, which would give every path another's price."""
    ledger = Ledger(Meter(), inputs=1)
    assert ledger([(4,), (0,), (2,)], [0]).tolist() == [[5.0, 1.0, 3.0]]
    assert ledger([(2,), (4,)], [0]).tolist() == [[3.0, 5.0]]


def test_what_was_measured_is_kept_though_the_rest_of_a_question_was_not(tmp_path: Path) -> None:
    """One question may take several measurements; catches a file that is written once all of them are made."""
    file = prices(tmp_path)
    ledger = Ledger(Meter(limit=5), 3, file)
    ledger([(0,)], [0])  # so that (0,) lacks two inputs, and (1,) three
    with pytest.raises(KeyboardInterrupt):
        ledger([(0,), (1,)], [0, 1, 2])
    known = Ledger(Meter(limit=0), 3, file)
    assert known([(0,)], [0, 1, 2]).tolist() == [[1.0], [2.0], [3.0]]


def test_a_file_that_cannot_be_replaced_stays_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process killed while it writes; catches a file that is overwritten in place."""
    file = prices(tmp_path)
    Ledger(Meter(), 3, file)([(0,)], [0])
    before = file.path.read_bytes()

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        Ledger(Meter(), 3, file)([(1,)], [0])
    assert file.path.read_bytes() == before
