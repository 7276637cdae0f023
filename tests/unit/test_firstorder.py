import pytest
import torch

from adaskip.batch import Batch
from adaskip.errors import DataError
from adaskip.plan import SkipPlan
from adaskip.runtime.attach import attach
from adaskip.survey.firstorder import logit_tangent, score_products
from adaskip.theory.bounds import logit_shift
from tests import toys


def prepared(name, group, dtype=torch.float64):
    """An attached toy, a teacher-forced batch of three inputs, and the states of its dense pass."""
    toy = toys.make(name)
    model = attach(toy.model.to(dtype), plan=SkipPlan(group=group))
    inputs = toy.batch([7, 4, 6])
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -2:] = inputs["input_ids"][:, -2:]
    batch = Batch(inputs, labels, inputs["attention_mask"].bool() & (labels == -100))
    states = []
    with (
        torch.no_grad(),
        model.dense(),
        model.observe(lambda i, before, after: states.extend([after] if states else [before, after])),
    ):
        logits = model(**inputs, use_cache=False).logits
    return model, batch, states, logits


@torch.no_grad()
def skipped_state(model, batch, states, layer):
    """What a layer hands on when the group leaves it."""
    keep = torch.ones(4, 3, dtype=torch.bool)
    keep[layer] = False
    seen = {}
    with model.observe(lambda index, before, after: seen.update({index: after})):
        model(**batch.arguments(), routing=keep)
    return seen[layer]


@torch.no_grad()
def moved(model, batch, states, layer, shift):
    with model.dense(), model.replay([*states[: layer + 1], states[layer + 1] + shift]):
        return model(**batch.inputs, use_cache=False).logits


@pytest.mark.parametrize(("name", "group"), [("llama", "all"), ("llava", "vision"), ("qwen2_vl", "vision")])
def test_the_tangent_is_the_derivative(name, group):
    model, batch, states, _ = prepared(name, group)
    for layer in range(4):
        shift = skipped_state(model, batch, states, layer) - states[layer + 1]
        tangent = logit_tangent(model, batch, states, layer, shift)
        step = 2e-3  # the models' norms work in float32, whatever the weights
        ahead, back = (moved(model, batch, states, layer, sign * step * shift) for sign in (1, -1))
        valid = batch.inputs["attention_mask"].bool()
        torch.testing.assert_close(tangent[valid], ((ahead - back) / (2 * step))[valid], rtol=1e-2, atol=2e-3)
        assert tangent[:, -1].abs().max() > 1e-3


@pytest.mark.parametrize(("name", "group"), [("llama", "all"), ("llava", "vision")])
def test_scores_at_drawn_labels_average_to_the_fisher_form(name, group):
    model, batch, states, logits = prepared(name, group)
    shifts = [skipped_state(model, batch, states, layer) - states[layer + 1] for layer in range(4)]
    where = batch.labels[:, 1:] != -100
    expected = []
    for layer, shift in enumerate(shifts):
        tangent = logit_tangent(model, batch, states, layer, shift)
        s = logit_shift(logits[:, :-1][where], (logits + tangent)[:, :-1][where]).s
        expected.append((s**2).view(3, 2).mean(1))
    expected = torch.stack(expected, 1)
    found = score_products(model, batch, states, shifts, draws=100)
    torch.testing.assert_close(found, expected, rtol=0.7, atol=0.0)
    torch.testing.assert_close(found.mean(0), expected.mean(0), rtol=0.35, atol=0.0)
    one = score_products(model, batch, states, shifts, seed=1)
    assert torch.equal(one, score_products(model, batch, states, shifts, seed=1))
    assert not torch.equal(one, score_products(model, batch, states, shifts, seed=2))


def test_nothing_predicted_is_an_error():
    model, batch, states, _ = prepared("llama", "all")
    batch.labels[1] = -100
    with pytest.raises(DataError, match="expected a supervised token in every input; collate with answers=True"):
        score_products(model, batch, states, states[:-1])
