"""Mend a greedy plan of halves: what need not go comes back, then each in turn comes back and others go in its place.

Greed ends with the first plan that holds the budget. Where the last to go is an MLP, three times what an attention
saves, it may leave out far more than asked for; and what went first may be needed beside what went later.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from adaskip.survey.greedy import Path, Price, greedy_paths


def refine_path(
    price: Price,
    rows: Sequence[int],
    found: tuple[Path, float],
    single: Tensor,
    width: int,
    enough: Callable[[Path], bool],
    saves: Tensor,
) -> tuple[Path, float]:
    """Return a path that leaves out enough and costs these inputs no more, and its mean cost.

    Each site of the path is tried once: it comes back, and greed goes on without it. Costs a few ``width`` paths on the
    inputs for each of them.

    Args:
        price: what paths cost inputs.
        rows: the numbers of the inputs.
        found: a path that leaves out enough, and its mean cost.
        single: (s) what leaving out each site alone costs them; inf for one that must stay.
        width: so many sites are tried each time.
        enough: whether a path leaves out enough.
        saves: (s) what leaving out each saves.
    """
    path, cost = give_back(price, rows, found, enough)
    for site in path:
        if site not in path:  # it has changed places with others since
            continue
        others = single.double().clone()
        others[site] = torch.inf
        options = greedy_paths(price, rows, others, len(others), width, enough, saves, start=_without(path, site))
        if options and enough(options[-1][0]):
            path, cost = min((path, cost), give_back(price, rows, options[-1], enough), key=lambda option: option[1])
    return path, cost


def give_back(
    price: Price, rows: Sequence[int], found: tuple[Path, float], enough: Callable[[Path], bool]
) -> tuple[Path, float]:
    """Return the path without what need not go, one site after the other, always the one whose return helps most."""
    path, cost = found
    while shorter := [rest for rest in (_without(path, site) for site in path) if enough(rest)]:
        costs = price(shorter, rows).double().mean(0)
        best = int(costs.argmin())
        if float(costs[best]) >= cost:
            break
        path, cost = shorter[best], float(costs[best])
    return path, cost


def _without(path: Path, site: int) -> Path:
    return tuple(other for other in path if other != site)
