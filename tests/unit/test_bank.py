"""Banks of paths: found on planted prices, predicted from planted features, and a whole one on a toy."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch

import adaskip
from adaskip.errors import ConfigError, DataError
from adaskip.plan import SkipPlan, Target
from adaskip.sites import Sites
from adaskip.survey import bank
from adaskip.survey.bank import choose, find_bank, lowest_price
from adaskip.survey.greedy import greedy_paths
from adaskip.survey.plans import plan_costs
from adaskip.theory.regression import fit_predictor
from tests import toys
from tests.batches_by_number import two_kinds

LAYERS, INPUTS = 8, 40


def planted(draw: torch.Generator) -> torch.Tensor:
    """What single layers cost: half of the inputs hardly need layers 3 and 4, the other half 5 and 6."""
    single = 1.0 + 0.1 * torch.rand(INPUTS, LAYERS, generator=draw, dtype=torch.float64)
    single[: INPUTS // 2, 3:5] = 0.01
    single[INPUTS // 2 :, 5:7] = 0.01
    single[:, 7] = 0.3
    return single


def price_of(single: torch.Tensor, asked: list[int] | None = None):
    """Prices that add up, but for layers 3 and 5, which together cost 9."""

    def price(paths: Sequence[tuple[int, ...]], rows: Sequence[int]) -> torch.Tensor:
        if asked is not None:
            asked.append(len(paths) * len(rows))
        own = single[list(rows)]
        both = [9.0 if {3, 5} <= {*path} else 0.0 for path in paths]
        return torch.stack([own[:, list(path)].sum(1) + more for path, more in zip(paths, both, strict=True)], 1)

    return price


def test_a_greedy_path_heeds_what_layers_cost_together() -> None:
    """3 and 5 are cheapest alone and dear together; catches a path that adds up what single layers cost."""
    single = torch.tensor([[0.9, 0.9, 0.9, 0.1, 0.5, 0.2, 0.6, 0.7]], dtype=torch.float64)
    assert greedy_paths(price_of(single), [0], single[0], 3, width=4)[-1][0] == (3, 4, 6)
    asked: list[int] = []
    assert greedy_paths(price_of(single, asked), [0], single[0], 2, width=2)[-1][0] == (3, 4)
    assert asked == [2], "only so many are tried as the width says"


def test_the_predictor_is_judged_on_inputs_it_has_not_seen() -> None:
    """Costs that follow a feature are predicted, in nats; costs that follow none are not, however many features."""
    draw = torch.Generator().manual_seed(0)
    features = torch.randn(INPUTS, 10, generator=draw)
    features[:, 2] = torch.linspace(-30, 30, INPUTS)
    dear = 0.1 * (0.05 * features[:, 2].double()).exp()
    noise = torch.rand(INPUTS, generator=draw, dtype=torch.float64)
    predictor, guessed = fit_predictor(features, torch.stack([torch.zeros(INPUTS).double(), dear, noise], 1))
    assert not guessed[:, 0].any(), "a path that costs nothing is known to"
    assert not predictor(features)[:, 0].any()
    assert torch.corrcoef(torch.stack([guessed[:, 1], dear]))[0, 1] > 0.9
    assert torch.corrcoef(torch.stack([guessed[:, 2], noise]))[0, 1] < 0.5
    assert float(guessed[:, 1].mean()) == pytest.approx(float(dear.mean()))


def test_the_price_spends_the_budget_where_it_costs_least() -> None:
    """Half of the inputs pay nothing for three layers: they leave them out, the others none, and the mean holds."""
    costs = torch.tensor([[0.0, 0.3, 0.9]] * 4 + [[0.0, 0.001, 0.002]] * 4, dtype=torch.float64)
    share = torch.tensor([1.0, 0.9, 0.8], dtype=torch.float64)
    price = lowest_price(costs, share, 0.9)
    chosen = choose(costs, share, price)
    assert chosen.tolist() == [0] * 4 + [2] * 4
    # at .001 / .1 nats they are just between two paths: a little more, so that rounding does not take them back
    assert price == pytest.approx(0.01 * (1 + 1e-4), rel=1e-7)
    assert lowest_price(costs, share, 1.0) == 0.0
    assert choose(costs, share, lowest_price(costs, share, 0.8)).tolist() == [2] * 8
    with pytest.raises(ConfigError, match=r"expected a keep of at least 0.800, got 0.5"):
        lowest_price(costs, share, 0.5)


def test_each_further_path_is_the_one_that_the_best_choices_gain_most_by() -> None:
    """By hand, keep .5, after the dense path and the static plan.

    At a price of 2, at which both are worth 2 to everybody, path 2 saves three inputs 1.5, .5 and 1.5. With it the
    price is 4/3, and path 3 saves the second input 1/3; at the first price it would save nothing. Catches a price that
    is not found anew, costs without it, and inputs that lose by a path they need not take.
    """
    costs = [[0.0, 1.0, 0.0, 0.0, 1.0], [0.0, 1.0, 1.0, 0.0, 3.0], [0.0, 1.0, 0.0, 0.0, 3.0], [0.0, 1.0, 8.0, 8.0, 2.0]]
    share = torch.tensor([1.0, 0.5, 0.25, 0.75, 0.5], dtype=torch.float64)
    assert bank._select(torch.tensor(costs).double(), share, 0.5, 5) == [0, 1, 2, 3]
    assert bank._select(torch.tensor(costs).double(), share, 0.5, 3) == [0, 1, 2]


def test_groups_are_of_inputs_that_find_the_same_layers_dear() -> None:
    """Catches inputs that are grouped by how dear everything is, and a group of a few that gets paths of its own."""
    single = torch.full((30, 4), 1.0, dtype=torch.float64)
    single[:12, :2] = single[12:27, 2:] = single[27:, ::2] = 0.05
    single[::2] *= 30.0
    assert sorted(bank._groups(single, 3, seed=0)) == [[*range(12)], [*range(12, 27)]]
    assert bank._groups(single, 1, seed=0) == []


def found_on(monkeypatch: pytest.MonkeyPatch, single: torch.Tensor, guess=None, **settings):
    """A bank on planted prices; layers save alike, one number is known of each input, and ``guess`` judges costs."""
    held, features = settings.pop("held", ()), (single.sum(1, keepdim=True)).log().float()
    monkeypatch.setattr(bank, "exact_prices", lambda *_: price_of(single))
    monkeypatch.setattr(bank, "layer_savings", lambda *_: torch.full((1, LAYERS), 1 / LAYERS, dtype=torch.float64))
    monkeypatch.setattr(bank, "describe", lambda model, rows, entry: features[list(rows)])
    if guess is not None:
        monkeypatch.setattr(bank, "fit_predictor", lambda x, costs: (fit_predictor(x, costs)[0], guess(costs)))
    model = SimpleNamespace(policy=SimpleNamespace(held=held), sites=Sites("block", LAYERS), target=Target())
    options = {"keep": 0.75, "entry": 1, "groups": 0, "paths": 4} | settings
    return features, find_bank(model, lambda rows: [rows], len(single), **options)


def levels() -> torch.Tensor:
    """Layers cost every second input a hundred times more, all but the last layer a little more than the next."""
    single = 1.0 + 0.01 * torch.arange(LAYERS, dtype=torch.float64).flip(0).expand(INPUTS, -1).clone()
    single[::2] *= 0.01
    return single


def test_choosing_must_pay_on_inputs_that_the_predictor_has_not_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A predictor that is right of what it has seen, and cross-fitted takes dear inputs for cheap ones.

    Catches a bank that is judged, or priced, by the former or by the true costs; one plan for all is left.
    """
    single = levels()
    features, found = found_on(monkeypatch, single, lambda costs: costs.roll(1, 0))
    assert found.paths == ((6, 7),)
    assert not found.chosen.any()
    assert found.price == 0
    assert {round(found.figures[name], 9) for name in ("static", "chosen", "best")} == {1.01505}
    assert found.static == 0
    fitted = fit_predictor(features, torch.stack([torch.zeros(INPUTS).double(), single[:, 6:].sum(1)], 1))[0]
    torch.testing.assert_close(found.predictor(features)[:, 0], fitted(features)[:, 1])


