import pytest
import torch

from adaskip.batch import Batch
from adaskip.errors import DataError
from adaskip.plan import SkipPlan
from adaskip.runtime.attach import attach
from adaskip.survey.firstorder import logit_tangent, score_products
from adaskip.survey.record import record
from adaskip.theory.bounds import logit_shift
from tests import toys


def prepared(name, group, dtype=torch.float64):
    """Return the record of a toy's dense pass over a teacher-forced batch of three inputs."""
    toy = toys.make(name)
    model = attach(toy.model.to(dtype), SkipPlan(group=group))
    inputs = toy.batch([7, 4, 6])
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -2:] = inputs["input_ids"][:, -2:]
    return record(model, Batch(inputs, labels, inputs["attention_mask"].bool() & (labels == -100)))


@torch.no_grad()
def skip_shift(recorded, layer):
    """Return how far a skip of the layer moves the state after it, from a whole pass."""
    seen = {}
    with recorded.model.observe(lambda index, before, after: seen.update({index: after})):
        recorded.model(**recorded.batch.arguments(), routing=recorded.skipping([layer]))
    return seen[layer] - recorded.states[layer + 1]


@torch.no_grad()
def moved(recorded, layer, shift):
    states = [*recorded.states[: layer + 1], recorded.states[layer + 1] + shift]
    with recorded.model.dense(), recorded.model.replay(states):
        logits = recorded.model(**recorded.batch.inputs, use_cache=False).logits
    return logits[:, :-1][recorded.batch.supervised]


@pytest.mark.parametrize(("name", "group"), [("llama", "all"), ("llava", "vision"), ("qwen2_vl", "vision")])
def test_the_tangent_is_the_derivative(name, group):
    recorded = prepared(name, group)
    for layer in range(4):
        shift = skip_shift(recorded, layer)
        tangent = logit_tangent(recorded, layer, shift)
        step = 2e-3  # the models' norms work in float32, whatever the weights
        ahead, back = (moved(recorded, layer, sign * step * shift) for sign in (1, -1))
        torch.testing.assert_close(tangent, (ahead - back) / (2 * step), rtol=1e-2, atol=2e-3)
        assert tangent.abs().max() > 1e-3


@pytest.mark.parametrize(("name", "group"), [("llama", "all"), ("llava", "vision")])
def test_scores_at_drawn_labels_average_to_the_fisher_form(name, group):
    recorded = prepared(name, group)
    shifts = [skip_shift(recorded, layer) for layer in range(4)]
    expected = []
    for layer, shift in enumerate(shifts):
        s = logit_shift(recorded.logits, recorded.logits + logit_tangent(recorded, layer, shift)).s
        expected.append((s**2).view(3, 2).mean(1))
    expected = torch.stack(expected, 1)
    found = score_products(recorded, shifts, draws=100)
    torch.testing.assert_close(found, expected, rtol=0.7, atol=0.0)
    torch.testing.assert_close(found.mean(0), expected.mean(0), rtol=0.35, atol=0.0)
    one = score_products(recorded, shifts, seed=1)
    assert torch.equal(one, score_products(recorded, shifts, seed=1))
    assert not torch.equal(one, score_products(recorded, shifts, seed=2))


def test_nothing_predicted_is_an_error():
    recorded = prepared("llama", "all")
    recorded.batch.labels[1] = -100
    with pytest.raises(DataError, match="expected a supervised token in every input; collate with answers=True"):
        score_products(recorded, recorded.states[:-1])
