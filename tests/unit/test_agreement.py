"""The agreement of training's gradients with exact flips: against brute force, and on figures planted."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import adaskip
from adaskip.errors import ConfigError, DataError
from adaskip.survey.flips import PathCost
from adaskip.theory.costs import predicted
from adaskip.training.agreement import Agreement, Slopes, measure_slopes
from tests import toys
from tests.tuning import batches, planted


def undecided(scale: float) -> adaskip.RoutedModel:
    """A toy whose layer 2 writes little, with routers that may say either."""
    model = planted(scale)
    with torch.no_grad():
        for head in model.routers:
            head.outer.bias.fill_(0.5)
    return model


def test_slopes_are_those_of_the_same_path() -> None:
    """Would catch: an exact change with the wrong sign or of another path; a soft slope of other draws."""
    model, data = undecided(1e-3), batches(2, rows=5)
    goal = adaskip.Objective(task_weight=0.5, flips=2)
    found = measure_slopes(model, data, goal, paths=3, seed=4)
    assert found.exact.shape == found.soft.shape == found.drawn.shape == (3, 10, 4)
    batch, noise = data[1], torch.Generator().manual_seed(1_000_003 * 5 + 2)
    with torch.no_grad():
        with model.dense():
            dense = predicted(model(**batch.arguments()).logits, batch.supervised)
        cost = PathCost(dense, batch, 0.5)
        with model.explore(noise, soft=False):
            model(**batch.arguments())
        keep = model.routing.keep
        for layer in range(4):
            both = []
            for choice in (True, False):
                other = keep.clone()
                other[layer] = choice
                both.append(cost(predicted(model(**batch.arguments(), routing=other).logits, batch.supervised)))
            assert torch.allclose(found.exact[2, 5:, layer], both[0] - both[1], atol=1e-5)
    # what a layer that writes next to nothing changes is linear in its gate, so the soft slope is the exact change
    assert torch.allclose(found.soft[..., 2], found.exact[..., 2], rtol=0.1, atol=1e-6)
    assert ((found.drawn != 0).sum(2) == 2).all()
    assert torch.allclose(found.drawn[found.drawn != 0], 2 * found.exact[found.drawn != 0])
    assert torch.equal(measure_slopes(model, data, goal, paths=3, seed=4).exact, found.exact)


def test_agreement_of_planted_figures() -> None:
    """Would catch: ranks over the wrong axis, a path among its own witnesses, a dearest layer that is the cheapest."""
    exact = -torch.tensor([[[1.0, 2.0, 4.0], [2.0, 3.0, 8.0]], [[3.0, 2.0, 4.0], [2.0, 3.0, 8.0]]], dtype=torch.float64)
    found = Slopes(exact, exact, exact)
    assert torch.equal(found.fresh, exact.flip(0))
    assert list(Agreement.of(exact, exact).to_dict().values()) == pytest.approx([1, 1, 1, 0])
    assert list(Agreement.of(-exact, exact).to_dict().values()) == pytest.approx([-1, -1, -1, 1])
    shifted = exact + torch.tensor([[0.0], [9.0]])  # orders layers, not inputs
    assert Agreement.of(shifted, exact).over_layers == pytest.approx(1)
    assert Agreement.of(shifted, exact).over_inputs < 0


def test_what_cannot_be_compared_is_said() -> None:
    goal: Any = adaskip.Objective()
    with pytest.raises(DataError, match="expected at least 2 paths of each input"):
        measure_slopes(planted(1.0), batches(1), goal, paths=1)
    with pytest.raises(ConfigError, match="scope prompt"):
        measure_slopes(adaskip.attach(toys.make("llama").model, adaskip.RouterConfig(scope="token")), [], goal)
