"""Prices of a skip: first order against the exact Jacobian, correlations, and B under each of them in training."""

from __future__ import annotations

from pathlib import Path

import lightning
import pytest
import torch
from torch.utils.data import DataLoader

import adaskip
from adaskip.errors import ConfigError
from adaskip.survey.calibration import mean_correlation, price_layers
from adaskip.survey.firstorder import first_order, first_order_of
from adaskip.survey.skips import measure_skips
from adaskip.theory.bounds import redundancy_bound
from adaskip.training.objective import Price
from tests import toys
from tests.tuning import batches, planted

LAYERS = 4


def test_slopes_of_open_gates_are_the_first_order_spread() -> None:
    """Against the whole Jacobian d logits / d gate; and against skipping a small step of a layer for real."""
    model = adaskip.attach(toys.make("llama").model)
    batch = batches(1, rows=3)[0]
    arguments = batch.arguments()
    with torch.enable_grad(), model.keep_all(), model.soft():
        logits = model(**arguments).logits[:, -2].double()
        gates = model.gates()
        rows = [torch.autograd.grad(logits[:, v].sum(), gates, retain_graph=True) for v in range(logits.shape[-1])]
    slope = torch.stack([torch.stack(row, 1) for row in rows], -1).double()  # b l v
    p = logits.detach().softmax(-1).unsqueeze(1)
    exact = ((p * slope**2).sum(-1) - (p * slope).sum(-1) ** 2).sqrt()
    dense, found = first_order(model, batch, 600, torch.Generator().manual_seed(0))
    assert torch.allclose(found, exact, rtol=0.15)
    with torch.no_grad(), model.dense():
        assert torch.equal(dense, model(**arguments).logits)
    assert torch.equal(first_order_of(model, [batch], 2, seed=3), first_order_of(model, [batch], 2, seed=3))


def test_a_layer_that_writes_nothing_has_no_slope_and_no_correlation() -> None:
    model, data = planted(0.0), batches(2)
    assert not first_order_of(model, data, 2)[:, 2].any()
    found = mean_correlation(model, data)
    assert torch.equal(found, found.T)
    assert torch.equal(found.diagonal(), torch.ones(LAYERS, dtype=torch.float64))
    assert found[2, [0, 1, 3]].abs().max() < 1e-6
    assert torch.linalg.eigvalsh(found).min() > -1e-9


def test_duplicated_changes_correlate_fully() -> None:
    """The correlation is 1 where two skips change the logits alike and -1 where they undo one another."""
    toy = toys.make("llama", seed=5)
    layers = toy.model.model.layers
    with torch.no_grad():
        for layer in layers[1:]:
            layer.self_attn.o_proj.weight.mul_(1e-3)
            layer.mlp.down_proj.weight.mul_(1e-3)
        layers[2].load_state_dict(layers[1].state_dict())
        layers[3].load_state_dict(layers[1].state_dict())
        layers[3].self_attn.o_proj.weight.neg_()
        layers[3].mlp.down_proj.weight.neg_()
    found = mean_correlation(adaskip.attach(toy.model), batches(2))
    assert found[1, 2] > 0.99
    assert found[1, 3] < -0.99


def test_correlation_moves_the_bound_between_in_full_and_as_squares() -> None:
    gates, s = torch.tensor([[0.0, 0.0, 1.0], [0.5, 0.2, 0.9]]), torch.tensor([[3.0, 4.0, 9.0]]).expand(2, 3)
    ones, alone = torch.ones(3, 3), torch.eye(3)
    assert torch.allclose(redundancy_bound(gates, s, None, ones), redundancy_bound(gates, s))
    assert redundancy_bound(gates, s, None, alone)[0] == pytest.approx(12.5)  # (9 + 16) / 2, against 49 / 2
    undone = torch.tensor([[1.0, -1.0, 0.0], [-1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    assert redundancy_bound(gates, s, None, undone)[0] == pytest.approx(0.5)  # (4 - 3)^2 / 2
    u = 2 * s
    assert (redundancy_bound(gates, s, u, alone) < redundancy_bound(gates, s, u)).all()
    drawn = torch.tensor([[a, b, c] for a in (0.0, 1.0) for b in (0.0, 1.0) for c in (0.0, 1.0)])
    weight = torch.where(drawn == 1, gates[1], 1 - gates[1]).prod(1)
    mean = (weight * redundancy_bound(drawn, s[:1].expand(8, 3), None, undone)).sum()
    assert redundancy_bound(gates, s, None, undone)[1] == pytest.approx(float(mean), rel=1e-5)


@pytest.mark.parametrize("kind", ["calibrated", "gates", "fisher", "functional"])
def test_each_price_calibrates_and_trains(kind: Price, tmp_path: Path) -> None:
    model = adaskip.attach(toys.make("llama").model)
    prices = price_layers(model, batches(4), torch.zeros(LAYERS), 0.1, kind)
    assert prices.kind == kind
    assert (prices.correlation is not None) is (kind in ("gates", "functional"))
    assert (prices.slope is not None) is (kind == "fisher")
    if kind == "fisher":  # calibrated: about 1 - alpha of the calibration inputs lie below, per layer
        s, _ = prices.first_order_costs(first_order_of(model, batches(4), seed=0))
        assert (((measure_skips(model, batches(4)).s <= s + 1e-6).double().mean(0)) >= 0.9).all()
    goal = adaskip.Objective(keep=0.5, warmup=0.0, price=kind, bound_weight=1.0)
    tuner = adaskip.RouterTuner(model, goal, prices, steps=6, learning_rate=0.05)
    trainer = lightning.Trainer(
        max_steps=6,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(tuner, DataLoader(batches(6), batch_size=None))
    assert float(trainer.callback_metrics["train/bound"]) > 0
    assert all(weight.grad is None for weight in model.backbone.parameters())


def test_wrong_prices_and_passes_are_said() -> None:
    with pytest.raises(ConfigError, match=r"price: expected calibrated \| gates \| fisher \| functional, got 'cheap'"):
        adaskip.Objective(price="cheap")  # type: ignore[arg-type]
    model = adaskip.attach(toys.make("llama").model)
    with pytest.raises(ConfigError, match="no soft pass with gradients on is at hand; call the model inside soft"):
        model.gates()
