"""Skip-It by the input: what it sees and decides by hand, the fit, and the limit that a budget asks for."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch

import adaskip
from adaskip.errors import ConfigError, DataError
from adaskip.methods.evidence import Evidence
from adaskip.methods.method import find
from adaskip.plan import KEEP_ALL
from adaskip.policies.skip_it import FLOOR, SkipIt, measure, read_change
from adaskip.survey.forecast import Forecast, find_forecast
from adaskip.survey.record import record
from adaskip.theory.measures import cosine_distance
from adaskip.theory.regression import Predictor
from tests import toys, tuning
from tests.routing import LENGTHS

EAST, NORTH, NORTHEAST = [1.0, 0.0], [0.0, 1.0], [3.0, 3.0]


def test_notions_by_hand() -> None:
    """Of three tokens one turns by 90 degrees, one by 45, one not; catches padding, and a mean over all places."""
    nothing = [math.nan, math.nan]
    before = torch.tensor([[nothing, EAST, EAST, EAST], [EAST, EAST, EAST, nothing]])
    after = torch.tensor([[nothing, NORTH, NORTHEAST, EAST], [EAST, EAST, NORTH, nothing]])
    prompt = torch.tensor([[False, True, True, True], [True, True, True, False]])
    turned = 1 - 0.5**0.5
    assert measure(before, after, prompt, "geometric", 0.5).tolist() == pytest.approx([(1 + turned) / 3, 1 / 3])
    assert measure(before, after, prompt, "proximal", 0.5).tolist() == pytest.approx([1 / 3, 1 / 3])
    assert measure(before, after, prompt, "proximal", 0.2).tolist() == pytest.approx([2 / 3, 1 / 3])
    assert measure(before, after, torch.zeros_like(prompt), "geometric", 0.5).tolist() == [0, 0]
    seen = read_change(before, after, prompt, prompt, "proximal", 0.5)
    logs = [[math.log(1 / 3 + FLOOR), math.log(last + FLOOR)] for last in (0, 1)]
    assert torch.allclose(seen, torch.tensor(logs), atol=1e-6)


@pytest.mark.parametrize("group", ["all", "vision"])
def test_it_decides_by_what_the_layers_before_the_entry_did(group: str) -> None:
    """Layer 2 is predicted by the change of layer 1, layer 3 by a constant; catches another layer, or other tokens."""
    toy = toys.make("llava")
    batch = toy.batch(LENGTHS)
    weight = torch.zeros(4, 2)
    weight[2, 0] = 1.0  # the group's change in layer 1
    target = adaskip.Target(group=group)  # type: ignore[arg-type]
    fitted = Predictor(torch.zeros(4), weight, torch.tensor([0.0, math.log(0.1)]))
    model = adaskip.attach(toy.model, SkipIt(0.3, entry=2, target=target).fitted(fitted)).eval()
    with torch.no_grad():
        with model.dense():
            states = model(**batch, output_hidden_states=True).hidden_states
        model(**batch)
    tokens = batch["attention_mask"].bool()
    if group == "vision":
        tokens = tokens & (batch["input_ids"] == toys.IMAGE)
    change = cosine_distance(states[1], states[2], tokens)
    limit = float(change.sort().values[2:4].mean())
    logits = model.routing.logits
    assert torch.allclose(logits[2], (change + FLOOR).log(), atol=1e-5)
    assert (logits[3] == logits[3, 0]).all()
    assert not model.routing.keep[3].any()
    assert (logits[:2] == -KEEP_ALL).all()
    model.set_threshold(math.log(limit + FLOOR))
    model(**batch)
    assert torch.equal(model.routing.keep[2], change > limit)
    assert model.routing.keep[2].sum() == 2
    assert model.policy.limit == pytest.approx(limit + FLOOR)  # type: ignore[union-attr]


def forecast_of(guessed: list[list[float]], entry: int = 1) -> Forecast:
    values = torch.tensor(guessed, dtype=torch.float64)
    nothing = Predictor(torch.zeros(2), torch.zeros(2, values.shape[1]), torch.zeros(values.shape[1]))
    return Forecast(entry, "geometric", 0.05, nothing, torch.arange(len(values)), values, values)


def test_the_limit_of_a_budget_by_hand() -> None:
    """Layers save .2 and .4 of one input, .3 and .3 of the other; catches a mean over layers, and a limit too high.

    In the order of what is guessed, .1 (saves .2), .2 (.3), .3 (.3), .4 (.4) of one input each, so half as much in the
    mean: what is kept is .9, .75, .6, .4.
    """
    forecast = forecast_of([[0.1, 0.4], [0.3, 0.2]])
    saved = torch.tensor([[0.5, 0.2, 0.4], [0.5, 0.3, 0.3]], dtype=torch.float64)
    limits = {0.95: 0.1, 0.9: 0.1, 0.8: 0.2, 0.75: 0.2, 0.7: 0.3, 0.4: 0.4}
    for keep, limit in limits.items():
        assert forecast.limit(saved, keep) == pytest.approx(limit, abs=1e-9), keep
        assert (forecast.guessed <= forecast.limit(saved, keep)).sum() == round(limit * 10)
    with pytest.raises(ConfigError, match=r"keep=0\.3: expected at least 0\.400, .* layer from entry=1 on is left out"):
        forecast.limit(saved, 0.3)


def planted(count: int) -> tuple[adaskip.RoutedModel, list[Any]]:
    model = adaskip.attach(toys.make("llama").model, adaskip.SkipPlan())
    return model, tuning.batches(count, rows=8)


def test_the_fit_reads_what_the_policy_sees() -> None:
    """The attached policy says what the regression says of the change in layers 0 and 1; catches another layer's."""
    model, batches = planted(4)
    forecast = find_forecast(model, batches, entry=2)
    seen, change = [], []
    for batch in batches:
        dense = record(model, batch)
        prompt = batch.prompt_mask & dense.tokens.valid
        pairs = list(pairwise(dense.states))
        seen.append(torch.cat([read_change(*pair, prompt, prompt, "geometric", 0.05) for pair in pairs[:2]], 1))
        change.append(cosine_distance(*pairs[2], prompt).double())
    assert torch.allclose(forecast.measured[:, 0], torch.cat(change), atol=1e-6)
    assert torch.allclose(forecast.predictor.centre, torch.cat(seen).double().mean(0), atol=1e-6)
    again = adaskip.attach(model.detach(), forecast.policy(0.1, model.target)).eval()
    with torch.no_grad(), again.keep_all():
        again(**batches[0].arguments())
    said = again.routing.logits[2:].T.exp().double()
    assert torch.allclose(said, forecast.predictor(seen[0]), rtol=1e-4)
    assert said.std(0).min() > 0
    assert len(forecast.ranks) == 2


