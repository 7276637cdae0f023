"""A callback that reports every finished step: how many are done, and how training goes."""

from __future__ import annotations

from typing import Any

import lightning

from adaskip.stages import Advance
from adaskip.training.callbacks import ConditionCheck

SHOWN = {"loss": "train/loss", "KL": "train/kl", "keep": "router/keep_soft"}
"""What is told of a step, and what it is logged as."""


class StepCount(lightning.Callback):
    """Report after every step how many are done, with a few words of how it goes for whoever shows them.

    Args:
        advance: called with that number.
    """

    def __init__(self, advance: Advance) -> None:
        self.advance = advance

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        """Report the number of steps that are done."""
        self.advance(trainer.global_step, lambda: describe_step(trainer))


def describe_step(trainer: lightning.Trainer) -> str:
    """Return what the last step logged and how many conditions the last look found met, as far as there are any.

    It reads numbers off the device, so it is called when a line is drawn, and not at every step.
    """
    logged = trainer.callback_metrics
    words = [f"{name} {float(logged[key]):.3g}" for name, key in SHOWN.items() if key in logged]
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, ConditionCheck) and callback.look is not None:
            sites = len(callback.look.findings.layers)
            words.append(f"conditions {sites - len(callback.look.violations)} of {sites}")
    return ", ".join(words)
