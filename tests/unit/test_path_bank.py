"""The path bank: the choice worked out by hand, what a prompt's features depend on, and what is refused."""

from __future__ import annotations

import pytest
import torch

import adaskip
from adaskip.errors import ConfigError
from adaskip.policies import PathBank
from adaskip.policies.features import describe_prompt
from tests import toys


def test_each_prompt_takes_the_path_predicted_to_cost_least() -> None:
    """Costs by hand: the mean direction's first number for path 0, its second for path 1."""
    bank = PathBank([[1], [2]], entry=1)
    model = adaskip.attach(toys.make("llama").model, bank)
    width = model.spec.width
    bank.weight[0, 0] = bank.weight[1, 1] = 1.0
    states = torch.zeros(2, 3, width)
    states[0, 1:, 0] = 5.0  # logarithms of costs (1, 0): path 1
    states[1, 1:, 1] = 0.1  # (0, 1): path 0
    prompt = torch.ones(2, 3, dtype=torch.bool)
    logs = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert torch.allclose(bank.predict(describe_prompt(states, prompt)), logs.exp())
    request = type("Request", (), {"memo": {}, "prompt": prompt})
    assert bank.decide(0, states, request).tolist() == [True, True]
    assert bank.decide(1, states, request).tolist() == [True, False]
    assert bank.decide(2, torch.full_like(states, 9.0), request).tolist() == [False, True], (
        "decided once, before layer 1"
    )


def test_a_price_or_what_a_prompt_may_cost_decides_how_far_it_goes() -> None:
    """Costs by hand of three paths: dense, half, and a third of the compute."""
    costs = torch.tensor([[0.0, 0.2, 0.3], [0.0, 0.02, 0.9]])
    toy = toys.make("llama").model

    def chosen(**budget: float) -> list[int]:
        bank = PathBank([[], [1, 2], [1, 2, 3]], entry=1, **budget)
        adaskip.attach(toy, bank).detach()
        bank.share.copy_(torch.tensor([1.0, 0.5, 0.34]))
        bank.kappa.fill_(2.0)
        return bank.choose(costs).tolist()

    assert chosen() == [0, 0], "without a price cost alone decides"
    assert chosen(price=0.1) == [0, 1]
    assert chosen(price=1.0) == [2, 1]
    assert chosen(nats=0.05) == [0, 1], "twice what is predicted must be within it"
    assert chosen(nats=0.5) == [1, 1]
    assert chosen(nats=2.0) == [2, 2]
    assert chosen(nats=0.04) == [0, 1], "what costs just so much is within it"
    costs += torch.tensor([0.7, 0.1, 0.1])
    assert chosen(nats=0.1) == [1, 1], "where nothing is, the one that costs least, not the first or the lightest"


def test_what_a_prompt_may_cost_is_saved_with_the_bank() -> None:
    """Catches routers that are loaded again and decide by another rule."""
    bank = PathBank([[], [1, 2]], entry=1, nats=0.1)
    again = PathBank(**{**bank.to_dict(), "target": bank.target})
    assert (again.nats, again.price, again.paths) == (0.1, 0.0, bank.paths)
    assert again.to_dict() == bank.to_dict()


def test_without_a_fit_every_prompt_takes_the_first_path() -> None:
    toy = toys.make("llama")
    model = adaskip.attach(toy.model, PathBank([[2], [1, 3]], entry=1))
    model(**toy.batch([4, 6]))
    assert model.routing.keep.T.tolist() == [[True, True, False, True]] * 2


def test_a_first_token_of_any_size_changes_nothing() -> None:
    """In language models its norm is a hundred times the others'; catches a mean that sees that token alone."""
    states = torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(0))
    prompt = torch.tensor([[False, True, True, True, True, False]])
    found = describe_prompt(states, prompt)
    states[:, 1] *= 25_000.0
    states[:, 0], states[:, 5] = torch.nan, torch.inf  # padding, and an answer
    assert torch.equal(describe_prompt(states, prompt), found)
    by_hand = torch.nn.functional.normalize(states[0, 2:5], dim=-1)
    assert torch.allclose(found[0], torch.cat([by_hand.mean(0), by_hand[-1]]))


def test_a_prompt_of_one_token_has_features() -> None:
    states = torch.ones(1, 2, 4)
    assert describe_prompt(states, torch.tensor([[False, True]])).tolist() == [[0.5] * 8]


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: PathBank([]), "paths: expected at least one, got none"),
        (lambda: PathBank([[1, 5]], entry=3), r"layers \[1\] stand before entry=3, where every layer runs"),
        (lambda: PathBank(["ab"]), "expected a list of layer numbers for each"),
        (lambda: PathBank([[4]], 1, price=-1.0), "price: expected nats, 0 or more, got -1.0"),
        (
            lambda: PathBank([[4]], 1, price=1.0, nats=0.1),
            "nats: expected 0 or more, and no price beside it",
        ),
        (lambda: PathBank([[4]], 1, adaskip.Target(scope="token")), "expected scope 'prompt', got 'token'"),
        (lambda: adaskip.attach(toys.make("llama").model, PathBank([[7]])), r"layers \[7\] of paths: the model has 4"),
        (lambda: adaskip.attach(toys.make("llama").model, PathBank([[]], entry=4)), "entry=4: the model has 4 layers"),
    ],
)
def test_what_cannot_be_is_told(make, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        make()
