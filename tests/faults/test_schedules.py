"""How long a fit is, how often there is one, and what else a `lightning.Trainer` may do with the tuner."""

from __future__ import annotations

import logging
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.loggers.logger import DummyLogger
from torch.utils.data import IterableDataset

import adaskip
from adaskip.errors import ConfigError
from adaskip.training.keep_rates import KeepByKind
from adaskip.training.schedule import OneCycle
from tests.tuning import DATA, loader, planted, trainer, weights


def tuner(keep: float = 0.5, **options: Any) -> adaskip.RouterTuner:
    goal = adaskip.Objective(keep=keep, bound_weight=0.0)
    return adaskip.RouterTuner(planted(1.0), goal, learning_rate=0.05, **options)


def rate(run: Any) -> float:
    return run.optimizers[0].param_groups[0]["lr"]


class Stream(IterableDataset[Any]):
    """Batches that come without a length."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def __iter__(self) -> Any:
        return iter(self.rows)


def test_a_trainer_that_goes_on_keeps_the_last_rate(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """`Trainer(max_epochs=3)` over four batches and `steps=5`: a ValueError of OneCycleLR at step 6."""
    one = tuner(steps=5)
    run = trainer(tmp_path, steps=-1, max_epochs=3)
    with caplog.at_level(logging.WARNING, "adaskip"):
        run.fit(one, loader(DATA[:4]))
    assert run.global_step == 12
    assert rate(run) == pytest.approx(0.05 / 25 / 1e4)
    assert "runs 12 optimiser steps and the schedule ends after steps=5" in caplog.text


def test_the_schedule_is_torchs_own_up_to_its_end() -> None:
    """Runs of before must stay as they were to the bit; beyond the end the rate neither rises nor raises."""
    options = {"max_lr": 0.1, "total_steps": 9, "pct_start": 0.1, "anneal_strategy": "cos"}
    mine, theirs = (torch.optim.AdamW([torch.zeros(1, requires_grad=True)]) for _ in range(2))
    held, plain = OneCycle(mine, 0.1, 9), torch.optim.lr_scheduler.OneCycleLR(theirs, **options)  # type: ignore
    rates = []
    for _ in range(8):
        assert mine.param_groups[0]["lr"] == theirs.param_groups[0]["lr"]
        assert mine.param_groups[0]["betas"] == theirs.param_groups[0]["betas"]
        for optimizer, schedule in ((mine, held), (theirs, plain)):
            optimizer.step()
            schedule.step()
    for _ in range(4):
        rates.append(mine.param_groups[0]["lr"])
        mine.step()
        held.step()
    assert len(set(rates)) == 1


@pytest.mark.parametrize(("epochs", "micro", "steps"), [(3, 1, 12), (3, 4, 3), (2, 3, 4)])
def test_without_steps_the_trainer_says_how_long_it_is(epochs: int, micro: int, steps: int, tmp_path: Path) -> None:
    """The rate falls to its end, and the target to its own, over the trainer's optimiser steps."""
    one = tuner()
    run = trainer(tmp_path, steps=-1, max_epochs=epochs, accumulate_grad_batches=micro)
    run.fit(one, loader(DATA[:4]))
    assert run.global_step == steps
    assert run.lr_scheduler_configs[0].scheduler.total_steps == steps
    assert one.target() == 0.5


