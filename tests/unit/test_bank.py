"""Banks of paths: found on planted prices, predicted from planted features, and a whole one on a toy."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

import adaskip
from adaskip.batch import Batch
from adaskip.errors import ConfigError, DataError
from adaskip.survey.bank import find_bank, find_paths, fit_predictor
from adaskip.survey.greedy import greedy_paths
from tests import toys

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


def test_each_group_of_inputs_gets_its_path() -> None:
    single = planted(torch.Generator().manual_seed(0))
    single[:, :2] = torch.inf  # not allowed
    paths, costs = find_paths(price_of(single), single, skips=2, count=3, width=6, rounds=1, seed=0)
    assert {(3, 4), (5, 6)} < {*paths}
    assert len(paths) == 3
    assert costs.shape == (INPUTS, 3)
    assert costs.amin(1).max() < 0.03
    assert costs[:, 0].mean() > 0.3, "the first path is one for all"
    only, _ = find_paths(price_of(single), single, skips=2, count=1, width=6, rounds=1, seed=0)
    assert only == paths[:1]


def test_the_predictor_tells_the_groups_apart_and_is_judged_on_inputs_it_has_not_seen() -> None:
    draw = torch.Generator().manual_seed(0)
    group = torch.arange(INPUTS) % 2
    features = torch.randn(INPUTS, 5, generator=draw)
    features[:, 2] += 40.0 * group
    costs = torch.stack([0.5 * torch.ones(INPUTS), 1.0 - group, 0.0 + group], 1).double()
    centre, weight, bias, chosen = fit_predictor(features, costs)
    assert torch.equal(chosen, 2 - group)
    assert torch.equal(((features - centre) @ weight + bias).argmin(1), chosen)


def test_where_prompts_tell_nothing_everybody_takes_the_first_path() -> None:
    """Never worse than the best plan: catches a predictor that fits noise, and is believed."""
    draw = torch.Generator().manual_seed(0)
    costs = torch.rand(INPUTS, 4, generator=draw, dtype=torch.float64)
    costs[:, 0] = 0.45
    _, weight, bias, chosen = fit_predictor(torch.randn(INPUTS, 30, generator=draw), costs)
    assert not weight.any()
    assert not chosen.any()
    assert int(bias.argmin()) == 0


def test_a_bank_of_a_model(tmp_path) -> None:
    """What it says of each input is what the attached bank costs; saved and loaded it decides alike."""
    toy = toys.make("llama")
    inputs = toy.batch([6 + i % 5 for i in range(24)])
    labels = torch.where(inputs["attention_mask"].bool(), inputs["input_ids"], -100)
    labels[:, :-2] = -100
    whole = Batch(inputs, labels, inputs["attention_mask"].bool() & (labels == -100))
    model = adaskip.attach(toy.model, adaskip.SkipPlan())

    def batches(rows: Sequence[int]) -> list[Batch]:
        chosen = list(rows)
        return [Batch({n: v[chosen] for n, v in inputs.items()}, labels[chosen], whole.prompt_mask[chosen])]

    found = find_bank(model, batches, 24, skips=1, paths=3, entry=1)
    assert all(len(path) == 1 and path[0] >= 1 for path in found.paths)
    assert found.figures["best"] <= found.figures["chosen"] <= found.figures["first"]
    again = adaskip.attach(model.detach(), found.policy())
    found.load(again.policy)
    with torch.no_grad():
        again(**whole.arguments())
    keep = again.routing.keep
    again.save_pretrained(tmp_path)
    loaded = adaskip.RoutedModel.from_pretrained(tmp_path, again.detach())
    with torch.no_grad():
        loaded(**whole.arguments())
    assert torch.equal(loaded.routing.keep, keep)
    assert (keep.sum(0) == 3).all()


def test_what_cannot_be_found_is_told() -> None:
    model = adaskip.attach(toys.make("llama").model, adaskip.SkipPlan())
    with pytest.raises(ConfigError, match="skips: expected 1 to 1, as many as stand behind entry=3, got 2"):
        find_bank(model, lambda rows: [], 40, skips=2)
    with pytest.raises(DataError, match="expected at least 20 inputs to fit a predictor on, got 3"):
        find_bank(model, lambda rows: [], 3, skips=1)
