"""A callback that reports every finished step, for output without a progress bar."""

from __future__ import annotations

from typing import Any

import lightning

from adaskip.stages import Advance


class StepCount(lightning.Callback):
    """Report after every step how many are done.

    Args:
        advance: called with that number.
    """

    def __init__(self, advance: Advance) -> None:
        self.advance = advance

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        """Report the number of steps that are done."""
        self.advance(trainer.global_step)
