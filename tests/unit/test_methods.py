"""Selection rules of the field's methods, against published vectors and cases worked out by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import adaskip
from adaskip.errors import ConfigError
from adaskip.methods import gm_skip, knapspec, skip_it, unified, uniform
from adaskip.methods.budget import prefix
from adaskip.methods.evidence import Evidence
from adaskip.methods.method import find
from adaskip.methods.names import METHODS
from adaskip.sites import Sites
from adaskip.survey.plans import plan_costs
from adaskip.theory.conditions import Finding, Findings
from tests import methods, toys, tuning


@pytest.mark.parametrize(
    ("speedup", "kept"),
    [
        (2, [*range(0, 27, 2), 29]),
        (3, [*range(0, 25, 3), 29]),
        (5, [0, 6, 12, 18, 24, 29]),
        (10, [0, 15, 29]),
    ],
)
def test_unified_keeps_what_the_paper_keeps(speedup: float, kept: list[int]) -> None:
    """Of 30 layers; catches another interval, and one layer too many before the last."""
    assert unified.kept_layers(30, int(30 / speedup)) == kept


def test_unified_says_where_its_formula_breaks() -> None:
    """It divides by zero at one layer, and keeps a contiguous block above a half."""
    with pytest.raises(ConfigError, match="expected 2 to 30 layers to stay, the first and the last, got 1"):
        unified.kept_layers(30, 1)
    with pytest.raises(ConfigError, match="the formula keeps the first 23 of 30 layers and the last, no gaps"):
        unified.kept_layers(30, 24)


def test_unified_goes_by_its_formula_where_that_leaves_gaps() -> None:
    """Catches even spacing under the published name at every budget."""
    going = {12 - len(path): path for path in unified.paths(12)}
    assert [*going] == [*range(12, 1, -1)]
    assert going[8] == uniform.without(12, uniform.spread(12, 8))
    assert going[6] == uniform.without(12, [0, 2, 4, 6, 8, 11]) != uniform.without(12, uniform.spread(12, 6))


def test_uniform_keeps_the_ends_and_spreads_the_rest() -> None:
    assert uniform.spread(12, 6) == [0, 2, 4, 7, 9, 11]
    assert [len(path) for path in uniform.paths(5)] == [0, 1, 2, 3]
    assert uniform.without(5, [0, 2, 4]) == (1, 3)


def weighed(saves: list[float], **figures: Any) -> Any:
    """Stand for evidence: what layers save is given, and whatever else a rule asks for."""
    own: dict[str, Any] = {"saves": torch.tensor(saves).double(), "layers": len(saves), "group": "all"} | figures
    evidence = SimpleNamespace(**own)
    evidence.keeps = lambda path: Evidence.keeps(evidence, path)
    evidence.holds = lambda path, keep: Evidence.holds(evidence, path, keep)
    return evidence


def test_a_budget_takes_as_few_layers_of_an_order_as_hold_it() -> None:
    """Catches one layer too many where a budget is met exactly, and counting layers that save different shares."""
    evidence = weighed([0.3, 0.1, 0.2, 0.4])
    assert prefix(evidence, [1, 2, 0, 3], 1.0) == ()
    assert prefix(evidence, [1, 2, 0, 3], 0.9) == (1,)
    assert prefix(evidence, [1, 2, 0, 3], 0.7) == (1, 2)
    assert prefix(evidence, [3, 1, 2, 0], 0.7) == (3,)
    with pytest.raises(ConfigError, match=r"keep=0\.5: expected at least 0\.700"):
        prefix(evidence, [1, 2], 0.5)


GEOMETRY = torch.tensor([[0.5, 0.1, 0.3, 0.2], [0.1, 0.4, 0.2, 0.3], [0.9, 0.2, 0.8, 0.7]]).double()
EVEN = [0.25] * 4


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("none", ()),
        ("late_entry", (0, 1)),
        ("early_exit", (2, 3)),
        ("block_influence", (1, 3)),
        ("relative_change", (0, 2)),
        ("attention_mass", (1, 3)),
        ("shortv", (0, 3)),
        ("uniform", (1, 2)),
    ],
)
def test_rules_by_hand(name: str, expected: tuple[int, ...]) -> None:
    """Two of four equal layers go; catches a rule that reads another figure, or goes by the largest."""
    evidence = weighed(EVEN, geometry=tuple(GEOMETRY), single=torch.tensor([0.1, 0.4, 0.3, 0.2]))
    assert find(name).choose(evidence, 0.5, 0) == expected


def test_knapspec_solves_its_knapsack() -> None:
    """Against every subset; catches an item taken twice, and greed: two of weight 2 beat the cheapest of weight 3."""
    costs, weights = [3.0, 1.0, 1.2, 0.9, 2.0], [3, 2, 2, 1, 4]
    for needed, path in enumerate(knapspec.knapsacks(costs, weights)):
        subsets = [items for count in range(6) for items in combinations(range(5), count)]
        enough = [items for items in subsets if sum(weights[i] for i in items) >= needed]
        assert sum(weights[i] for i in path) >= needed
        assert sum(costs[i] for i in path) == pytest.approx(min(sum(costs[i] for i in items) for items in enough))
    assert needed == sum(weights)
    # .25 of the FLOPs are to go: site 3 saves them at .5, and takes 6 of 10 seconds; sites 1 and 2 take fewer at less
    figures = {"strays": torch.tensor([0.9, 0.1, 0.2, 0.5]), "seconds": torch.tensor([2.0, 1.0, 1.0, 6.0])}
    assert find("knapspec").choose(weighed([0.3, 0.2, 0.2, 0.3], **figures), 0.75, 0) == (1, 2)
    slow = {"strays": figures["strays"], "seconds": torch.tensor([8.0, 1.0, 0.1, 8.0])}
    assert find("knapspec").choose(weighed([0.3, 0.0, 0.0, 0.3], **slow), 0.75, 0) == (3,)


def test_ada_skip_ranks_halves_by_how_little_they_turn() -> None:
    """Catches a rank by the cost, and one of whole layers."""
    evidence = weighed([0.1, 0.3] * 2, turns=torch.tensor([0.3, 0.1, 0.2, 0.4]))
    assert find("ada_skip").choose(evidence, 0.7, 0) == (1,)
    assert find("ada_skip").choose(evidence, 0.65, 0) == (1, 2)


def test_methods_over_halves_make_plans_of_halves() -> None:
    """On a toy; catches sites that get out as layers, and evidence of blocks taken for one of halves."""
    inputs = tuning.batches(4, rows=1)
    model = adaskip.attach(toys.make("llama").model, find("knapspec").empty("all"))
    halves = Evidence(model, lambda rows: [inputs[row] for row in rows], 4)
    for name in ("ada_skip", "knapspec", "greedy_halves"):
        plan = find(name).policy(halves, 0.8)
        assert plan.unit == "sublayers"
        assert plan.skip
        assert {label.split(".")[1] for label in plan.skip} <= {"attention", "mlp"}
        assert halves.keeps(tuple((~plan.keep(4)).nonzero().flatten().tolist())) <= 0.8 + 1e-9
    with pytest.raises(
        ConfigError, match=r"expected evidence of unit='block', got 'sublayers'; attach find\('greedy'\)"
    ):
        find("greedy").policy(halves, 0.8)


def test_fastv_keeps_the_share_that_the_budget_leaves() -> None:
    """Layers 2 and 3 can save .5: of 10 tokens 4 go at .8, of 7 and 10 another; catches what stays for what goes."""
    evidence = weighed(EVEN, group="vision", patches=torch.tensor([10.0, 10.0]).double())
    assert find("fastv").choose(evidence, 0.8, 0).share == 0.6  # type: ignore[union-attr]
    uneven = weighed(EVEN, group="vision", patches=torch.tensor([7.0, 10.0]).double())
    assert find("fastv").choose(uneven, 0.8, 0).share == 0.5  # type: ignore[union-attr]  # at .6 five of seven stay
    with pytest.raises(ConfigError, match=r"keep=0\.4: expected at least 0\.550, with one vision token behind layer 2"):
        find("fastv").choose(evidence, 0.4, 0)


@pytest.mark.parametrize("name", ["fastv", "pyramid_drop", "skip_vision"])
def test_a_method_of_vision_tokens_needs_a_picture(name: str) -> None:
    """Catches PyTorch's own error about an empty maximum, of rows that are all text."""
    model = SimpleNamespace(sites=Sites("sublayers", len(EVEN) // 2))
    evidence = weighed(EVEN, group="vision", patches=torch.empty(0).double(), model=model)
    with pytest.raises(ConfigError, match=r"^keep=0.8: (no input that it chooses by has a picture|expected at least)"):
        find(name).choose(evidence, 0.8, 0)


def test_pyramid_drop_keeps_the_ratio_that_the_budget_leaves() -> None:
    """Of 8 equal layers those from 2, 4 and 6 on save .25 each; catches a ratio that is taken once, or of the first.

    Of 8 tokens 4, 2 and 1 stay at .5, which saves .25 * (.5 + .75 + .875) = .53125; at a little more 5, 3 and 2 do,
    which saves .25 * (.375 + .625 + .75) = .4375.
    """
    evidence = weighed([0.125] * 8, group="vision", patches=torch.tensor([8.0]).double())
    rule = find("pyramid_drop").choose
    assert rule(evidence, 0.47, 0).ratio == 0.5  # type: ignore[union-attr]
    assert 0.5 < rule(evidence, 0.5625, 0).ratio <= 0.6  # type: ignore[union-attr]
    assert rule(evidence, 1.0, 0).ratio == 1.0  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match=r"keep=0\.3: expected at least 0\.344, with one vision token behind layer 2"):
        rule(evidence, 0.3, 0)


def test_skip_vision_keeps_the_shares_that_the_budget_leaves() -> None:
    """Four MLPs save .15 each and .6 together: of 10 tokens 5 leave them at .7; catches attentions that are counted.

    The five that run are shared out as 100 and 156 are, so that two are kept by rank.
    """
    sites = Sites("sublayers", 4)
    evidence = weighed(
        [0.1, 0.15] * 4,
        group="vision",
        patches=torch.tensor([10.0, 10.0]).double(),
        model=SimpleNamespace(sites=sites),
    )
    rule = find("skip_vision").choose
    policy: Any = rule(evidence, 0.7, 0)
    assert policy.kept + policy.left == pytest.approx(0.5)
    assert policy.kept / policy.left == pytest.approx(100 / 156)
    whole: Any = rule(evidence, 1.0, 0)
    assert whole.left + whole.kept == pytest.approx(1.0)
    with pytest.raises(ConfigError, match=r"keep=0\.4: expected at least 0\.460, with one vision token in the MLPs"):
        rule(evidence, 0.4, 0)


def test_drawn_layers_follow_their_seed_and_are_nested() -> None:
    rule, evidence = find("random").choose, weighed([0.1] * 10)
    plans = [rule(evidence, keep, 1) for keep in (0.8, 0.5)]
    assert {*plans[0]} < {*plans[1]}
    assert rule(evidence, 0.5, 1) == plans[1] != rule(evidence, 0.5, 2)


def finding(layer: int, estimate: float, high: float, threshold: float = 1.0) -> Finding:
    return Finding(layer, "all", "functional", estimate, min(estimate, high) - 0.1, high, threshold, 20)


def test_skip_it_goes_by_verdict_and_then_by_the_condition_that_fails_most() -> None:
    """Layer 2 costs less than layer 3, but is not shown to; catches an order by the cost alone, or by the mildest."""
    rows = [
        finding(0, 3.0, 3.2),
        finding(1, 0.5, 0.9),
        finding(2, 0.6, 1.4),
        finding(3, 0.7, 0.9),
        finding(4, 0.2, 0.4),
    ]
    rows += [finding(4, 6.5, 7.0, threshold=10.0)]  # a second condition, which it nearly fails
    assert skip_it.rank(Findings(tuple(rows), {})) == [1, 4, 3, 2, 0]


SCORES = {(): 0.8, (2,): 0.8, (3,): 0.6, (1,): 0.7, (2, 3): 0.5, (1, 2): 0.75, (1, 3): 0.2, (1, 2, 3): 0.1}


def scored(paths: Sequence[tuple[int, ...]]) -> Tensor:
    return torch.tensor([SCORES[path] for path in paths]).double()


@pytest.mark.parametrize(
    ("mode", "weight", "count", "expected"),
    [
        ("greedy", 0.5, None, (1, 2)),  # J: 1, then (2,) 1.125, then (1, 2) 1.1875, then .5
        ("greedy", 0.1, None, (2,)),  # the second layer costs .0625 of the score and is worth .025
        ("greedy", 0.24, None, (2,)),  # (1, 2) is worth .9375 + .12, less than 1 + .06: shares of the dense score
        ("greedy", 0.1, 3, (1, 2, 3)),  # a budget asks for more than J would take
        ("reverse", 0.1, None, (2,)),  # 3 costs .25, 2 nothing, 1 too much
        ("reverse", 0.0, None, (2,)),  # what costs nothing goes, whatever it is worth
        ("reverse", 1.5, None, (1, 2, 3)[1:]),  # 3 is worth .375 and costs .25; 2 then costs .125; 1 then costs .5
        ("reverse", 0.1, 2, (1, 2)),  # the sweep found one layer; greedy goes on
    ],
)
def test_gm_skip_by_hand(mode: str, weight: float, count: int | None, expected: tuple[int, ...]) -> None:
    """Of four layers the first is protected; catches J without its weight, and a sweep from the first layer."""
    budget: Callable[[Any], bool] | None = None if count is None else lambda path: len(path) >= count
    search = gm_skip.Search(scored, 4, weight, protected=1, budget=budget)
    assert getattr(search, mode)() == expected


def test_gm_skip_takes_the_last_of_equal_layers_and_needs_a_score() -> None:
    flat = gm_skip.Search(lambda paths: torch.ones(len(paths)), 5, budget=lambda path: len(path) == 2)
    assert flat.greedy() == (3, 4)
    with pytest.raises(ConfigError, match="expected a metric above 0 of the dense model, got 0"):
        gm_skip.Search(lambda paths: torch.zeros(len(paths)), 5)


@pytest.fixture(scope="module")
def evidence() -> Evidence:
    """Eight inputs of a toy, one at a time."""
    model, inputs = adaskip.attach(toys.make("llama").model, adaskip.SkipPlan()), tuning.batches(8, rows=1)
    return Evidence(model, lambda rows: [inputs[row] for row in rows], 8)


def test_evidence_is_what_the_model_costs(evidence: Evidence) -> None:
    """Both ledgers are filled by one measurement; catches the score of another path, or of other inputs."""
    paths = [(), (1,), (1, 2)]
    keep = torch.ones(3, evidence.layers, dtype=torch.bool)
    keep[1, 1] = keep[2, 1] = keep[2, 2] = False
    exact = plan_costs(evidence.model, evidence.batches(range(8)), [*keep])
    assert torch.equal(evidence.costs(paths, range(8)), exact.kl)
    evidence.hits.price = lambda paths, rows: pytest.fail("measured twice")
    assert torch.equal(evidence.hits(paths, range(8)), exact.hit)
    assert evidence.keeps((1, 2)) == pytest.approx(float(exact.keep[:, 2].mean()))
    cosine, change, mass = evidence.geometry
    assert (cosine > 0).all()
    assert (change > 0).all()
    assert not mass.any()


def test_an_input_without_the_group_does_not_count() -> None:
    """A text beside a picture, group vision; catches a mean over no token, which is not a number."""
    toy = toys.make("llava")
    seen, unseen = tuning.with_answers(toy.batch([5])), tuning.batches(1, rows=1)[0]
    model = adaskip.attach(toy.model, adaskip.SkipPlan(group="vision"))
    alone, both = (
        Evidence(model, lambda rows, inputs=inputs: [inputs[row] for row in rows], len(inputs)).geometry  # type: ignore[misc]
        for inputs in ([seen], [unseen, seen])
    )
    assert all(torch.equal(a, b) and bool(a.gt(0).all()) for a, b in zip(alone, both, strict=True))


def test_greedy_takes_the_cheapest_layer_and_then_the_best_beside_it(evidence: Evidence) -> None:
    """Catches greed for what costs most, plans that keep too much, and a layer that goes where none has to."""
    assert find("greedy").policy(evidence, 1.0).skip == ()
    keep = evidence.keeps((0, 1))
    plan = find("greedy").policy(evidence, keep)
    single = int(evidence.single.argmin())
    assert single in plan.skip
    assert len(plan.skip) == 2
    others = [tuple(sorted((single, layer))) for layer in range(evidence.layers) if layer != single]
    costs = evidence.costs(others, range(8)).mean(0)
    assert plan.skip == others[int(costs.argmin())]


def test_a_method_refuses_a_group_that_it_does_not_speak_of(evidence: Evidence) -> None:
    with pytest.raises(ConfigError, match="method attention_mass: expected group vision, got 'all'"):
        find("attention_mass").policy(evidence, 0.5)
    with pytest.raises(ConfigError, match=r"expected evidence of kv='kept', got 'absent'; attach find\('shortv'\)"):
        find("shortv").policy(weighed(EVEN, group="vision", model=evidence.model), 0.5)
    with pytest.raises(ConfigError, match="'gredy': no such method, did you mean 'greedy'"):
        find("gredy")


def test_the_page_holds_the_table_of_the_methods() -> None:
    """Catches a method that nobody who reads about policies finds, and one that says something else of itself."""
    page = methods.PAGE.read_text(encoding="utf-8")
    assert methods.filled(page) == page, "write it anew: python -m tests.methods"
    assert [find(name).name for name in METHODS] == [*METHODS]
