"""`ConditionCheck` acts: it warns of, holds, or stops at layers whose skips clearly cost more than they may."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from torch.utils.data import DataLoader

import adaskip
from adaskip.errors import ConfigError
from adaskip.recipe import load
from adaskip.survey.dense_costs import price_inputs
from adaskip.survey.skips import measure_skips
from adaskip.theory.bounds import kl_for_accuracy
from adaskip.theory.prices import calibrate_prices
from adaskip.training.callbacks import DenseLogits, OnViolation, joint_cost
from tests.tuning import GREEDY, batches, eager, planted


def fit(
    model: adaskip.RoutedModel,
    tmp_path: Path,
    on_violation: OnViolation,
    steps: int = 4,
    resume: str | None = None,
    held: tuple[int, ...] = (),
) -> tuple[adaskip.ConditionCheck, lightning.Trainer]:
    goal = adaskip.Objective(keep=0.5)
    tuner = adaskip.RouterTuner(model, goal, calibration=batches(14)[12:], steps=8, learning_rate=1e-6)
    check = adaskip.ConditionCheck(every=2, examples=32, tolerance=0.01, on_violation=on_violation)
    check.load_state_dict({"held": held, "looks": 1})
    trainer = lightning.Trainer(
        max_steps=steps,
        accelerator="cpu",
        callbacks=[check],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    whole: dict[str, Any] = {"batch_size": None}
    trainer.fit(tuner, DataLoader(batches(8), **whole), DataLoader(batches(12)[8:], **whole), ckpt_path=resume)
    return check, trainer


def test_hold_makes_a_costly_layer_run_and_leaves_a_redundant_one_alone(tmp_path: Path) -> None:
    model = eager({1: GREEDY, 2: GREEDY})
    model.hold([3])  # what the configuration holds is not the callback's to free
    check, trainer = fit(model, tmp_path, "hold", held=(2,))  # a redundant layer that it held passes, and is free again
    assert model.policy.held == (1, 3)
    assert check.state_dict()["held"] == [1]
    assert check.look is not None
    assert {layer: found.verdict for layer, found in check.look.skips.items()} == {1: "inadmissible", 2: "admissible"}
    assert (check.look.skips[1].n, check.looks) == (32, 3)
    batch = batches(1)[0]
    arguments = batch.arguments()
    routed = model.eval()(**arguments).logits
    assert model.routing.keep[:, 0].tolist() == [True, True, False, True]
    with model.soft():
        assert torch.allclose(model(**arguments).logits, routed, atol=1e-5)
    model.train()(**arguments).logits.sum().backward()
    assert model.routers[1].outer.bias.grad.abs() > 0  # the held router goes on learning
    model.save_pretrained(tmp_path / "router")
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = adaskip.RoutedModel.from_pretrained(tmp_path / "router", model.detach())
    assert again.policy.held == (1, 3)
    assert torch.equal(again(**arguments).logits, routed)

    for steps in (5, 4):  # with 4 the run is done, and its training does not start
        resumed = eager({1: GREEDY, 2: GREEDY})
        fit(resumed, tmp_path, "hold", steps=steps, resume=str(tmp_path / "last.ckpt"))
        assert resumed.policy.held == (1,)


def test_stop_ends_training_and_says_why(tmp_path: Path) -> None:
    check, trainer = fit(eager({1: GREEDY}), tmp_path, "stop", steps=8)
    assert trainer.global_step == 2
    assert check.stopped is not None
    assert check.stopped.startswith("conditions violated at step 2: layer 1 is skipped for 32 of 32 inputs at ")
    assert "nats" in check.stopped
    assert check.stopped.endswith("or train with conditions.on_violation=hold")


def test_a_held_layer_skips_nothing_and_violates_nothing(tmp_path: Path) -> None:
    model = eager({1: GREEDY})
    model.hold([1])
    check, trainer = fit(model, tmp_path, "stop")
    assert check.look is not None
    assert check.look.skips[1].verdict == "inadmissible"  # what its router asks for would be
    assert check.look.violations == {}
    assert (check.stopped, trainer.global_step) == (None, 4)


@pytest.mark.parametrize(("kept", "passes"), [(4, 4), (0, 12), (2, 8)])
def test_the_dense_logits_are_computed_once_as_long_as_they_fit(kept: int, passes: int) -> None:
    """Three looks at four batches find the same, whether all, none or half of them are kept."""
    model, rows = eager({1: GREEDY}), batches(4)
    measured = measure_skips(model, rows)
    prices = calibrate_prices(measured, measured.mass.mean(0), alpha=0.1)
    costs = price_inputs(model, rows, prices)
    fresh, ran = joint_cost(model, rows, costs), []
    dense = DenseLogits(kept * DenseLogits()(model, 0, rows[0]).nbytes)
    hook = model.spec.layers[1].register_forward_hook(lambda *_: ran.append(model.runtime.mode))
    for _ in range(3):
        found = joint_cost(model, rows, costs, dense)
        assert all(torch.equal(found[name], fresh[name]) for name in fresh)
    hook.remove()
    assert ran.count("dense") == passes


def test_warn_says_it_once_and_changes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = eager({1: GREEDY})
    with caplog.at_level(logging.WARNING, "adaskip"):
        check, _ = fit(model, tmp_path, "warn", steps=6)
    told = [record.getMessage() for record in caplog.records if "layer 1 is" in record.getMessage()]
    assert len(told) == 1
    assert told[0].startswith("step 2: layer 1 is skipped for 32 of 32 inputs at ")
    assert told[0].endswith("a token, 0.01 tolerated")
    assert model.policy.held == ()
    assert check.stopped is None


def test_harmless_skips_violate_nothing(tmp_path: Path) -> None:
    check, trainer = fit(eager({2: GREEDY}), tmp_path, "stop")
    assert check.stopped is None
    assert trainer.global_step == 4
    assert check.look is not None
    assert check.look.to_dict()["skips"][0]["verdict"] == "admissible"


def test_the_knobs_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"expected warn \| hold \| stop, got 'halt'"):
        adaskip.ConditionCheck(on_violation="halt")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="held: expected layers 0 to 3, got 7"):
        planted(1.0).hold([1, 7])
    recipe = load("digits-vlm", ["conditions.points=10", "conditions.on_violation=hold", "router.held=[3, 1]"])
    assert recipe.conditions.nats == float(kl_for_accuracy(10.0))
    assert recipe.router.held == (1, 3)
    assert load("digits-vlm").conditions.nats == 0.05
