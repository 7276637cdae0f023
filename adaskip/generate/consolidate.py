"""Choose few paths for many prompts: each prompt gets a superset of the layers that its routers asked for."""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor

from adaskip.errors import ConfigError

PathCosts = tuple[Tensor, Tensor]
"""What running a layer costs each prompt, and what leaving it costs: float64 (l n) each."""


def path_cost(path: Tensor, requested: Tensor, prompt: PathCosts, answer: PathCosts) -> Tensor:
    """Return the FLOPs that prompts spend beyond what they asked for, when they follow a path that holds it.

        [path != requested] * prefill(path) + answer(path) - answer(requested)

    A prompt whose path grows is prefilled again: the keys of the added layers do not exist yet, and every later layer
    sees other states. An estimate of the answers' length makes it an estimator.

    Args:
        path: bool (l n), what each prompt follows.
        requested: bool (l n), what its routers asked for.
        prompt: prices of the prompts' own tokens.
        answer: prices of the tokens to come.

    Returns:
        float64 (n).
    """

    def total(keep: Tensor, prices: PathCosts) -> Tensor:
        return torch.where(keep, *prices).sum(0)

    prefill = torch.where((path != requested).any(0), total(path, prompt), 0.0)
    return prefill + total(path, answer) - total(requested, answer)


def consolidate(requested: Tensor, at_most: int, prompt: PathCosts, answer: PathCosts) -> Tensor:
    """Choose at most so many distinct paths, each a superset of what its members asked for, at little added cost.

    Agglomerative: each distinct path begins as a cluster; the two clusters whose union adds the fewest FLOPs
    (`path_cost`) are merged, until ``at_most`` remain. Deterministic; greedy, so a heuristic: not always the cheapest
    clustering.

    Args:
        requested: bool (l n), column j is what prompt j asked for.
        at_most: number of paths, at least 1.
        prompt: prices of the prompts' own tokens.
        answer: prices of the tokens to come.

    Returns:
        bool (l n): the path that each prompt is to follow.

    Raises:
        ConfigError: ``at_most`` is no number of paths.
    """
    if at_most < 1:
        raise ConfigError(f"paths: expected at least 1 path to be left, got {at_most}")

    def added(path: Tensor, rows: list[int]) -> float:
        parts = [tuple(x[:, rows] for x in prices) for prices in (prompt, answer)]
        return float(path_cost(path[:, None].expand(-1, len(rows)), requested[:, rows], parts[0], parts[1]).sum())  # type: ignore[arg-type]

    rows: dict[tuple[bool, ...], list[int]] = {}
    for row, path in enumerate(requested.T.tolist()):
        rows.setdefault(tuple(path), []).append(row)
    clusters = {number: (torch.tensor(path), members) for number, (path, members) in enumerate(rows.items())}
    alone = {number: added(*cluster) for number, cluster in clusters.items()}
    growth: dict[tuple[int, int], float] = {}
    for fresh in range(len(clusters), 2 * len(clusters) - at_most):
        for i, j in combinations(clusters, 2):
            if (i, j) not in growth:
                union = clusters[i][0] | clusters[j][0]
                growth[i, j] = added(union, clusters[i][1] + clusters[j][1]) - alone[i] - alone[j]
        i, j = min(combinations(clusters, 2), key=growth.__getitem__)
        (one, ours), (other, theirs) = clusters.pop(i), clusters.pop(j)
        clusters[fresh] = one | other, ours + theirs
        alone[fresh] = added(*clusters[fresh])
    result = requested.clone()
    for path, members in clusters.values():
        result[:, members] = path[:, None]
    return result