def test_where_choosing_pays_every_input_takes_the_path_guessed_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cheap inputs go far and dear ones stay dense, which pays in the mean though every second input loses by it.

    Catches a gain over another path than the static plan, of the wrong sign or without its standard error, and a
    ceiling at the guesses' price.
    """
    guesses = []

    def guess(costs: torch.Tensor) -> torch.Tensor:
        guesses.append(300.0 * costs)
        return guesses[0]

    single = levels()
    _, found = found_on(monkeypatch, single, guess)
    assert found.paths[:2] == ((), (6, 7))
    assert found.static == 1
    assert found.price == lowest_price(guesses[0], found.share, 0.75)
    assert torch.equal(found.chosen, choose(guesses[0], found.share, found.price))
    gain = found.costs[:, 1] - found.costs.gather(1, found.chosen[:, None])[:, 0]
    assert (gain < 0).any()
    assert gain.std() > gain.mean() > 0.5 * gain.std()
    assert found.figures["chosen"] == pytest.approx(float((found.costs[:, 1] - gain).mean()))
    assert found.figures["best"] == pytest.approx(found.figures["chosen"]), "by the guesses all inputs are alike dearer"
    assert found.figures["chosen_keep"] <= 0.75


def test_groups_of_inputs_get_paths_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planned on every second input; catches a group's plan made on other inputs, or from what layers cost all."""
    monkeypatch.setattr(bank, "_CLEAR", -torch.inf)
    single = planted(torch.Generator().manual_seed(0))
    _, found = found_on(monkeypatch, single, lambda costs: costs, groups=2, paths=12, width=2, sample=20)
    assert {(3, 4), (5, 6)} <= {*found.paths}


