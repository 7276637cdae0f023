"""The plan for each class of tokens: classes worked out by hand, what a search finds, and what is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import adaskip
from adaskip.errors import ConfigError, DataError
from adaskip.policies import TokenPlan
from adaskip.policies.token_plan import classify
from adaskip.survey import token_plan
from adaskip.survey.record import record
from adaskip.survey.token_plan import find_classes, find_token_plans
from tests import toys, tuning


def test_every_token_is_of_the_nearest_class_of_its_side() -> None:
    """Two classes of prompt tokens along two axes, one of generated ones; catches sides that are mixed up."""
    plan = TokenPlan([[1], [2]], [[1, 2]], entry=1)
    model = adaskip.attach(toys.make("llama").model, plan)
    plan.centres[0, 0] = plan.centres[1, 1] = plan.centres[2, 2] = 1.0
    states = torch.zeros(1, 4, model.spec.width)
    states[0, 0, 0], states[0, 1, 1], states[0, 2, 2], states[0, 3, 0] = 9.0, 0.1, 5.0, 7.0
    prompt = torch.tensor([[True, True, True, False]])
    request = type("Request", (), {"memo": {}, "prompt": prompt})
    assert plan.decide(0, states, request).tolist() == [[True] * 4], "before the entry everything runs"
    assert plan.decide(1, states, request).tolist() == [[False, True, False, False]]
    moved = torch.full_like(states, 3.0)
    assert plan.decide(2, moved, request).tolist() == [[True, False, True, False]], "told apart once, before layer 1"


def test_neither_length_nor_padding_changes_a_class() -> None:
    """Catches a first token a hundred times as long as the others that is nearest to everything."""
    centres = torch.nn.functional.normalize(torch.randn(5, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    states = torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(1))
    prompt = torch.tensor([[False, True, True, True, False, False]])
    found = classify(states, prompt, centres, 3)
    assert (found[0, 1:4] < 3).all()
    assert (found[0, 4:] >= 3).all()
    scaled = states * torch.tensor([1.0, 25_000.0, 1.0, 1e-3, 1.0, 1.0])[:, None]
    scaled[0, 0] = torch.nan
    assert torch.equal(classify(scaled, prompt, centres, 3)[:, 1:], found[:, 1:])
    again = classify(states[:, 2:3], prompt[:, 2:3], centres, 3)
    assert torch.equal(again[:, 0], found[:, 2]), "a token's class is its own, whatever stands beside it"


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: TokenPlan([], [[1]]), r"prompt: expected at least one class, got none"),
        (lambda: TokenPlan([[1]], [[4]], entry=3), r"layers \[1\] stand before entry=3"),
        (lambda: TokenPlan([[4]], [[4]], target=adaskip.Target()), r"expected scope 'token', got 'prompt'"),
        (lambda: TokenPlan([4], [[4]]), r"expected a list of layer numbers for each class"),
        (
            lambda: adaskip.attach(toys.make("llama").model, TokenPlan([[9]], [[]])),
            r"layers \[9\]: the model has 4 layers",
        ),
        (
            lambda: adaskip.attach(toys.make("llama").model, TokenPlan([[]], [[]], entry=7)),
            r"entry=7: the model has 4 layers",
        ),
    ],
    ids=["no class", "early", "scope", "no lists", "no such layer", "entry"],
)
def test_what_cannot_be_is_refused(make, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        make()


def searched(file: Path | None = None, keep: float = 0.6, held: tuple[int, ...] = (), **settings):
    toy = toys.make("llama")
    model = adaskip.attach(toy.model, adaskip.RouterConfig(scope="token")).eval()
    model.hold(held)
    batches = tuning.DATA[:2]
    options = {"classes": (2, 2), "entry": 1, "band": 1, "width": 3, "file": file} | settings
    return model, batches, find_token_plans(model, batches, keep=keep, **options)


def test_every_step_costs_and_keeps_what_it_says() -> None:
    """The plan of each length, attached and really executed; catches costs of other plans, or of other classes."""
    model, batches, plans = searched()
    steps = plans.steps
    assert steps[-1].keep <= 0.6 < steps[-2].keep
    assert [step.keep for step in steps] == sorted((step.keep for step in steps), reverse=True)
    backbone, target = model.detach(), model.target
    for count in (1, len(steps)):
        routed = adaskip.attach(backbone, plans.policy(count, target)).eval()
        plans.load(routed.policy)
        costs, kept = [], []
        for batch in batches:
            dense = record(routed, batch, states=False)
            costs.append(dense.compare(record(routed, batch, routed=True).logits)["kl"])
            kept.append(routed.routing.keep_rate)
        assert float(torch.cat(costs).mean()) == pytest.approx(steps[count - 1].kl, rel=1e-5)
        assert float(torch.cat(kept).mean()) == pytest.approx(steps[count - 1].keep, rel=1e-6)
        backbone = routed.detach()


def test_the_first_step_is_the_best_bargain() -> None:
    """By hand over all parts: nats for the share saved; catches a search by cost alone, or by share alone."""
    model, batches, plans = searched(width=1)
    first, bargains = plans.steps[0], {}
    for label in range(len(plans.centres)):
        for layer in range(1, 4):
            kl, kept = [], []
            for batch in batches:
                dense = record(model, batch)
                labels = classify(dense.entered[1], batch.prompt_mask, plans.centres, plans.prompts)
                keep = torch.ones(4, *labels.shape, dtype=torch.bool)
                keep[layer] = labels != label
                kl.append(dense.compare(dense.rerun(keep))["kl"])
                kept.append(model.routing.keep_rate)
            saved = 1 - float(torch.cat(kept).mean())
            if saved > 0:
                bargains[label, (layer,)] = float(torch.cat(kl).mean()) / saved
    assert first.parts == (min(bargains, key=bargains.get),)


def test_each_step_is_the_best_bargain_beside_what_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand, one part a step: what it adds to the cost for what it saves; catches a search by single costs alone."""
    monkeypatch.setattr(token_plan, "_TOGETHER", -1.0)  # nothing goes at once
    model, batches, plans = searched(keep=0.8, width=99)
    recorded = [record(model, batch) for batch in batches]
    prices = token_plan._Prices(recorded, plans.centres, plans.prompts, plans.entry, None)
    left = {(label, (layer,)) for label in range(len(plans.centres)) for layer in range(plans.entry, 4)}
    gone: list[tuple[int, tuple[int, ...]]] = []
    now = (0.0, 1.0)
    for step in plans.steps:
        bargains = {}
        for part in left:
            kl, kept = prices([*gone, part])
            if kept < now[1] - 1e-9:
                bargains[part] = (kl - now[0]) / (now[1] - kept)
        (part,) = step.parts
        assert bargains[part] == pytest.approx(min(bargains.values()), rel=1e-6)
        gone, now = [*gone, part], prices([*gone, part])
        left.remove(part)
    assert len(gone) > 2


