"""What every policy is held to, and one of our own, which this file alone makes: 16 lines, and all the rest it gets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import lightning
import pytest
import torch
from torch import Tensor

import adaskip
from adaskip.bench.settings import BenchSettings
from adaskip.bench.subject import stored_subject
from adaskip.bench.table import bench
from adaskip.demo.backbone import load
from adaskip.errors import ConfigError
from adaskip.policies import Policy, find, register
from adaskip.policy import HOMES
from adaskip.recipe import dump
from adaskip.recipe import load as load_recipe
from adaskip.runfiles import RECIPE, ROUTER
from tests import families, policies, tuning
from tests.routing import GREEDY, LENGTHS, decide, real, same_both_ways

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

POLICIES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "coin": lambda target: Coin(target=adaskip.Target(**target)),
    **policies.POLICIES,
}
"""Every kind of `adaskip.policy.HOMES`, and the one above, for a target."""

GIVES_LOGITS = {
    "coin": False,
    "delask": False,
    "fastv": False,
    "learned": True,
    "path_bank": False,
    "pyramid_drop": False,
    "skip_it": True,
    "skip_vision": False,
    "static": False,
    "token_plan": False,
}
"""Whether a kind's `decide` gives logits, which a threshold is compared with; else it gives booleans, or nothing."""

RANKS_TOKENS = ("fastv", "pyramid_drop")
"""Kinds that drop single vision tokens by what an attention shows."""

SKIPS_NOTHING = ("delask",)
"""Kinds that change what layers return, and run every one."""

CASES = [
    (kind, name, target)
    for kind in POLICIES
    for name in (("llama", "llava", "qwen2_vl", "gemma2") if kind in ("coin", *RANKS_TOKENS) else ("llama", "llava"))
    for target in ({}, {"unit": "mlp"}, {"phase": "decode"}, {"group": "vision"}, {"group": "vision", "kv": "kept"})
    if "group" not in target or name in families.VISION
    if target.get("unit") != "mlp" or name != "gemma2"
    if kind not in RANKS_TOKENS or target == {"group": "vision"}  # single vision tokens leave whole layers
    if kind != "skip_vision" or (name == "llava" and target == {"group": "vision"})  # they leave MLPs
    if kind != "delask" or (target.get("unit") != "mlp" and "kv" not in target)  # no token leaves a layer
    if kind != "token_plan" or "phase" not in target  # a prompt alone has no tokens that would decide then
]
CASES += [
    (kind, name, {"unit": "sublayers"} | target)
    for kind in ("coin", "learned", "path_bank", "static", "token_plan")
    for name, target in (("llama", {}), ("llava", {"group": "vision", "kv": "kept"}))
]


def routed(kind: str, name: str, target: dict[str, Any]) -> tuple[families.Toy, adaskip.RoutedModel]:
    toy = families.make(name, "eager")
    model = adaskip.attach(toy.model, POLICIES[kind](target))
    if kind in ("path_bank", "skip_it"):  # a predictor that tells prompts apart
        torch.nn.init.normal_(model.policy.weight, generator=torch.Generator().manual_seed(0))
    if kind == "token_plan":  # classes that tell tokens apart
        torch.nn.init.normal_(model.policy.centres, generator=torch.Generator().manual_seed(0))
    return toy, decide(model) if model.routers else model


def test_every_policy_is_in_the_list() -> None:
    """A method that was added to the registry is held to the contract below; catches one that nobody tests."""
    assert {*HOMES} <= {*POLICIES}


def test_every_policy_stands_in_the_table_of_the_page() -> None:
    """Catches a method that was registered, and that nobody who reads about policies finds."""
    table, _ = policies.PAGE.read_text(encoding="utf-8").split("<!-- capabilities -->")
    assert [kind for kind in HOMES if f"\n| `{kind}` | " not in table] == []


def test_the_page_holds_the_table_of_what_policies_can_do() -> None:
    """Made of the classes; catches a policy that takes another target, or learns in another way, than the page says."""
    page = policies.PAGE.read_text(encoding="utf-8")
    assert policies.filled(page) == page, "write it anew: python -m tests.policies"


@pytest.mark.parametrize(
    ("kind", "name", "target"), CASES, ids=["-".join((k, n, *t.values())) or "all" for k, n, t in CASES]
)
class TestContract:
    def test_ways_of_running(self, kind: str, name: str, target: dict[str, Any]) -> None:
        """Training equals skipping, cached equals uncached, and rows do not see one another."""
        toy, model = routed(kind, name, target)
        rows = toy.rows(LENGTHS)
        batch = toy.collate(rows)
        logits = same_both_ways(model, batch)
        model(**batch)
        keep = model.routing.share  # of a row's tokens: where rows decide, all or none
        assert keep.mean() == 1 if kind in SKIPS_NOTHING else 0 < keep.mean() < 1
        assert (model.routing.logits is not None) == GIVES_LOGITS[kind]
        other = toy.collate(rows, "right")
        with torch.no_grad():
            assert (real(model(**other).logits, other) - real(logits, batch)).abs().max() <= 1e-3
        assert torch.equal(model.routing.share, keep)
        with torch.no_grad():
            for i, row in enumerate(rows):
                model(**toy.collate([row]))
                assert torch.equal(model.routing.share[:, 0], keep[:, i])
        if model.policy.known(len(model.spec.layers)) is not None:  # a plan is followed whatever else is said
            return
        with model.keep_all():
            model(**batch)
        assert model.routing.share.min() == 1
        model.hold([0, 1])
        model(**batch)
        assert model.routing.share[:2].min() == 1

    def test_saving(self, kind: str, name: str, target: dict[str, Any], tmp_path: Path) -> None:
        toy, model = routed(kind, name, target)
        batch = toy.batch(LENGTHS)
        if kind == "coin":
            model.policy.bias = 0.1
        model.hold([2])
        expected = model.generate(**batch, max_new_tokens=4, **GREEDY)
        model.save_pretrained(tmp_path)
        again = adaskip.RoutedModel.from_pretrained(tmp_path, families.make(name, "eager").model)
        assert type(again.policy) is type(model.policy)
        assert again.policy.held == model.policy.held == (*model.sites.of(2),)
        assert kind != "coin" or again.policy.bias == 0.1
        assert torch.equal(again.generate(**batch, max_new_tokens=4, **GREEDY), expected)
        assert torch.equal(again.routing.keep, model.routing.keep)

    def test_many_prompts(self, kind: str, name: str, target: dict[str, Any]) -> None:
        toy, model = routed(kind, name, target)
        items = [toy.collate([row]) for row in toy.rows(LENGTHS)]
        if model.target.scope == "token":
            with pytest.raises(ConfigError, match="under scope 'token' a prompt has no path of its own"):
                model.generate_many(items, max_new_tokens=4, **GREEDY)
            return
        many = model.generate_many(items, max_new_tokens=4, **GREEDY)
        for item, answer in zip(items, many.answers, strict=True):
            assert torch.equal(model.generate(**item, max_new_tokens=4, **GREEDY)[0, -4:], answer.tokens)


