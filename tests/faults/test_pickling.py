"""Routed models that are copied, pickled, compiled or sent to another process."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
import torch.multiprocessing
from transformers import AutoModelForCausalLM

import adaskip
from adaskip.errors import ConfigError
from adaskip.plan import SkipPlan
from adaskip.policies.learned.config import RouterConfig
from tests.routed_toys import answers, llama, routed, spread

MAKERS = {
    "routers": routed,
    "mlp": lambda: spread(adaskip.attach(llama(), RouterConfig(unit="mlp"))),
    "token": lambda: spread(adaskip.attach(llama(), RouterConfig(scope="token", kv="kept"))),
    "plan": lambda: adaskip.attach(llama(), SkipPlan.static([1])),
}


def saved_and_loaded(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("copied", [saved_and_loaded, lambda m: pickle.loads(pickle.dumps(m)), copy.deepcopy])
def test_a_copy_is_a_model_of_its_own(kind: str, copied: Any) -> None:
    """Somebody saves the whole model with torch.save; catches a file that cannot be loaded, and shared layers."""
    model = MAKERS[kind]()
    expected = answers(model)
    other = copied(model)
    assert torch.equal(answers(other), expected)
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    assert torch.equal(answers(other), expected)
    model.detach()
    assert torch.equal(answers(other), expected)
    assert torch.equal(answers(other.detach()), answers(llama()))
    assert all(weight.requires_grad for weight in other.backbone.parameters())


def test_the_backbone_alone_can_be_copied() -> None:
    """A tool pickles or copies model.backbone (a trainer's best model); catches copies that lose their routing."""
    model = routed()
    expected = answers(model)
    for other in (copy.deepcopy(model.backbone), saved_and_loaded(model.backbone)):
        assert torch.equal(answers(other), expected)
        assert next(other.parameters()) is not next(model.backbone.parameters())


def test_a_tuner_can_be_sent_to_another_process() -> None:
    """strategy='ddp_spawn' pickles the whole LightningModule; catches what cannot be pickled in it."""
    tuner = adaskip.RouterTuner(routed(), adaskip.Objective(keep=0.5), steps=3)
    other = pickle.loads(pickle.dumps(tuner))
    assert torch.equal(answers(other.model), answers(tuner.model))


def _answer(number: int, model: adaskip.RoutedModel, results: Any) -> None:
    results[number] = answers(model).tolist()


@pytest.mark.slow
def test_a_spawned_process_routes_alike() -> None:
    """A model is handed to a spawned process; catches an error in the child."""
    model = routed()
    with torch.multiprocessing.Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.spawn(_answer, (model, results), nprocs=1)
        assert results[0] == answers(model).tolist()


def test_a_shallow_copy_is_refused() -> None:
    """copy.copy(model) would give two handles one backbone; catches thresholds that one sets and the other saves."""
    with pytest.raises(ConfigError, match=r"write copy\.deepcopy\(model\)"):
        copy.copy(routed())


def test_the_backbone_saves_as_it_was(tmp_path) -> None:
    """backbone.save_pretrained under routers; catches router weights or other names in its files."""
    model = routed()
    model.backbone.save_pretrained(tmp_path)
    assert set(model.backbone.state_dict()) == set(llama().state_dict())
    assert torch.equal(answers(AutoModelForCausalLM.from_pretrained(tmp_path).eval()), answers(llama()))


def test_whole_state_dicts_go_round() -> None:
    """Somebody moves all weights by state_dict; catches missing or unexpected keys, and routers in half precision."""
    model, other = routed(), routed(seed=1)
    other.load_state_dict(model.state_dict())
    assert torch.equal(answers(other), answers(model))
    halved = model.half()
    assert {weight.dtype for weight in halved.routers.parameters()} == {torch.float32}
    assert {weight.dtype for weight in halved.backbone.parameters()} == {torch.float16}
    assert halved.routers is not None
    assert answers(halved).shape == answers(other).shape


def test_a_forward_that_somebody_wrapped_stays_wrapped() -> None:
    """Somebody wraps a layer's forward under routers, then detaches; catches a lost wrapper, or routing left on."""
    model, calls = routed(), []
    layer = model.spec.layers[1]
    inner = layer.forward

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return inner(*args, **kwargs)

    layer.forward = wrapper
    routed_answers = answers(model)
    bare = model.detach()
    assert layer.forward is wrapper
    assert torch.equal(answers(bare), answers(llama()))
    assert calls
    assert torch.equal(answers(spread(adaskip.attach(bare))), routed_answers)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_attach_leaves_the_model_untouched(monkeypatch: pytest.MonkeyPatch, error: type) -> None:
    """The trial of single tokens is interrupted; catches a model that stays patched, frozen and in eval()."""
    from adaskip.runtime import attach

    def interrupt(model: Any) -> None:
        raise error("now")

    monkeypatch.setattr(attach, "try_tokens", interrupt)
    model = llama().train()
    with pytest.raises(error):
        adaskip.attach(model, RouterConfig(scope="token"))
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert all(weight.requires_grad for weight in model.parameters())
    assert all(module.training for module in model.modules())
    assert torch.equal(answers(model.eval()), answers(llama()))
