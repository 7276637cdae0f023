"""Training from Python as the README shows it: where prices come from, and what the conditions are judged on."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

import adaskip
from adaskip.errors import ConfigError, DataError
from adaskip.survey.calibration import price_layers
from adaskip.training.objective import Price
from adaskip.training.pricing import same
from tests import toys
from tests.tuning import DATA, batches, loader, planted, trainer, weights, with_answers


def passes(model: adaskip.RoutedModel) -> list[str]:
    """Filled with a word whenever the backbone runs."""
    ran: list[str] = []
    model.backbone.register_forward_pre_hook(lambda *_: ran.append(model.runtime.mode))
    return ran


@pytest.mark.parametrize("kind", ["calibrated", "gates", "fisher", "functional"])
@pytest.mark.parametrize("watched", [True, False])
def test_the_tuner_prices_what_its_objective_asks_for(kind: Price, watched: bool, tmp_path: Path) -> None:
    """A user writes `Objective(price=..., alpha=...)` without a recipe; a callback that prices instead ignores both."""
    goal = adaskip.Objective(keep=0.5, price=kind, alpha=0.2, bound_weight=1.0)
    tuner = adaskip.RouterTuner(planted(1.0), goal, calibration=loader(DATA[8:]), seed=3)
    callbacks = [adaskip.ConditionCheck(every=1)] if watched else []
    run = trainer(tmp_path, callbacks=callbacks)
    run.fit(tuner, loader(DATA[:4]), loader(DATA[4:8]))
    expected = price_layers(planted(1.0), DATA[8:], None, 0.2, kind, seed=3)
    assert tuner.prices is not None
    assert tuner.prices.alpha == 0.2
    assert tuner.prices.kind == kind
    assert same(tuner.prices, expected)
    assert float(run.callback_metrics["train/bound"]) > 0


def test_watching_changes_nothing(tmp_path: Path) -> None:
    """Two runs, with the callback and without, over shuffled data: it may neither price the loss nor draw numbers."""
    found = []
    for callbacks in ([], [adaskip.ConditionCheck(every=1, examples=16)]):
        torch.manual_seed(0)
        tuner = adaskip.RouterTuner(
            planted(1.0), adaskip.Objective(keep=0.5), calibration=DATA[8:], learning_rate=0.05, steps=4
        )
        shuffled = DataLoader(DATA[:4], batch_size=None, shuffle=True)  # type: ignore[arg-type]
        watched = DataLoader(DATA[4:8], batch_size=None, shuffle=True)  # type: ignore[arg-type]
        trainer(tmp_path, steps=4, callbacks=callbacks, limit_val_batches=4, num_sanity_val_steps=0).fit(
            tuner, shuffled, watched
        )
        found.append(weights(tuner))
        assert not tuner.model.training  # its mode is the user's own
    assert torch.equal(*found)


def test_a_bound_without_prices_is_refused(tmp_path: Path) -> None:
    """`RouterTuner(model, Objective())` with nothing that prices a skip; the bound was left out without a word."""
    for callbacks in ([], [adaskip.ConditionCheck(every=1)]):
        tuner = adaskip.RouterTuner(planted(1.0), adaskip.Objective(keep=0.5))
        ran = passes(tuner.model)
        with pytest.raises(ConfigError, match=r"bound_weight=0.01 .* pass RouterTuner\(..., calibration=batches\)"):
            trainer(tmp_path, callbacks=callbacks).fit(tuner, loader(DATA[:4]), loader(DATA[4:8]))
        assert not ran


def test_prices_of_another_kind_are_refused(tmp_path: Path) -> None:
    """Ready-made prices that lack what `Objective(price=...)` needs: an AssertionError at a step, or silence."""
    prices = price_layers(planted(1.0), DATA[8:], None, 0.1)
    for kind in ("gates", "fisher", "functional"):
        tuner = adaskip.RouterTuner(planted(1.0), adaskip.Objective(price=kind), prices)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=rf"expected constants of Objective\(price='{kind}'\), got others"):
            trainer(tmp_path).fit(tuner, loader(DATA[:4]))
    with pytest.raises(ConfigError, match="expected prices or calibration, got both"):
        adaskip.RouterTuner(planted(1.0), adaskip.Objective(), prices, calibration=DATA[8:])
    with pytest.raises(ConfigError, match=r"prices: expected Prices; batches go into calibration="):
        adaskip.RouterTuner(planted(1.0), adaskip.Objective(), DATA[8:])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda base: base, "expected a RoutedModel, got LlamaForCausalLM; call adaskip.attach first"),
        (lambda base: adaskip.attach(base, adaskip.SkipPlan.static([1])), "has no parameters to train; attach with"),
    ],
)
def test_what_cannot_be_trained_is_refused(make: Any, text: str) -> None:
    """A bare Hugging Face model, or one that follows a plan, given to RouterTuner; an AssertionError before."""
    with pytest.raises(ConfigError, match=text):
        adaskip.RouterTuner(make(toys.make("llama").model), adaskip.Objective())


def test_values_of_a_wrong_type_are_listed() -> None:
    """Numbers read from a file as text, a float for a count, a dictionary for the objective: TypeErrors before."""
    with pytest.raises(ConfigError, match=r"keep: expected a share .* got '0.5'; alpha: expected a share .* got None"):
        adaskip.Objective(keep="0.5", alpha=None)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"objective: expected an Objective.*; learning_rate: .* '1e-3'; steps: .*1e"):
        adaskip.RouterTuner(planted(1.0), {"keep": 0.5}, learning_rate="1e-3", steps="1e3")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"every: expected an integer >= 0, got 0.5; level: expected a share"):
        adaskip.ConditionCheck(every=0.5, level=95)  # type: ignore[arg-type]


def test_inputs_that_priced_never_judge(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Half of the validation data is also the calibration data: that half must not count in any verdict."""
    tuner = adaskip.RouterTuner(planted(1.0), adaskip.Objective(keep=0.5), calibration=DATA[6:10])
    check = adaskip.ConditionCheck(every=1)
    with caplog.at_level(logging.WARNING, "adaskip"):
        trainer(tmp_path, callbacks=[check]).fit(tuner, loader(DATA[:4]), loader(DATA[4:8]))
    assert check.look is not None
    assert (check.look.joint.n, check.look.findings.rows[0].n) == (16, 16)
    assert "16 of 32 inputs are left out of every look: prices were calibrated on the same" in caplog.text
    tuner = adaskip.RouterTuner(planted(1.0), adaskip.Objective(keep=0.5), calibration=DATA[4:8])
    ran = passes(tuner.model)
    with pytest.raises(DataError, match=r"got 32, 32 of which the prices were calibrated on as well; pass inputs that"):
        trainer(tmp_path, callbacks=[adaskip.ConditionCheck()]).fit(tuner, loader(DATA[:4]), loader(DATA[4:8]))
    assert not ran


