"""Banks of paths: found on planted prices, predicted from planted features, and a whole one on a toy."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

import adaskip
from adaskip.errors import ConfigError, DataError
from adaskip.plan import SkipPlan
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
    assert lowest_price(costs, share, 1.0) == 0.0
    assert choose(costs, share, lowest_price(costs, share, 0.8)).tolist() == [2] * 8
    with pytest.raises(ConfigError, match=r"expected a keep of at least 0.800, got 0.5"):
        lowest_price(costs, share, 0.5)


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
