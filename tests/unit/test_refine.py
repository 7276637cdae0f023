"""Greedy plans of halves, mended: worked out by hand, and against every plan there is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain, combinations

import pytest
import torch
from torch import Tensor

from adaskip.survey.greedy import Path, Price, greedy_paths
from adaskip.survey.refine import give_back, refine_path


def price_of(single: Tensor, together: Tensor | None = None) -> Price:
    """Price paths of one input by what each site costs alone and each pair costs more."""
    pairs = torch.zeros(len(single), len(single)) if together is None else together

    def price(paths: Sequence[Path], rows: Sequence[int]) -> Tensor:
        return torch.stack([single[list(path)].sum() + pairs[list(path)][:, list(path)].sum() / 2 for path in paths])[
            None
        ]

    return price


def holds(saves: Tensor, needed: float) -> Callable[[Path], bool]:
    return lambda path: float(saves[list(path)].sum()) >= needed - 1e-9


def test_what_need_not_go_comes_back_dearest_first() -> None:
    """Four are to be saved: beside the MLP (3) one of two attentions (1) is enough, so the dearer one returns."""
    single, saves = torch.tensor([0.2, 0.3, 0.4]).double(), torch.tensor([1.0, 1.0, 3.0]).double()
    path, cost = give_back(price_of(single), [0], ((0, 1, 2), 0.9), holds(saves, 4))
    assert path == (0, 2)
    assert cost == pytest.approx(0.6)
    assert give_back(price_of(single), [0], ((0, 2), 0.6), holds(saves, 4)) == ((0, 2), 0.6)


def test_what_went_first_changes_places() -> None:
    """Site 0 is cheapest alone and dear beside 1 and 2; catches a plan that keeps what greed began with."""
    single, saves = torch.tensor([0.1, 0.2, 0.2, 0.25]).double(), torch.ones(4).double()
    together = torch.zeros(4, 4).double()
    together[0, 1:] = together[1:, 0] = 1.0
    price = price_of(single, together)
    greedy = greedy_paths(price, [0], single, 4, 4, holds(saves, 2), saves)[-1]
    assert greedy[0] == (0, 1)
    path, cost = refine_path(price, [0], greedy, single, 4, holds(saves, 2), saves)
    assert path == (1, 2)
    assert cost == pytest.approx(0.4)


def drawn(seed: int) -> tuple[Price, Tensor, Tensor]:
    """Return a price with interactions, what eight halves cost alone (inf for one that must stay), what they save."""
    draw = torch.Generator().manual_seed(seed)
    single = torch.rand(8, generator=draw).double()
    together = 0.5 * torch.rand(8, 8, generator=draw).double()
    price = price_of(single, together + together.T)
    allowed = single.clone()
    allowed[seed % 8] = torch.inf
    return price, allowed, torch.tensor([1.0, 3.0] * 4).double()


def test_against_every_plan_there_is() -> None:
    """It holds the budget, is no dearer than greed, and closes nine tenths of what greed leaves open."""
    left = {"greedy": 0.0, "refined": 0.0}
    for seed in range(20):
        price, single, saves = drawn(seed)
        enough = holds(saves, 6)
        greedy = greedy_paths(price, [0], single, 8, 3, enough, saves)[-1]
        path, cost = refine_path(price, [0], greedy, single, 3, enough, saves)
        assert enough(path)
        assert single[list(path)].isfinite().all()
        assert cost == pytest.approx(float(price([path], [0])))
        assert cost <= greedy[1]
        free = single.isfinite().nonzero().flatten().tolist()
        sets = chain.from_iterable(combinations(free, size) for size in range(1, 8))
        best = min(float(price([one], [0])) for one in sets if enough(one))
        left["greedy"] += greedy[1] - best
        left["refined"] += cost - best
    assert left["refined"] < 0.1 * left["greedy"]