def test_an_input_is_known_again_under_other_padding() -> None:
    """The same prompt padded to another length, beside other rows, is the same input; another answer makes another."""
    from adaskip.batch import fingerprints

    batch = DATA[0]
    wider = adaskip.Batch(
        {k: torch.nn.functional.pad(v, (3, 0)) for k, v in batch.inputs.items()},
        torch.nn.functional.pad(batch.labels, (3, 0), value=-100),
        torch.nn.functional.pad(batch.prompt_mask, (3, 0)),
    )
    assert fingerprints([batch]) == fingerprints([wider])
    assert len(set(fingerprints(DATA))) == 8 * len(DATA)
    other = replace(batch, labels=torch.where(batch.labels == -100, -100, 11))
    assert not set(fingerprints([batch])) & set(fingerprints([other]))


def test_without_prices_every_second_input_judges(tmp_path: Path) -> None:
    """`Objective(bound_weight=0)` with the callback: it prices for itself, on inputs that it does not judge."""
    tuner = adaskip.RouterTuner(planted(0.0), adaskip.Objective(keep=0.5, bound_weight=0.0))
    check = adaskip.ConditionCheck(every=1, tolerance=0.01)
    run = trainer(tmp_path, callbacks=[check])
    run.fit(tuner, loader(DATA[:4]), loader(DATA[4:8]))
    assert tuner.prices is None
    assert float(run.callback_metrics["train/bound"]) == 0
    assert check.look is not None
    assert (check.look.joint.n, check.look.findings.rows[0].n) == (16, 16)
    assert check.look.findings.layers == dict.fromkeys((0, 1, 3), "inadmissible") | {2: "undecided"}  # few inputs
    tuner = adaskip.RouterTuner(planted(0.0), adaskip.Objective(keep=0.5, bound_weight=0.0))
    ran = passes(tuner.model)
    with pytest.raises(DataError, match=r"expected at least 17 inputs to look at, got 8 \(every second one calibrates"):
        trainer(tmp_path, callbacks=[adaskip.ConditionCheck()]).fit(tuner, loader(DATA[:4]), loader(DATA[4:5]))
    assert not ran