def test_a_trainer_without_an_end_needs_steps(tmp_path: Path) -> None:
    """`max_steps=-1, max_epochs=-1`, `max_time`, and a stream of unknown length."""
    endless: list[dict[str, Any]] = [{"max_epochs": -1}, {"max_epochs": None, "max_time": timedelta(seconds=3)}]
    for options in endless:
        with pytest.raises(
            ConfigError, match=r"does not say how many optimiser steps .* pass RouterTuner\(..., steps=N"
        ):
            trainer(tmp_path, steps=-1, **options).fit(tuner(), loader(DATA[:2]))
    with pytest.raises(ConfigError, match="epochs without an end or of unknown length"):
        trainer(tmp_path, steps=-1, max_epochs=2).fit(tuner(), loader(Stream(DATA[:2])))  # type: ignore[arg-type]
    run = trainer(tmp_path, steps=-1, max_epochs=2)
    run.fit(tuner(steps=4), loader(Stream(DATA[:2])))  # type: ignore[arg-type]
    assert run.global_step == 4
    run = trainer(tmp_path, steps=-1, max_epochs=-1, max_time=timedelta(seconds=0.2))
    run.fit(tuner(steps=2), loader(DATA[:2]))
    assert run.global_step > 0
    run = trainer(tmp_path, steps=-1, max_epochs=-1, callbacks=[adaskip.ConditionCheck(every=2)])
    with pytest.raises(ConfigError, match="repeated looks need to know their number; give the trainer max_steps"):
        run.fit(tuner(steps=2), loader(DATA[:2]), loader(DATA[4:8]))


def test_a_target_that_is_never_reached_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """`steps=1000` left over from an example, `max_steps=2` in the trainer: nearly everything would still run."""
    with caplog.at_level(logging.WARNING, "adaskip"):
        trainer(tmp_path).fit(tuner(steps=1000), loader(DATA[:2]))
    assert "ends after 2 optimiser steps, before the target keep rate is reached at step 300" in caplog.text


def test_checkpoints_are_chosen_among_those_that_meet_the_target(tmp_path: Path) -> None:
    """`ModelCheckpoint(monitor="val/kl")` picks the start, where all layers run; `val/objective` does not."""
    seen: list[tuple[float, float, float]] = []

    class Recorder(EarlyStopping):
        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            metrics = trainer.callback_metrics
            seen.append(tuple(round(float(metrics[f"val/{name}"]), 6) for name in ("objective", "kl", "keep")))  # type: ignore
            super().on_validation_end(trainer, pl_module)

    saver = ModelCheckpoint(tmp_path, "{step}", monitor="val/objective")
    run = trainer(
        tmp_path,
        steps=-1,
        max_epochs=8,
        callbacks=[Recorder("val/objective", patience=8), saver, LearningRateMonitor()],
        saves=True,
        num_sanity_val_steps=0,
    )
    run.loggers = [DummyLogger()]
    run.fit(tuner(keep=0.6), loader(DATA[:4]), loader(DATA[4:6]))
    best = min(range(len(seen)), key=lambda i: seen[i][0])
    assert saver.best_model_path.endswith(f"step={4 * (best + 1)}.ckpt")
    assert seen[best][2] <= 0.75
    assert min(range(len(seen)), key=lambda i: seen[i][1]) != best  # the KL alone chooses another
    for objective, kl, keep in seen:
        assert objective == pytest.approx(kl + 10 * max(0.0, keep - 0.6), abs=1e-4)


def test_validate_test_and_predict_before_a_fit_and_after(tmp_path: Path) -> None:
    """All entry points of a trainer on one tuner; nothing of a pass without gradients may stay for the fit."""
    one = tuner()
    run = trainer(tmp_path)
    first = run.validate(one, loader(DATA[4:6]), verbose=False)[0]
    assert first["val/keep"] == 1.0
    run.fit(one, loader(DATA[:4]), loader(DATA[4:6]))
    found = trainer(tmp_path).test(one, loader(DATA[4:6]), verbose=False)[0]
    again = trainer(tmp_path).validate(one, loader(DATA[4:6]), verbose=False)[0]
    assert {name.split("/")[1]: value for name, value in found.items()}.items() <= {
        name.split("/")[1]: value for name, value in again.items()
    }.items()
    prompts = [replace(row, labels=torch.full_like(row.labels, -100)) for row in DATA[4:6]]
    routed = trainer(tmp_path).predict(one, loader(prompts))
    assert routed is not None
    assert torch.cat([part["keep_rate"] for part in routed]).mean() == pytest.approx(found["test/keep"])  # type: ignore
    assert routed[0]["keep"].shape == (4, 8)  # type: ignore[index]


