"""A batch without any picture under group `vision`."""

from __future__ import annotations

from typing import Any

import lightning
import pytest
import torch

from adaskip import Objective, RouterConfig, RouterTuner, SkipPlan, attach
from adaskip.batch import Batch
from adaskip.survey.skips import measure_skips
from adaskip.theory.prices import Prices
from tests.families import make
from tests.routing import decide

CASES: dict[str, Any] = {
    "routers": RouterConfig(group="vision"),
    "kept": RouterConfig(group="vision", kv="kept"),
    "attention": RouterConfig(group="vision", unit="attention"),
    "mlp": RouterConfig(group="vision", unit="mlp"),
    "tokens": RouterConfig(group="vision", scope="token"),
    "plan": SkipPlan.static([1, 2], group="vision"),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_nothing_is_skipped(name: str, case: str) -> None:
    """Questions without a picture among others with one: would catch a refusal, or text that leaves layers."""
    toy = make(name)
    text = torch.randint(16, 80, (2, 6), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": text, "attention_mask": torch.ones_like(text)}
    batch["attention_mask"][0, :2] = 0
    options = {"max_new_tokens": 4, "do_sample": False}
    with torch.no_grad():
        dense = toy.model(**batch).logits
        answers = toy.model.generate(**batch, **options)
        model = attach(toy.model, CASES[case])
        model = model if model.routers is None else decide(model)
        assert torch.equal(model(**batch).logits, dense)
        assert (model.routing.keep_rate == 1).all()
        assert torch.equal(model.generate(**batch, **options), answers)
        with model.soft():
            assert (model(**batch).logits - dense)[batch["attention_mask"].bool()].abs().max() < 1e-4


@pytest.mark.parametrize("scope", ["prompt", "token"])
def test_a_training_step(scope: Any) -> None:
    """The sampler draws a batch of questions without pictures: would catch a run that stops there."""
    toy = make("llava")
    model = attach(toy.model, RouterConfig(group="vision", scope=scope))
    prices = Prices(*[torch.ones(len(model.routers), dtype=torch.float64)] * 3, alpha=0.1)  # type: ignore[arg-type]
    tuner = RouterTuner(model, Objective(keep=0.5, price="calibrated"), prices, steps=2)
    text = torch.randint(16, 80, (2, 6), generator=torch.Generator().manual_seed(0))
    labels = text.clone()
    labels[:, :4] = -100
    inputs = {"input_ids": text, "attention_mask": torch.ones_like(text)}
    batch = Batch(inputs, labels, labels == -100, ["text", "text"])
    trainer = lightning.Trainer(
        max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(tuner, torch.utils.data.DataLoader([batch, batch], batch_size=None))  # type: ignore[arg-type]
    assert trainer.global_step == 2
    assert torch.isfinite(trainer.callback_metrics["train/loss"])
    assert (model.routing.keep_rate == 1).all()


def test_layers_are_measured_beside_text() -> None:
    """Prices come from rows with and without pictures: would catch NaN that reaches every price and the loss."""
    toy = make("llava")
    model = attach(toy.model, RouterConfig(group="vision"))
    text = torch.randint(16, 80, (2, 6), generator=torch.Generator().manual_seed(0))
    labels = text.clone()
    labels[:, :4] = -100
    inputs = {"input_ids": text, "attention_mask": torch.ones_like(text)}
    found = measure_skips(model, [Batch(inputs, labels, labels == -100)], attention=True)
    assert all(bool((values == 0).all()) for values in (found.rho, found.cosine, found.kl, found.s, found.mass))
