"""The length of training in optimiser steps, and the learning rate over it."""

from __future__ import annotations

import logging
import math

import lightning
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import OneCycleLR

from adaskip.errors import ConfigError

_log = logging.getLogger(__name__)


class OneCycle(OneCycleLR):
    """Follow one cycle of `torch.optim.lr_scheduler.OneCycleLR`, and keep its last rate if a run goes on longer."""

    def __init__(self, optimizer: Optimizer, peak: float, steps: int) -> None:
        # the parent divides by the length of the rise, 0.1 * steps - 1: at ten steps it would be none
        rise = 0.1 if steps != 10 else 0.15
        super().__init__(optimizer, max_lr=peak, total_steps=steps, pct_start=rise, anneal_strategy="cos")

    def get_lr(self) -> list[float | Tensor]:
        """Return the rates of this step."""
        if self.last_epoch >= self.total_steps:  # the parent's cosine would turn up again, and one step later it raises
            return [group["min_lr"] for group in self.optimizer.param_groups]
        return super().get_lr()


def planned_steps(trainer: lightning.Trainer) -> float:
    """Count the optimiser steps that the trainer will run in all; infinite where nothing says so."""
    if trainer.max_steps > 0 and trainer.max_epochs == -1:
        return trainer.max_steps
    steps = trainer.estimated_stepping_batches
    return math.inf if steps < 0 else steps  # -1: epochs of unknown length


def length(trainer: lightning.Trainer, steps: int | None, warmup: float) -> int:
    """Return the steps of the schedule: those asked for, or (None) the trainer's.

    Warns where the trainer goes on after the schedule, and where it ends before the target keep rate is reached.

    Raises:
        ConfigError: nothing says how long training is.
    """
    planned = planned_steps(trainer)
    if steps is None:
        if not math.isfinite(planned):
            raise ConfigError(
                "RouterTuner: steps: the trainer does not say how many optimiser steps it will run (no max_steps, and "
                "epochs without an end or of unknown length); pass RouterTuner(..., steps=N)"
            )
        return max(1, int(planned))
    if planned > steps and trainer.is_global_zero:
        _log.warning(
            "the trainer runs %s optimiser steps and the schedule ends after steps=%d: from there on the last learning "
            "rate, next to nothing, is held; leave steps out to spread the schedule over the whole run",
            planned if math.isfinite(planned) else "any number of",
            steps,
        )
    if planned < warmup * steps and trainer.is_global_zero:
        _log.warning(
            "the trainer ends after %d optimiser steps, before the target keep rate is reached at step %d "
            "(warmup %g of steps=%d); leave steps out to take the trainer's",
            planned,
            math.ceil(warmup * steps),
            warmup,
            steps,
        )
    return steps
