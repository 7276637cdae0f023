"""The best static plan of a budget: what it keeps, how it is found, how routers begin at it and are set beside it."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
import torch

import adaskip
from adaskip.errors import ConfigError
from adaskip.recipe import load
from adaskip.survey.plans import PlanCosts, plan_costs
from adaskip.survey.skips import measure_skips
from adaskip.survey.static import Contest, as_plan, compare, find_static, layer_savings, start_logits
from adaskip.training.dear import find_dear
from adaskip.verbs.static import begin_at, price_budget
from tests import toys
from tests.tuning import batches, planted, with_answers


def routed(family: str = "llama", **target: Any) -> tuple[adaskip.RoutedModel, list[adaskip.Batch]]:
    """A toy with routers, and batches of prompts of many lengths."""
    toy = toys.make(family, seed=3)
    rows = [with_answers(toy.batch([5, 9, 3, 7], seed=seed)) for seed in range(2)]
    return adaskip.attach(toy.model, adaskip.RouterConfig(**target)), rows


# -- what a plan keeps -------------------------------------------------------------------------------------------------

TARGETS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"unit": "mlp"}),
    ("llama", {"phase": "decode"}),
    ("llama", {"scope": "token", "kv": "kept"}),
    ("llava", {"group": "vision"}),
    ("llava", {"group": "vision", "kv": "kept"}),
]


@pytest.mark.parametrize(("family", "target"), TARGETS, ids=lambda value: str(value))
def test_what_layers_save_adds_up_to_what_plans_keep(family: str, target: dict[str, Any]) -> None:
    """One pass that skips everything tells the keep rate of every plan; catches a budget that a plan then misses."""
    model, rows = routed(family, **target)
    saved = layer_savings(model, rows)
    for skip in [(), (1,), (0, 2), (0, 1, 2, 3)]:
        plan = torch.ones(4, dtype=torch.bool)
        plan[list(skip)] = False
        kept = plan_costs(model, rows, [plan]).keep[:, 0]
        assert torch.allclose(1 - saved[:, list(skip)].sum(1), kept, atol=1e-12)


@pytest.mark.parametrize(("family", "target"), TARGETS, ids=lambda value: str(value))
def test_the_plan_speaks_of_what_the_routers_speak_of(family: str, target: dict[str, Any]) -> None:
    """Attached as a policy of its own it gives what it was priced by; catches another unit, group or phase."""
    model, rows = routed(family, **target)
    plan = torch.tensor([True, False, True, False])
    priced = plan_costs(model, rows, [plan]).kl[:, 0]
    settings = as_plan((1, 3), model.target)
    static = adaskip.attach(model.detach(), settings)
    contest = compare(static, rows, (1, 3), 1.0)
    assert torch.allclose(contest.costs.kl, priced[:, None].expand(-1, 2), atol=1e-6)


def test_a_plan_runs_what_is_held_and_everything_where_everything_is_to_run() -> None:
    """A threshold that no logit passes, and held layers: a plan known beforehand once followed neither."""
    model, rows = routed()
    model = adaskip.attach(model.detach(), adaskip.SkipPlan.static([1, 2]))
    batch = rows[0]
    with model.dense():
        dense = model(**batch.arguments()).logits
    with model.keep_all():
        assert torch.equal(model(**batch.arguments()).logits, dense)
    model.hold([2])
    model(**batch.arguments())
    assert model.routing.keep[:, 0].tolist() == [True, False, True, True]
    model.set_threshold(adaskip.plan.KEEP_ALL)
    assert torch.equal(model(**batch.arguments()).logits, dense)


# -- the search --------------------------------------------------------------------------------------------------------


def search(model: adaskip.RoutedModel, rows: list[adaskip.Batch], keep: float, **options: Any):
    return find_static(model, rows, measure_skips(model, rows).kl, layer_savings(model, rows), keep, **options)


def test_the_search_finds_the_cheapest_plan_of_the_fewest_layers() -> None:
    """Of all pairs that hold the cheapest layer; catches a search that adds up what layers cost alone."""
    model, rows = planted(0.0), batches(2)
    pairs = [pair for pair in combinations(range(4), 2) if 2 in pair]
    keeps = [torch.tensor([layer not in pair for layer in range(4)]) for pair in pairs]
    best = pairs[int(plan_costs(model, rows, keeps).kl.mean(0).argmin())]
    assert search(model, rows, 0.5) == best
    assert search(model, rows, 0.75) == (2,)
    assert search(model, rows, 0.74) == best  # a whole layer more, for there is no half


def test_layers_that_are_held_stay_and_a_budget_may_be_out_of_reach() -> None:
    model, rows = planted(0.0), batches(2)
    model.hold([2])
    found = search(model, rows, 0.5)
    assert found is not None
    assert 2 not in found
    assert len(found) == 2
    model.hold([0, 1, 2])
    assert search(model, rows, 0.5) is None
    assert search(model, rows, 1.0) == ()


# -- a start at the plan -----------------------------------------------------------------------------------------------


def test_routers_begin_at_the_plan_and_their_gates_keep_a_slope() -> None:
    """Hard decisions are the plan's, drawn ones keep its budget on average, and no gate is flat."""
    model, rows = routed()
    begin_at(model, (1, 3))
    model(**rows[0].arguments())
    assert model.routing.keep.T.tolist() == [[True, False, True, False]] * 4
    gates = torch.sigmoid(model.routing.logits)
    assert (gates * (1 - gates)).min() > 0.04
    assert float(gates.mean()) == pytest.approx(0.5)
    model, rows = routed(threshold=7.0)
    begin_at(model, (1, 3))
    model(**rows[0].arguments())
    assert model.routing.keep.T.tolist() == [[True, False, True, False]] * 4