def test_too_few_inputs_are_counted_before_any_work(tmp_path: Path) -> None:
    """Eight calibration inputs at alpha .1, or one validation input: said at once, not after measuring every layer."""
    for calibration, validation, text in (
        (
            DATA[8:9],
            DATA[4:8],
            r"calibration: expected at least 14 inputs for alpha=0.1 and price functional, got 8; pass a loader with",
        ),
        (DATA[8:], batches(1, rows=1), r"expected at least 4 inputs to look at, got 1; pass more validation data"),
    ):
        tuner = adaskip.RouterTuner(planted(1.0), adaskip.Objective(keep=0.5), calibration=calibration)
        ran = passes(tuner.model)
        with pytest.raises(DataError, match=text):
            trainer(tmp_path, callbacks=[adaskip.ConditionCheck()]).fit(tuner, loader(DATA[:4]), loader(validation))
        assert not ran


def test_no_validation_data_is_said_before_any_work(tmp_path: Path) -> None:
    """`fit(tuner, train)` with ConditionCheck and nothing to look at."""
    tuner = adaskip.RouterTuner(planted(1.0), adaskip.Objective(keep=0.5), calibration=DATA[8:])
    ran = passes(tuner.model)
    with pytest.raises(DataError, match="the trainer has no validation data; pass val_dataloaders to fit, or batches="):
        trainer(tmp_path, callbacks=[adaskip.ConditionCheck()]).fit(tuner, loader(DATA[:4]))
    assert not ran


@pytest.mark.parametrize("price", ["calibrated", "functional"])
def test_a_resumed_run_has_the_prices_of_its_checkpoint(
    price: Price, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Resuming without the calibration data, or with other data by mistake: the loss must be the same loss."""
    goal = adaskip.Objective(keep=0.5, bound_weight=1.0, price=price)
    first = adaskip.RouterTuner(planted(1.0), goal, calibration=DATA[8:], steps=8, learning_rate=0.05)
    saver = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, save_on_train_epoch_end=True)
    epochs: dict[str, Any] = {"steps": -1, "max_epochs": 2}
    trainer(tmp_path, **epochs, callbacks=[saver], saves=True).fit(first, loader(DATA[:4]))
    torch.load(tmp_path / "step=4.ckpt", weights_only=True)  # nothing in it needs to be trusted
    others: list[dict[str, Any]] = [
        {},
        {"calibration": DATA[4:8]},
        {"prices": price_layers(planted(1.0), DATA[:4], None, 0.1, price)},
    ]
    for other in others:
        tuner = adaskip.RouterTuner(planted(1.0), goal, **other, steps=8, learning_rate=0.05)
        with caplog.at_level(logging.WARNING, "adaskip"):
            trainer(tmp_path, **epochs).fit(tuner, loader(DATA[:4]), ckpt_path=str(tmp_path / "step=4.ckpt"))
        assert torch.equal(weights(tuner), weights(first))
        assert tuner.calibrated_on == first.calibrated_on
        assert ("checkpoint's prices replace" in caplog.text) == ("prices" in other)


def test_vision_that_is_absent_prices_attention_apart(tmp_path: Path) -> None:
    """Group `vision` weighs the attention on it: the mean mass comes from inputs that no constant is fitted on."""
    toy = toys.make("llava")
    rows = [with_answers(toy.batch([3, 5, 4, 6], seed=seed)) for seed in range(8)]
    model = adaskip.attach(toy.model, adaskip.RouterConfig(group="vision"))
    goal = adaskip.Objective(keep=0.9, price="calibrated")
    tuner = adaskip.RouterTuner(model, goal, calibration=rows[:3])
    check = adaskip.ConditionCheck(every=1)
    trainer(tmp_path, callbacks=[check]).fit(tuner, loader(rows[3:5]), loader(rows[5:]))
    assert tuner.prices is not None
    assert (tuner.prices.mass > 0).all()
    assert check.look is not None
    assert {row.notion for row in check.look.findings.rows} >= {"cross-modal", "functional"}
    few = adaskip.RouterTuner(model, goal, calibration=rows[:2])
    with pytest.raises(DataError, match=r"expected at least 12 inputs for alpha=0\.1, a fourth of which gives"):
        trainer(tmp_path).fit(few, loader(rows[3:5]))


def test_what_is_no_batch_is_refused(tmp_path: Path) -> None:
    """A loader without the collator hands over Hugging Face's own dictionary; a KeyError before."""
    tuner = adaskip.RouterTuner(planted(1.0), adaskip.Objective(keep=0.5, bound_weight=0.0))
    bare = [{**row.inputs, "labels": row.labels} for row in DATA[:4]]
    with pytest.raises(DataError, match=r"training: expected batches as adaskip.Collator.*return adaskip.Batch\("):
        trainer(tmp_path).fit(tuner, loader(bare))
    silent = [replace(row, labels=row.labels.index_fill(0, torch.tensor([1]), -100)) for row in DATA[:4]]
    with pytest.raises(DataError, match=r"rows \[1\] of a batch have no answer to learn from"):
        trainer(tmp_path).fit(tuner, loader(silent))
