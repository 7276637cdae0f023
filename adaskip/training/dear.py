"""Find the layers that no router should skip: alone they cost so much more than they may that nothing is to be learned.

A router that saturates on the wrong side has no slope left to come back by. What is known before training, that leaving
out this one layer costs every kind of input far more than the tolerance, need not be learned at that risk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from adaskip.sites import Label
from adaskip.theory.intervals import bonferroni, bootstrap_mean

ROOM = 1.25
"""The layers that are not held can save so many times what the budget takes: with less there is nothing to choose."""


@dataclass(frozen=True)
class Dear:
    """Hold the layers that are to run whatever their routers say, and those that had to be released for the budget."""

    costs: dict[int, float]  # layer -> mean exact cost of skipping it alone, nats per predicted token
    released: dict[int, float]
    limit: float  # nats: what a layer costs more than, with confidence
    label: Callable[[int], Label] = int  # what a layer, or a half of one, is called

    @property
    def sentence(self) -> str:
        """Name the layers in one line; empty where there are none."""
        parts = []
        if self.costs:
            each = "which costs" if len(self.costs) == 1 else "each of which costs"
            named = self._name(self.costs)
            parts.append(f"holding {named} from the start, {each} more than {self.limit:.3g} nats when skipped alone")
        if self.released:
            verb = "costs as much and is" if len(self.released) == 1 else "cost as much and are"
            parts.append(
                f"{self._name(self.released)} {verb} not held, for objective.keep leaves the routers no room otherwise"
            )
        return "; ".join(parts)

    def _name(self, costs: dict[int, float]) -> str:
        """Name layers with their costs."""
        listed = ", ".join(f"{self.label(layer)} ({cost:.3g} nats)" for layer, cost in costs.items())
        return f"layer{'s' * (len(costs) != 1)} {listed}"


def find_dear(
    kl: Tensor,
    tolerance: float,
    times: float,
    saved: Tensor,
    keep: float,
    held: Sequence[int] = (),
    level: float = 0.95,
    label: Callable[[int], Label] = int,
) -> Dear:
    """Find the layers whose exact cost is clearly above ``times`` tolerances, as many as the budget leaves room for.

    A layer is dear where the lower end of the interval of its mean cost lies above that (estimator; all intervals hold
    at once). Where the others cannot save enough, and a quarter more so that there is something to choose, the cheapest
    dear ones are released until they can.

    Args:
        kl: (n l) exact cost of skipping each layer alone.
        tolerance: nats per predicted token that one skipped layer may cost.
        times: so many tolerances are far too much.
        saved: (m l) what leaving out each layer saves, as `adaskip.survey.static.layer_savings` says.
        keep: the mean keep rate that must stay within reach.
        held: layers that are held already, and stay so.
        level: that all intervals hold at once.
        label: what a layer, or a half of one, is called.
    """
    limit, each = times * tolerance, bonferroni(level, kl.shape[1])
    means = kl.double().mean(0)
    free = [layer for layer in range(kl.shape[1]) if layer not in held]
    dear = [layer for layer in free if bootstrap_mean(kl[:, layer], each).low > limit]
    dear.sort(key=lambda layer: float(means[layer]))
    saves, released, needed = saved.mean(0), [], ROOM * (1 - keep)
    while dear and float(saves[[layer for layer in free if layer not in dear]].sum()) < needed:
        released.append(dear.pop(0))
    costs = {layer: float(means[layer]) for layer in sorted(dear)}
    return Dear(costs, {layer: float(means[layer]) for layer in sorted(released)}, limit, label)