def test_eval_and_bench(tmp_path: Path) -> None:
    """`adaskip eval` and `adaskip bench` take the folder of a run that holds it; catches a verb for routers alone.

    Bench times what it decides by itself, and shares that it is made to leave out, with its own work in either.
    """
    base, _ = load()
    recipe = load_recipe("digits-vlm", ["data.examples.test=12"])
    (tmp_path / RECIPE).write_text(dump(recipe))
    adaskip.attach(base, Coin(target=adaskip.Target(group="vision"))).save_pretrained(tmp_path / ROUTER)
    result = adaskip.evaluate(tmp_path, per_kind=2)
    assert {row.n for row in result.kinds} == {2}
    assert 0 < result.mean["keep"] < 1
    subject = stored_subject(str(tmp_path), torch.device("cpu"), 0)
    assert type(subject.routed.policy) is Coin
    size = {"target": str(tmp_path), "batch": (2,), "new": 2, "budget": 0}
    own, _ = bench(subject, BenchSettings(**size))
    assert (own["path"], own["batch"]) == ("own", 2)
    forced = bench(subject, BenchSettings(**size, skip=(0.5,), path=("uniform", "mixed")))
    assert [(row["phase"], row["path"], row["paths"]) for row in forced] == [
        ("prefill", "uniform", 1),
        ("decode", "uniform", 1),
        ("prefill", "mixed", 2),
        ("decode", "mixed", 2),
    ]
    assert all(0 < row["keep"] < 1 for row in [own, *forced] if row["phase"] == "prefill")


@register
class Scales(Policy):
    """A policy that learns: one weight and one bias a layer for the length of the prompt's mean state."""

    kind: ClassVar[str] = "scales"

    def build(self, spec: Any, seed: int) -> None:
        self.weight = torch.nn.Parameter(torch.full((len(spec.layers), 2), 1.0))

    def decide(self, layer: int, states: Tensor, request: Any) -> Tensor:
        prompt = request.prompt[..., None]
        mean = states.detach().masked_fill(~prompt, 0.0).sum(1) / prompt.sum(1)
        weight, bias = self.weight[layer]
        return weight * mean.norm(dim=-1) + bias


def test_one_that_learns(tmp_path: Path) -> None:
    """`RouterTuner` trains whatever has parameters and gives logits; its threshold, too, is set and saved."""
    model = adaskip.attach(families.make("llama").model, Scales())
    tuner = adaskip.RouterTuner(model, adaskip.Objective(keep=0.5, bound_weight=0.0, warmup=0.0), learning_rate=0.1)
    trainer = lightning.Trainer(
        max_steps=4, logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu"
    )
    trainer.fit(tuner, torch.utils.data.DataLoader(tuning.DATA[:8], **tuning.WHOLE), None)
    assert (model.policy.weight != 1.0).all()
    model.set_threshold(1.5)
    model.save_pretrained(tmp_path)
    again = adaskip.RoutedModel.from_pretrained(tmp_path, families.make("llama").model)
    assert again.policy.threshold == 1.5
    assert torch.equal(again.policy.weight, model.policy.weight)
    assert again.routers is None


def test_what_cannot_be_trained_says_so() -> None:
    _, model = routed("coin", "llama", {})
    with pytest.raises(ConfigError, match=r"policy \(Coin\) has no parameters to train"):
        adaskip.RouterTuner(model, adaskip.Objective(keep=0.5))


def test_one_that_has_parameters_and_gives_no_logits(tmp_path: Path) -> None:
    """Its parameters would never move; catches autograd's own error, far from the cause."""

    class Hard(Scales):
        kind: ClassVar[str] = "hard"

        def decide(self, layer: int, states: Tensor, request: Any) -> Tensor:
            return super().decide(layer, states, request) > 0

    model = adaskip.attach(families.make("llama").model, Hard())
    tuner = adaskip.RouterTuner(model, adaskip.Objective(keep=0.5, bound_weight=0.0))
    with pytest.raises(ConfigError, match=r"Hard\.decide returned booleans, .*; return float32 logits"):
        tuning.trainer(tmp_path).fit(tuner, tuning.loader(tuning.DATA[:4]))


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