def test_no_path_leaves_out_what_is_held_or_more_than_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a held layer in a path of some group, and paths that go deeper than they may."""
    monkeypatch.setattr(bank, "_CLEAR", -torch.inf)
    for held, deepest, longest in (((), None, 5), ((7,), None, 5), ((), 3, 3), ((), 1, 2)):
        _, found = found_on(monkeypatch, levels(), lambda costs: costs, held=held, deepest=deepest)
        assert max(map(len, found.paths)) == longest, "twice the static plan and one; no shallower than that plan"
        assert not {*held} & {layer for path in found.paths for layer in path}


def test_paths_are_planned_on_inputs_from_all_over_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs are sorted by length: catches a sample of the shortest."""
    asked: list[Sequence[int]] = []
    single = levels()

    def asking(*_: object):
        return lambda paths, rows: asked.append(rows) or price_of(single)(paths, rows)

    with monkeypatch.context() as patch:
        found_on(patch, single)
        patch.setattr(bank, "exact_prices", asking)
        model = SimpleNamespace(policy=SimpleNamespace(held=()), sites=Sites("block", LAYERS), target=Target())
        find_bank(model, lambda rows: [rows], INPUTS, keep=0.75, entry=1, groups=0, sample=10)
    assert [*asked[0]] == [*range(0, INPUTS, 4)]


@pytest.mark.parametrize("pays", [True, False])
def test_a_bank_of_a_model(tmp_path, monkeypatch, pays: bool) -> None:
    """What it says of each input is what the attached bank costs; saved and loaded it decides alike."""
    monkeypatch.setattr(bank, "_CLEAR", -torch.inf if pays else torch.inf)
    toy = toys.make("llama")
    batches, model = two_kinds(toy), adaskip.attach(toy.model, SkipPlan())
    found = find_bank(model, batches, 24, keep=0.75, paths=3, groups=2, entry=1, file=tmp_path / "prices")
    assert (len(found.paths) > 2) == pays
    assert all(layer >= 1 for path in found.paths for layer in path)
    figures = found.figures
    assert figures["best"] <= figures["static"]
    assert max(figures["chosen_keep"], figures["static_keep"]) <= 0.75
    everyone = batches(range(24))
    measured = plan_costs(model, everyone, [SkipPlan.static(path).keep(4) for path in found.paths])
    assert torch.allclose(measured.kl, found.costs, atol=1e-6)
    assert torch.allclose(measured.keep.mean(0), found.share)
    expected = choose(found.predictor(bank.describe(model, everyone[0], 1)), found.share, found.price)

    again = adaskip.attach(model.detach(), found.policy())
    found.load(again.policy)
    with torch.no_grad():
        again(**everyone[0].arguments())
    keep = again.routing.keep
    assert torch.equal(keep, torch.stack([SkipPlan.static(found.paths[i]).keep(4) for i in expected.tolist()], 1))
    again.save_pretrained(tmp_path)
    loaded = adaskip.RoutedModel.from_pretrained(tmp_path, again.detach())
    with torch.no_grad():
        loaded(**everyone[0].arguments())
    assert torch.equal(loaded.routing.keep, keep)


def test_what_cannot_be_found_is_told() -> None:
    toy = toys.make("llama")
    model = adaskip.attach(toy.model, SkipPlan())
    with pytest.raises(
        ConfigError, match=r"keep: expected at least 0.750, what remains when every layer behind entry=3"
    ):
        find_bank(model, two_kinds(toy), 24, keep=0.5)
    with pytest.raises(DataError, match="expected at least 20 inputs to fit a predictor on, got 3"):
        find_bank(model, lambda rows: [], 3, keep=0.9)
