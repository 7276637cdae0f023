"""Gradient checkpointing while routers, and adapters beside them, learn: less is kept, and all else is the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM

import adaskip
from adaskip.errors import ConfigError
from adaskip.recipe import load
from adaskip.verbs.train import train
from tests import toys
from tests.faults.runs import SHORT
from tests.tuning import DATA, loader, trainer, weights


class Counter:
    """Count how often the MLPs of a model run."""

    def __init__(self, model: adaskip.RoutedModel) -> None:
        self.runs = 0
        for layer in model.spec.layers:
            layer.mlp.register_forward_pre_hook(self._count)  # type: ignore[union-attr,operator]

    def _count(self, *_: Any) -> None:
        self.runs += 1


def opt() -> Any:
    """An architecture whose layers drop states out by their own training mode."""
    torch.manual_seed(0)
    shape = {"vocab_size": 96, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    return OPTForCausalLM(OPTConfig(**shape, dropout=0.5, word_embed_proj_dim=32, init_std=0.2)).eval()


def fitted(
    folder: Path, base: Any, asks: bool, lora: bool = False, router: dict[str, Any] | None = None, **options: Any
) -> tuple[adaskip.RouterTuner, float]:
    """Train four steps; return the tuner and its last loss."""
    model = adaskip.attach(base, adaskip.RouterConfig(**(router or {})))
    if lora:
        adaskip.adapt(model, adaskip.Lora(rank=2, dropout=0.4))
    if asks:
        model.backbone.gradient_checkpointing_enable({"use_reentrant": False})
    goal = adaskip.Objective(keep=0.5, bound_weight=0.0)
    tuner = adaskip.RouterTuner(model, goal, learning_rate=0.03, seed=1)
    run = trainer(folder, steps=4, **options)
    run.fit(tuner, loader(DATA[:4]))
    return tuner, float(run.callback_metrics["train/loss"])


@pytest.mark.parametrize("router", [{}, {"unit": "mlp"}, {"scope": "token"}], ids=["block", "mlp", "token"])
@pytest.mark.parametrize("lora", [False, pytest.param(True, marks=pytest.mark.filterwarnings("ignore"))])
def test_what_is_learned_is_the_same(lora: bool, router: dict[str, Any], tmp_path: Path) -> None:
    """Would catch: layers run again along other draws, and adapters whose dropout is over by then."""
    if lora:
        pytest.importorskip("peft", reason="PEFT is an extra: pip install 'adaskip[peft]'")
    (plain, loss), (less, same) = (
        fitted(tmp_path, toys.make("llama", seed=5).model, asks, lora, router) for asks in (False, True)
    )
    assert same == pytest.approx(loss, rel=1e-6)
    torch.testing.assert_close(weights(less), weights(plain), rtol=0, atol=1e-5)
    if lora:
        assert plain.model.adapters is not None
        assert less.model.adapters is not None
        for found, expected in zip(less.model.adapters.parameters(), plain.model.adapters.parameters(), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_layers_run_again_though_the_backbone_is_in_eval() -> None:
    """transformers asks each layer whether it is in training mode: would catch a request that changes nothing.

    And a layer that is left in training mode, whose cache a later ``generate`` would not get.
    """
    counts = {}
    for asks in (False, True):
        model = adaskip.attach(toys.make("llama").model).train()
        if asks:
            model.backbone.gradient_checkpointing_enable({"use_reentrant": False})
        counter = Counter(model)
        model(**DATA[0].arguments()).logits.mean().backward()
        counts[asks] = counter.runs
        assert not any(module.training for module in model.backbone.modules())
        with torch.no_grad():
            model(**DATA[0].arguments())
    assert counts == {False: 4, True: 8}


def test_a_layer_that_runs_again_drops_nothing_out(tmp_path: Path) -> None:
    """OPT's layers drop half of their states in training mode: would catch a frozen model that is no more itself."""
    (plain, loss), (less, same) = (fitted(tmp_path, opt(), asks) for asks in (False, True))
    assert same == pytest.approx(loss, rel=1e-6)
    torch.testing.assert_close(weights(less), weights(plain), rtol=0, atol=1e-5)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_in_bfloat16_too(precision: str, tmp_path: Path) -> None:
    """Trained, saved and loaded: would catch states of another type in the rerun, and a loss that is another run's."""
    (_, loss), (less, same) = (
        fitted(tmp_path, toys.make("llama", seed=5).model, asks, precision=precision) for asks in (False, True)
    )
    assert same == pytest.approx(loss, rel=1e-3)
    less.model.save_pretrained(tmp_path / "router")
    base = toys.make("llama", seed=5).model.to(less.model.backbone.dtype)
    again = adaskip.RoutedModel.from_pretrained(tmp_path / "router", base)
    assert torch.equal(weights(less), torch.cat([weight.detach().flatten() for weight in again.routers.parameters()]))
    inputs = DATA[5].arguments()
    assert torch.equal(again(**inputs).logits, less.model.eval()(**inputs).logits)


def test_a_recipe_asks_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch a key that nothing reads, and an architecture without it that is taken all the same."""
    asked: list[bool] = []
    step = adaskip.RouterTuner.training_step

    def training_step(self: adaskip.RouterTuner, batch: Any, batch_idx: int) -> torch.Tensor:
        asked.append(self.model.backbone.is_gradient_checkpointing)
        return step(self, batch, batch_idx)

    monkeypatch.setattr(adaskip.RouterTuner, "training_step", training_step)
    asking = [*SHORT, "trainer.steps=4", "trainer.gradient_checkpointing=true"]
    train(load("digits-vlm", [*asking, f"output={tmp_path / 'run'}"]))
    assert asked == [True] * 4
    kind = type(adaskip.RoutedModel.from_pretrained(tmp_path / "run" / "router").backbone)
    monkeypatch.setattr(kind, "supports_gradient_checkpointing", False)
    with pytest.raises(ConfigError, match=r"trainer.gradient_checkpointing: expected an architecture that offers it"):
        train(load("digits-vlm", [*asking, f"output={tmp_path / 'other'}"]))
