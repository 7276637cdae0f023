"""KnapSpec: choose attentions and MLPs as a knapsack of what each costs the model and what it takes in seconds.

    value    1 - cos of the last state with and without the half of a layer: what leaving it out costs
    weight   its seconds at the length of these prompts: an attention weighs more the longer they are
    choice   of all sets of halves that weigh enough, the one of the least value in total

Published for drafts of speculative decoding: the set with the most tokens a second is sought anew as the context grows,
by a dynamic programme. Here one set serves all inputs. Its objective is ours too: the values of single halves, added
up, which a knapsack of numbers solves exactly, and as few seconds as hold the budget, which is of FLOPs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from adaskip.methods.budget import first_that_holds
from adaskip.methods.evidence import Evidence
from adaskip.methods.method import Method
from adaskip.survey.greedy import Path

GRAINS = 400
"""All halves of all layers together weigh about so many grains, each at least one."""


def knapsacks(costs: Sequence[float], weights: Sequence[int]) -> Iterator[Path]:
    """Yield, for 0, 1, 2 ... grains, the items of the least total cost that weigh at least as much together.

    Of equal costs those that weigh less.

    >>> list(knapsacks([3.0, 1.0, 1.5], [2, 1, 1]))
    [(), (1,), (1, 2), (0, 1), (0, 1, 2)]
    """
    best: list[tuple[float, Path] | None] = [(0.0, ()), *[None] * sum(weights)]  # of exactly so many grains
    for item, (cost, weight) in enumerate(zip(costs, weights, strict=True)):
        for grains in range(len(best) - 1, weight - 1, -1):  # from above, so that no item goes in twice
            if (known := best[grains - weight]) is None:
                continue
            option = known[0] + cost, (*known[1], item)
            if (old := best[grains]) is None or option[0] < old[0]:
                best[grains] = option
    for needed in range(len(best)):
        yield min((known for known in best[needed:] if known is not None), key=lambda known: known[0])[1]


def weigh(seconds: Sequence[float]) -> list[int]:
    """Return whole weights in proportion to seconds.

    >>> weigh([0.3, 0.1, 0.0])
    [300, 100, 1]
    """
    total = sum(seconds)
    return [max(1, round(GRAINS * one / total)) for one in seconds]


def choose(evidence: Evidence, keep: float, seed: int) -> Path:
    """Return the halves of the least total value among those of the fewest seconds that hold the budget."""
    return first_that_holds(evidence, knapsacks(evidence.strays.tolist(), weigh(evidence.seconds.tolist())), keep)


METHOD = Method(
    "knapspec",
    "knapsack of sublayers (KnapSpec)",
    "arXiv 2602.20217",
    choose,
    unit="sublayers",
    looks="costs",
    ours="one set for all inputs, where published chooses drafts anew as the context grows; the values of single "
    "halves are added up; the seconds that go are the fewest that hold the budget, where published seeks the most "
    "tokens a second",
)