def test_the_method_holds_its_budget_on_what_it_was_fitted_on(tmp_path: Any) -> None:
    """Catches savings of other inputs, a predictor that is lost on the way, and one that a file does not bring back."""
    model, batches = planted(4)
    evidence = Evidence(model, lambda rows: batches, 32)
    policy = find("skip_it_input").policy(evidence, 0.6)
    routed = adaskip.attach(model.detach(), policy).eval()  # type: ignore[arg-type]
    keep = []
    for batch in batches:
        with torch.no_grad():
            routed(**batch.arguments())
        keep.append(routed.routing.keep_rate)
    assert float(torch.cat(keep).mean()) == pytest.approx(0.6, abs=0.08)
    decisions = routed.routing.keep
    routed.save_pretrained(tmp_path)
    again = adaskip.RoutedModel.from_pretrained(tmp_path, routed.detach())
    assert again.policy.limit == pytest.approx(policy.limit)  # type: ignore[union-attr]
    with torch.no_grad():
        again(**batches[-1].arguments())
    assert torch.equal(again.routing.keep, decisions)


def test_too_few_inputs_and_other_models_say_so() -> None:
    model, batches = planted(2)
    with pytest.raises(DataError, match=r"expected at least 20 inputs with tokens of group 'all' .* got 16"):
        find_forecast(model, batches)
    predictor = Predictor(torch.zeros(2), torch.zeros(2, 7), torch.zeros(7))
    with pytest.raises(ConfigError, match=r"expected a predictor of 4 features for 2 layers, got 2 for 7; fit it on"):
        adaskip.attach(model.detach(), SkipIt(entry=2).fitted(predictor))


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"limit": 0}, "limit: expected a number above 0, got 0"),
        ({"entry": 0}, "entry: expected a layer of at least 1, so that there is one to look at, got 0"),
        ({"notion": "functional"}, "notion: expected geometric or proximal, got 'functional'"),
        ({"delta": 2.0}, r"delta: expected a cosine distance in \(0, 2\), got 2.0"),
        ({"target": adaskip.Target(scope="token")}, "target: expected scope 'prompt', got 'token'"),
        ({"entry": 4}, "entry: expected a layer 1 to 3, got 4"),
    ],
)
def test_what_it_cannot_be(given: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        adaskip.attach(toys.make("llama").model, SkipIt(**given))