def test_parts_go_at_once_only_where_together_they_cost_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches parts that are each cheap alone and dear together, and a last step that overshoots the budget."""
    *_, quick = searched()
    assert max(len(step.parts) for step in quick.steps) == 3
    monkeypatch.setattr(token_plan, "_TOGETHER", -1.0)
    *_, careful = searched()
    assert {len(step.parts) for step in careful.steps if step.kl > 0} == {1}
    assert careful.steps[-1].keep <= 0.6 < careful.steps[-2].keep


def test_the_last_step_overshoots_by_one_part_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three parts may always go at once; catches ones that go together although fewer would hold the budget."""
    monkeypatch.setattr(token_plan, "_TOGETHER", torch.inf)
    *_, plans = searched(keep=0.75)
    together = [step for step in plans.steps if len(step.parts) > 1]
    assert together
    assert min(step.keep for step in together) >= 0.75
    assert len(plans.steps[-1].parts) == 1
    assert plans.steps[-1].keep < 0.75 < plans.steps[-2].keep


def recorded_by_hand(rows: list[list[int | None]], answers: int, longer: float = 1.0) -> SimpleNamespace:
    """A recorded batch whose states before layer 1 point along one axis a token; None is padding."""
    states = torch.full((len(rows), len(rows[0]), 8), torch.nan)
    valid = torch.tensor([[axis is not None for axis in row] for row in rows])
    for at, (row, column) in enumerate(valid.nonzero().tolist()):
        axis = rows[row][column]
        states[row, column] = 0.0
        states[row, column, axis] = longer if at % 2 else 0.1
    prompt = torch.ones_like(valid)
    prompt[:, -answers:] = False
    batch = SimpleNamespace(prompt_mask=prompt, inputs={"input_ids": torch.zeros(valid.shape).long()})
    return SimpleNamespace(entered=[torch.zeros_like(states), states], batch=batch, tokens=SimpleNamespace(valid=valid))