@pytest.mark.parametrize(("skip", "held", "layers"), [((4, 5, 6), (), 30), ((2, 3, 6, 7, 11), (0,), 12), ((), (), 4)])
def test_the_drawn_keep_rate_is_the_plans(skip: tuple[int, ...], held: tuple[int, ...], layers: int) -> None:
    """A start that runs fewer layers than the budget is pushed to dense first; it lies between gates of 1 and 4."""
    logits = start_logits(skip, held, layers)
    free = [layer for layer in range(layers) if layer not in held]
    expected = float(torch.sigmoid(logits[free]).sum())
    assert expected == pytest.approx(len(free) - len(skip), abs=0.1)
    assert logits.max() <= 4


def test_a_budget_pays_what_the_plan_pays_for_compute() -> None:
    """The multiplier starts at the plan's nats for all of the compute, and its steps and the overshoot grow with it.

    A multiplier of hundredths held nothing where a layer costs nats: the layers of the plan came back.
    """
    model, rows = routed()
    goal, cheap = adaskip.Objective(), torch.tensor([True, False, False, True])
    costs = plan_costs(model, rows, [cheap])
    price = float(costs.kl.mean() / (1 - costs.keep.mean()))
    priced = price_budget(goal, model, rows, (1, 2))
    assert priced.budget_start == pytest.approx(price)
    assert (priced.warmup, priced.keep) == (0.0, goal.keep)
    assert priced.budget_rate == pytest.approx(goal.budget_rate * max(1.0, price))
    assert priced.budget_weight == pytest.approx(goal.budget_weight * max(1.0, price))
    assert price_budget(goal, model, rows, ()).budget_start == 0
    assert adaskip.RouterTuner(model, replace(priced, bound_weight=0.0)).multiplier == pytest.approx(price)


def test_a_static_start_needs_a_plan_and_training() -> None:
    with pytest.raises(ConfigError, match=r"static.start: expected false with method from-bounds"):
        load("digits-vlm-from-bounds", ["static.start=true"])
    with pytest.raises(ConfigError, match=r"with static.width 0, which seeks no plan"):
        load("digits-vlm", ["static.start=true", "static.width=0"])


# -- the comparison ----------------------------------------------------------------------------------------------------


def contest(routers: list[float], static: list[float], keeps: tuple[float, float] = (0.6, 0.58)) -> Contest:
    kl = torch.tensor([routers, static], dtype=torch.float64).T
    return Contest(
        (4, 5), PlanCosts(kl, torch.ones_like(kl), torch.tensor([keeps] * len(kl), dtype=torch.float64)), 0.6
    )


