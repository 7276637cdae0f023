"""A policy of one's own: this file alone makes it train, generate, cache, batch, save, load, bench and be compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import adaskip
from adaskip.errors import ConfigError
from adaskip.policies import Policy, find, register
from tests import families
from tests.routing import GREEDY, LENGTHS, real, same_both_ways

# -- the whole policy: 16 lines ---------------------------------------------------------------------------------------


@register
class Coin(Policy):
    """Toss a coin for every layer and prompt, weighed by what enters the layer: no method, but it depends on both."""

    kind: ClassVar[str] = "coin"

    def __init__(self, bias: float = 0.0, target: adaskip.Target | None = None) -> None:
        super().__init__(target)
        self.bias = bias

    def decide(self, layer: int, states: Tensor, request: Any) -> Tensor:
        prompt = request.prompt[..., None]
        mean = states.masked_fill(~prompt, 0.0).mean(-1).sum(1) / prompt.sum((1, 2))
        return (300 * (layer + 1) * mean).sin() > self.bias

    def to_dict(self) -> dict[str, Any]:
        return {"bias": self.bias, "target": self.target.to_dict()}


# -- what it gets for that --------------------------------------------------------------------------------------------

CASES = [
    (name, target)
    for name in ("llama", "llava", "qwen2_vl", "gemma2")
    for target in ({}, {"unit": "mlp"}, {"phase": "decode"}, {"group": "vision"}, {"group": "vision", "kv": "kept"})
    if "group" not in target or name in families.VISION
    if target.get("unit") != "mlp" or name != "gemma2"
]


def routed(name: str, target: dict[str, Any]) -> tuple[families.Toy, adaskip.RoutedModel]:
    toy = families.make(name, "eager")
    return toy, adaskip.attach(toy.model, Coin(target=adaskip.Target(**target)))


@pytest.mark.parametrize(("name", "target"), CASES, ids=[f"{n}-{'-'.join(t.values()) or 'all'}" for n, t in CASES])
class TestContract:
    def test_ways_of_running(self, name: str, target: dict[str, Any]) -> None:
        """Training equals skipping, cached equals uncached, and rows do not see one another."""
        toy, model = routed(name, target)
        rows = toy.rows(LENGTHS)
        batch = toy.collate(rows)
        logits = same_both_ways(model, batch)
        model(**batch)
        keep = model.routing.keep
        assert 0 < keep.float().mean() < 1
        assert model.routing.logits is None
        other = toy.collate(rows, "right")
        with torch.no_grad():
            assert (real(model(**other).logits, other) - real(logits, batch)).abs().max() <= 1e-3
        assert torch.equal(model.routing.keep, keep)
        with torch.no_grad():
            for i, row in enumerate(rows):
                model(**toy.collate([row]))
                assert torch.equal(model.routing.keep[:, 0], keep[:, i])
        with model.keep_all():
            model(**batch)
        assert model.routing.keep.all()
        model.hold([0, 1])
        model(**batch)
        assert model.routing.keep[:2].all()

    def test_saving(self, name: str, target: dict[str, Any], tmp_path: Path) -> None:
        toy, model = routed(name, target)
        batch = toy.batch(LENGTHS)
        model.policy.bias = 0.1
        model.hold([2])
        expected = model.generate(**batch, max_new_tokens=4, **GREEDY)
        model.save_pretrained(tmp_path)
        again = adaskip.RoutedModel.from_pretrained(tmp_path, families.make(name, "eager").model)
        assert type(again.policy) is Coin
        assert (again.policy.bias, again.policy.held) == (0.1, (2,))
        assert torch.equal(again.generate(**batch, max_new_tokens=4, **GREEDY), expected)
        assert torch.equal(again.routing.keep, model.routing.keep)

    def test_many_prompts(self, name: str, target: dict[str, Any]) -> None:
        toy, model = routed(name, target)
        items = [toy.collate([row]) for row in toy.rows(LENGTHS)]
        many = model.generate_many(items, max_new_tokens=4, **GREEDY)
        for item, answer in zip(items, many.answers, strict=True):
            assert torch.equal(model.generate(**item, max_new_tokens=4, **GREEDY)[0, -4:], answer.tokens)


def test_what_cannot_be_trained_says_so() -> None:
    _, model = routed("llama", {})
    with pytest.raises(ConfigError, match=r"policy \(Coin\) has no parameters to train"):
        adaskip.RouterTuner(model, adaskip.Objective(keep=0.5))


def test_the_registry() -> None:
    """Kinds are taken once, and what is unknown says what to do."""
    assert find("coin") is Coin
    with pytest.raises(ConfigError, match=r"'coni': no such kind, did you mean 'coin'.*import the module"):
        find("coni")

    with pytest.raises(ConfigError, match="expected a kind to register it under"):
        register(type("Nameless", (Policy,), {}))
    for kind in ("learned", "coin"):
        with pytest.raises(ConfigError, match=f"the kind '{kind}' is another policy's"):
            register(type("Twin", (Policy,), {"kind": kind}))