def test_the_first_and_the_last_token_of_a_prompt_are_classes_of_their_own() -> None:
    """Axis 0 first and 1 last in prompts of 4 and 3, padded; 2 and 3 between, 4 and 5 behind.

    Catches a first or last column taken for a first or last token, one of them among the others, sides mixed up, long
    states that outweigh short ones, and a mean direction that is not of length 1 again.
    """
    rows = [[0, 2, 3, 1, 4, 5], [None, 0, 3, 1, 5, 4]]
    recorded = [recorded_by_hand(rows, 2, longer=9.0), recorded_by_hand([[None, None, 0, 2, 1, 4]], 1)]
    centres, prompts = find_classes(recorded, 1, (2, 1))  # type: ignore[arg-type]
    assert prompts == 4
    axes = centres.argmax(1).tolist()
    assert axes[:2] == [0, 1]
    assert {*axes[2:4]} == {2, 3}
    assert torch.allclose(centres[:4].amax(1), torch.ones(4))
    between = torch.tensor([0.0, 0.0, 0.0, 0.0, 3.0, 2.0, 0.0, 0.0]) / 13**0.5  # of three tokens and two, of length 1
    assert torch.allclose(centres[4], between)


def test_the_same_seed_draws_the_same_classes_and_another_one_others() -> None:
    """A search that was stopped draws its classes anew, and must find those that its costs are of."""
    (*_, one), (*_, again), (*_, other) = (searched(keep=0.95, classes=(6, 4), seed=s) for s in (3, 3, 4))
    assert len(one.centres) == 12
    assert torch.equal(one.centres, again.centres)
    assert one.steps == again.steps
    assert torch.equal(one.centres[:2], other.centres[:2])
    assert not torch.allclose(one.centres[2:].sort(0).values, other.centres[2:].sort(0).values, atol=1e-3)


def test_held_layers_and_those_before_the_entry_stay() -> None:
    """Catches a dear layer that a class leaves out although it was held from the start."""
    _, _, plans = searched(keep=0.8, held=(2,))
    gone = {layer for skip in plans.skips(len(plans.steps)) for layer in skip}
    assert gone <= {1, 3}
    with pytest.raises(ConfigError, match=r"keep: expected at least 0\.\d+, .* behind entry=1 .* got 0.1"):
        searched(keep=0.1)


def test_a_stopped_search_goes_on_from_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a plan that is measured twice, and a file that is not kept."""
    file = tmp_path / "prices.safetensors"
    *_, whole = searched(file)
    measured: list[int] = []
    measure = token_plan._Prices._measure
    monkeypatch.setattr(token_plan._Prices, "_measure", lambda *args: measured.append(1) or measure(*args))
    *_, again = searched(file)
    assert not measured
    assert again.steps == whole.steps
    *_, further = searched(file, keep=0.5)
    assert measured
    assert further.steps[:2] == whole.steps[:2]


def test_what_the_search_cannot_do_is_said() -> None:
    toy = toys.make("llama")
    model = adaskip.attach(toy.model, adaskip.RouterConfig())
    with pytest.raises(ConfigError, match=r"expected a model of scope 'token'"):
        find_token_plans(model, tuning.DATA[:1], keep=0.8)
    with pytest.raises(DataError, match=r"expected at least 999 prompt tokens, got \d+"):
        searched(classes=(999, 2))
