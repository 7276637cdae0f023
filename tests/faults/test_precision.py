"""Every precision that Lightning offers trains routers, on a backbone of any float type."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import adaskip
from adaskip.runtime.gates import straight_through
from tests import toys
from tests.tuning import DATA, loader, planted, trainer, weights, with_answers

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true", "64-true")
TYPES = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_routers_train_and_are_saved(precision: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """`Trainer(precision=...)` sets torch's default type while a step runs; "dot: same dtype" before."""
    model = adaskip.attach(toys.make("llama").model.to(dtype))
    goal = adaskip.Objective(keep=0.5, warmup=0.0, bound_weight=0.1)
    tuner = adaskip.RouterTuner(model, goal, calibration=DATA[8:10], learning_rate=0.05)
    check = adaskip.ConditionCheck(every=3, examples=16)
    before = weights(tuner)
    run = trainer(tmp_path, steps=6, precision=precision, callbacks=[check], gradient_clip_val=1.0)
    run.fit(tuner, loader(DATA[:4]), loader(DATA[4:6]))
    after = weights(tuner)
    assert after.dtype == torch.float32
    assert after.isfinite().all()
    assert (after - before).abs().max() > 1e-3
    assert model.backbone.dtype == TYPES.get(precision, dtype)
    assert tuner.multiplier.dtype == torch.float64
    assert 0 < tuner.multiplier < 0.2
    assert check.look is not None
    assert float(run.callback_metrics["train/bound"]) > 0
    model.save_pretrained(tmp_path / "router")
    assert (tmp_path / "router" / "router.safetensors").is_file()


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
@pytest.mark.parametrize("kind", ["gates", "fisher"])
def test_other_prices_train_in_other_precisions(kind: Any, precision: str, tmp_path: Path) -> None:
    """Prices by correlation and to first order draw numbers of their own and differentiate through the gates."""
    goal = adaskip.Objective(keep=0.5, price=kind, bound_weight=0.1)
    tuner = adaskip.RouterTuner(planted(1.0), goal, calibration=DATA[8:10], learning_rate=0.05)
    trainer(tmp_path, precision=precision).fit(tuner, loader(DATA[:4]), loader(DATA[4:6]))
    assert weights(tuner).isfinite().all()


@pytest.mark.parametrize(
    ("config", "family"),
    [
        (adaskip.RouterConfig(scope="token"), "llama"),
        (adaskip.RouterConfig(unit="mlp"), "llama"),
        (adaskip.RouterConfig(group="vision"), "llava"),
        (adaskip.RouterConfig(group="vision", kv="kept"), "llava"),
    ],
    ids=["token", "mlp", "vision", "kept"],
)
@pytest.mark.parametrize("precision", ["bf16-true", "64-true", "bf16-mixed"])
def test_every_way_of_routing_trains(precision: str, config: adaskip.RouterConfig, family: str, tmp_path: Path) -> None:
    """Each way mixes states and gates of different types at a place of its own."""
    toy = toys.make(family)
    rows = [with_answers(toy.batch([3, 5, 4, 6], seed=seed)) for seed in range(4)]
    tuner = adaskip.RouterTuner(adaskip.attach(toy.model, config), adaskip.Objective(keep=0.9, bound_weight=0.0))
    trainer(tmp_path, precision=precision).fit(tuner, loader(rows[:2]), loader(rows[2:]))
    assert weights(tuner).isfinite().all()


def test_exploration_draws_the_same_numbers_in_every_precision() -> None:
    """In bfloat16 a uniform draw clamped below 1 is 1, its logit infinite, and the layer kept whatever it costs."""
    logits, drawn = torch.full((20_000,), -30.0), []
    for default in (torch.float32, torch.bfloat16, torch.float64):
        torch.set_default_dtype(default)
        try:
            drawn.append(straight_through(logits, generator=torch.Generator().manual_seed(0)))
        finally:
            torch.set_default_dtype(torch.float32)
    assert not drawn[0].any()
    assert all(torch.equal(drawn[0], other) for other in drawn)


def test_a_model_turned_double_routes_and_learns() -> None:
    """`model.double()` after attach: the heads stay in float32 and still meet states in float64."""
    model = adaskip.attach(toys.make("llama").model).double()
    batch = DATA[0]
    out = model.train()(**batch.arguments()).logits
    assert out.dtype == torch.float64
    out.sum().backward()
    assert all(weight.dtype == torch.float32 for weight in model.routers.parameters())
    assert model.routers[0].outer.bias.grad.isfinite()
