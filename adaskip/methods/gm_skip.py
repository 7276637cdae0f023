"""GM-Skip: choose the layers by the task's own metric, beside what they save; early layers are protected."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from adaskip.errors import ConfigError
from adaskip.methods.budget import first_that_holds
from adaskip.methods.evidence import Evidence
from adaskip.methods.method import Method
from adaskip.survey.greedy import Path

Metric = Callable[[Sequence[Path]], Tensor]
"""What paths score by the task's metric, higher is better: float64 (p)."""


@dataclass(frozen=True)
class Search:
    """Weigh what is left of the score against what is left out: ``J(S) = M(S) / M(nothing) + weight * |S| / layers``.

    Args:
        metric: what paths score.
        layers: how many there are.
        weight: what leaving out everything is worth, in shares of the dense score.
        protected: so many first layers stay.
        budget: whether a path holds a budget, at which the search ends. None: it ends where J would fall.

    Raises:
        ConfigError: the dense model scores nothing, so that no share of it can be taken.
    """

    metric: Metric
    layers: int
    weight: float = 0.5
    protected: int = 2
    budget: Callable[[Path], bool] | None = None

    def __post_init__(self) -> None:
        if not (dense := float(self.metric([()])[0])) > 0:
            raise ConfigError(f"gm_skip: expected a metric above 0 of the dense model, got {dense:g}; J divides by it")

    def worth(self, paths: Sequence[Path]) -> list[float]:
        """Return J of each path."""
        dense, *scores = self.metric([(), *paths]).tolist()
        return [
            score / dense + self.weight * len(path) / self.layers for score, path in zip(scores, paths, strict=True)
        ]

    def rest(self, path: Path) -> list[int]:
        """Return the layers that may still go, the last first."""
        return [layer for layer in range(self.layers - 1, self.protected - 1, -1) if layer not in path]

    def greedy(self, path: Path = ()) -> Path:
        """Take, again and again, the layer with which J is largest, of equal ones the last."""
        (now,) = self.worth([path])
        while not self._enough(path) and (rest := self.rest(path)):
            options = [tuple(sorted((*path, layer))) for layer in rest]
            values = self.worth(options)
            best = max(values)
            if self.budget is None and best < now:
                break
            path, now = options[values.index(best)], best
        return path

    def reverse(self) -> Path:
        """Go once from the last layer to the first, and take a layer where J does not fall.

        Where the budget does not hold then, `greedy` goes on from there.
        """
        path: Path = ()
        (now,) = self.worth([path])
        for layer in self.rest(path):
            if self._enough(path):
                break
            option = tuple(sorted((*path, layer)))
            (value,) = self.worth([option])
            if value >= now:
                path, now = option, value
        return path if self.budget is None else self.greedy(path)

    def _enough(self, path: Path) -> bool:
        return self.budget is not None and self.budget(path)


def choose(evidence: Evidence, keep: float, seed: int) -> Path:
    """Return what the greedy search leaves out by the share of right answers."""
    search = Search(evidence.accuracy, evidence.layers, budget=lambda path: evidence.holds(path, keep))
    return first_that_holds(evidence, [search.greedy()], keep)


METHOD = Method(
    "gm_skip",
    "GM-Skip",
    "arXiv 2508.18227",
    choose,
    looks="answers",
    ours="the weight of what is saved (.5), the number of protected layers (2), and that a budget may ask for more "
    "than J would take",
)