def test_a_second_fit_is_a_fit(tmp_path: Path) -> None:
    """The same tuner and callback in two trainers: the second has a schedule and looks of its own."""
    one = adaskip.RouterTuner(planted(1.0), adaskip.Objective(keep=0.5), calibration=DATA[8:], learning_rate=0.05)
    check = adaskip.ConditionCheck(every=2)
    trainer(tmp_path, callbacks=[check]).fit(one, loader(DATA[:4]), loader(DATA[4:8]))
    first, prices, look = weights(one), one.prices, check.look
    trainer(tmp_path, callbacks=[check]).fit(one, loader(DATA[:4]), loader(DATA[5:8]))
    assert one.prices is prices
    assert not torch.equal(weights(one), first)
    assert look is not None
    assert check.look is not None
    assert (look.joint.n, check.look.joint.n) == (32, 24)


def test_several_validation_loaders_are_read_as_one(tmp_path: Path) -> None:
    """`fit(tuner, train, [a, b])`: both are validated, and both looked at."""
    one = adaskip.RouterTuner(planted(1.0), adaskip.Objective(keep=0.5), calibration=DATA[8:])
    check = adaskip.ConditionCheck(every=2)
    trainer(tmp_path, callbacks=[check]).fit(one, loader(DATA[:4]), [loader(DATA[4:6]), loader(DATA[6:8])])
    assert check.look is not None
    assert check.look.joint.n == 32


def test_streams_without_length_are_looked_at(tmp_path: Path) -> None:
    """A validation stream; the calibration stream never ends."""

    class Endless(IterableDataset[Any]):
        def __iter__(self) -> Any:
            while True:
                yield from DATA[8:]

    goal = adaskip.Objective(keep=0.5)
    one = adaskip.RouterTuner(planted(1.0), goal, calibration=loader(Endless()))  # type: ignore[arg-type]
    check = adaskip.ConditionCheck(every=2, examples=16)
    trainer(tmp_path, callbacks=[check]).fit(one, loader(DATA[:4]), loader(Stream(DATA[4:8])))  # type: ignore[arg-type]
    assert check.look is not None
    assert check.look.joint.n == 16


def test_averaged_weights_are_the_routers(tmp_path: Path) -> None:
    """Lightning's own stochastic weight averaging copies the module and swaps schedules; the result must be usable."""
    one = tuner()
    averaging = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)
    trainer(tmp_path, steps=-1, max_epochs=4, callbacks=[averaging]).fit(one, loader(DATA[:2]))
    batch = DATA[4]
    out = one.model.eval()(**batch.arguments()).logits
    assert out.isfinite().all()
    assert weights(one).isfinite().all()


def test_kinds_may_be_numbers_and_unknown() -> None:
    """A `kind` column of numbers beside text, a kind that only training data has, rows without one."""
    metric = KeepByKind(2, [1, "a", 2.5, 1])
    keep = torch.tensor([[1, 0, 1, 1, 0], [0, 1, 1, 0, 0]])
    metric.update(keep, [1, "a", 2.5, "new", None])
    found = metric.compute()
    assert {kind: row.tolist() for kind, row in found.items()} == {
        "1": [1, 0],
        "a": [0, 1],
        "2.5": [1, 1],
        "other": [0.5, 0],
    }


@pytest.mark.parametrize("steps", [1, 2, 9, 10, 11, 20])
def test_a_schedule_of_any_length_works(steps: int) -> None:
    """`trainer.steps=10`: torch's one-cycle schedule divides by the length of a rise of a tenth, less one."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = OneCycle(optimizer, 0.1, steps)
    for _ in range(steps + 2):
        assert 0 < optimizer.param_groups[0]["lr"] <= 0.1
        optimizer.step()
        schedule.step()