@pytest.mark.parametrize(
    ("found", "winner", "sentence"),
    [
        (contest([0.1, 0.2, 0.3] * 20, [0.2, 0.32, 0.4] * 20), "routers", "0.307: routers win by 0.107 (95 %: 0.104"),
        (contest([0.1, 0.3] * 4, [0.3, 0.11] * 4), "routers", ", which may be chance"),
        (contest([0.2, 0.32] * 9, [0.1, 0.2] * 9), "static", "the routers do not beat it, they cost 0.11 (95 %: 0.1"),
        (contest([0.2] * 9, [0.2] * 9), "routers", "(layers 4, 5) 0.2: they cost the same"),
        (contest([0.1] * 9, [0.2] * 9, (0.7, 0.58)), "static", "the routers miss the budget, which the plan holds"),
        (contest([0.2] * 9, [0.1] * 9, (0.6, 0.7)), "routers", "the plan costs less, but misses the budget"),
        (contest([0.1], [0.2]), "routers", "win by 0.1 (too few inputs for an interval)"),
        (contest([float("inf"), 0.1], [0.2, 0.2]), "static", "too few inputs for an interval"),
    ],
)
def test_who_costs_less_within_the_budget_wins(found: Contest, winner: str, sentence: str) -> None:
    """Catches a winner by accuracy, one that misses the budget, and a gain that may be chance told as one."""
    assert found.winner == winner
    assert sentence in found.sentence
    values = found.to_dict()
    assert values["comparison"]["winner"] == winner
    assert values["routers"]["kl"] == pytest.approx(float(found.costs.kl[:, 0].mean()))
    assert values["kl"] == pytest.approx(float(found.costs.kl[:, 1].mean()))


def test_both_sides_are_run_on_the_same_inputs() -> None:
    """Routers forced to a plan cost what it costs, another plan what it was measured to; catches swapped sides."""
    model, rows = planted(0.0), batches(2)
    with torch.no_grad():
        model.routers[1].outer.bias.fill_(-3.0)
    found = compare(model, rows, (0,), 0.75)
    alone = measure_skips(model, rows).kl.double().mean(0)
    assert found.figures(0)["kl"] == pytest.approx(float(alone[1]), rel=1e-4)
    assert found.figures(1)["kl"] == pytest.approx(float(alone[0]), rel=1e-4)
    assert (found.figures(0)["keep"], found.figures(1)["keep"]) == (0.75, 0.75)


# -- dear layers -------------------------------------------------------------------------------------------------------


def costs_of(*means: float, n: int = 64) -> torch.Tensor:
    """Exact costs (n l) around these means."""
    draw = torch.Generator().manual_seed(0)
    return torch.tensor(means) * (0.8 + 0.4 * torch.rand(n, len(means), generator=draw))


SAVED = torch.full((64, 4), 0.25, dtype=torch.float64)


def test_dear_layers_are_named_with_what_they_cost() -> None:
    """Those clearly above ten tolerances; one whose mean alone is above, and those held already, are not."""
    found = find_dear(costs_of(3.0, 0.01, 0.51, 0.2), 0.05, 10, SAVED, 0.5)
    assert [*found.costs] == [0]
    assert found.sentence.startswith("holding layer 0 (2.96 nats) from the start, which costs more than 0.5 nats")
    assert find_dear(costs_of(3.0, 0.01, 0.02, 2.0), 0.05, 10, SAVED, 0.6, held=[0]).costs.keys() == {3}
    assert not find_dear(costs_of(0.3, 0.01, 0.02, 0.1), 0.05, 10, SAVED, 0.5).sentence


def test_the_cheapest_dear_layers_are_released_for_the_budget() -> None:
    """Three dear layers of four: one is released where the free ones are too few, or leave nothing to choose."""
    costs = costs_of(3.0, 0.01, 5.0, 2.0)
    found = find_dear(costs, 0.05, 10, SAVED, 0.6)
    assert ([*found.costs], [*found.released]) == ([0, 2], [3])
    assert found.sentence.endswith(
        "layer 3 (1.95 nats) costs as much and is not held, for objective.keep leaves the routers no room otherwise"
    )
    assert [*find_dear(costs, 0.05, 10, SAVED, 0.8).released] == []
    assert [*find_dear(costs, 0.05, 10, SAVED, 0.75).released] == [3]  # it could be met, without any choice
    every = find_dear(costs, 0.05, 10, SAVED, 0.6, held=[1])
    assert ([*every.costs], [*every.released]) == ([2], [0, 3])
