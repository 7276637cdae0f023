"""`Trainer(accumulate_grad_batches=n)`: one optimiser step is one step for everything that counts steps."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import adaskip
from adaskip.errors import DataError
from tests.tuning import DATA, loader, planted, trainer, weights


class Recorder(adaskip.RouterTuner):
    """Remembers the seeds of the gates' draws, and each micro-batch's distance from the target."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seeds: list[int] = []
        self.gaps: list[float] = []

    def _noise(self, stream: int = 0) -> torch.Generator:
        noise = super()._noise(stream)
        if stream == 0:
            self.seeds.append(noise.initial_seed())
        return noise

    def _soft_keep(self) -> Any:
        routing, share = super()._soft_keep()
        self.gaps.append(float(share.detach()) - self.target())
        return routing, share


def recorder(**options: Any) -> Recorder:
    goal = adaskip.Objective(keep=0.5, warmup=0.0, bound_weight=0.0)
    return Recorder(planted(1.0), goal, learning_rate=0.05, seed=2, **options)


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_draws_are_fresh_and_the_multiplier_steps_once(micro: int, tmp_path: Path) -> None:
    """16 micro-batches from 4 seeds explore a fourth as much; a multiplier raised four times a step overshoots."""
    tuner = recorder()
    trainer(tmp_path, steps=4, accumulate_grad_batches=micro).fit(tuner, loader(DATA * 2))
    assert len(tuner.seeds) == len(set(tuner.seeds)) == 4 * micro
    expected = 0.0
    for step in range(4):
        gaps = tuner.gaps[step * micro : (step + 1) * micro]
        expected = max(0.0, expected + 0.05 * sum(gaps) / micro)
    assert float(tuner.multiplier) == pytest.approx(expected, rel=1e-5)
    assert tuner.target() == 0.5
    assert tuner.seeds[::micro] == [(2 * 1_000_003 + step) * 4096 for step in range(4)]  # as without accumulation


def test_a_last_group_that_is_smaller_counts_its_own_mean(tmp_path: Path) -> None:
    """Six batches in groups of four: Lightning steps at the epoch's end, after two."""
    tuner = recorder()
    trainer(tmp_path, steps=4, accumulate_grad_batches=4).fit(tuner, loader(DATA[:6]))
    expected, cuts = 0.0, (0, 4, 6, 10, 12)
    for start, end in pairwise(cuts):
        expected = max(0.0, expected + 0.05 * sum(tuner.gaps[start:end]) / (end - start))
    assert float(tuner.multiplier) == pytest.approx(expected, rel=1e-5)
    assert len(set(tuner.seeds)) == 12


def test_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    """A run that goes on from its checkpoint of the first epoch, two steps of four micro-batches, repeats the rest."""
    whole, rest = recorder(steps=4), recorder(steps=4)
    saver = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, save_on_train_epoch_end=True)
    run = trainer(tmp_path, steps=-1, max_epochs=2, accumulate_grad_batches=4, callbacks=[saver], saves=True)
    run.fit(whole, loader(DATA[:8]))
    run = trainer(tmp_path, steps=-1, max_epochs=2, accumulate_grad_batches=4)
    run.fit(rest, loader(DATA[:8]), ckpt_path=str(tmp_path / "step=2.ckpt"))
    assert rest.seeds == whole.seeds[8:]
    assert torch.equal(weights(rest), weights(whole))
    assert torch.equal(rest.multiplier, whole.multiplier)


def test_the_conditions_are_looked_at_once_a_step(tmp_path: Path) -> None:
    """Every micro-batch between two steps saw the same step number, and each of them took a look."""
    looked: list[int] = []

    class Counting(adaskip.ConditionCheck):
        def inspect(self, model: Any, prices: Any, step: int, settled: bool = True) -> Any:
            looked.append(step)
            return super().inspect(model, prices, step, settled)

    run = trainer(tmp_path, steps=4, accumulate_grad_batches=2, callbacks=[Counting(every=2)])
    run.fit(recorder(), loader(DATA[:4]), loader(DATA[4:8]))
    assert looked == [2, 4]


def test_gaps_of_an_interrupted_step_are_forgotten(tmp_path: Path) -> None:
    """An error between two steps, then another fit: what was counted before it is no part of the next step."""
    tuner = recorder()
    tuner.target = lambda: 0.1  # type: ignore[method-assign]
    with pytest.raises(DataError):
        trainer(tmp_path, steps=1, accumulate_grad_batches=2).fit(tuner, loader([DATA[2], {}]))
    tuner.gaps.clear()
    trainer(tmp_path, steps=1, accumulate_grad_batches=2).fit(tuner, loader(DATA[:2]))
    assert float(tuner.multiplier) == pytest.approx(0.05 * sum(tuner.gaps) / 2, rel=1e-5)
    assert tuner.multiplier > 0.01
