"""The split of the inputs that looks read: those that judge, and none of them was used to fit a constant."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from adaskip.batch import Batch, fingerprints
from adaskip.errors import DataError
from adaskip.survey.calibration import MASS_EVERY, needed
from adaskip.theory.prices import Prices, calibrate_prices
from adaskip.theory.tables import LayerMeasures
from adaskip.training.module import RouterTuner

JUDGED = 4
"""Inputs that a look needs: two that calibrate the joint bound's factor, and two that test it."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Split:
    """Mark the inputs that judge, and those that calibrate; without masks all judge."""

    judging: Tensor | None = None  # bool (n)
    fitting: Tensor | None = None  # bool (n): for the looks' own prices, where the tuner has none

    def judged(self, measured: LayerMeasures) -> LayerMeasures:
        """Select the rows that judge."""
        return measured if self.judging is None else measured.rows(self.judging)

    def judged_columns(self, values: Tensor) -> Tensor:
        """Select the columns that judge, of values (n) or (l n)."""
        return values if self.judging is None else values[..., self.judging]

    def prices(self, tuner: RouterTuner, measured: LayerMeasures | None) -> Prices | None:
        """Calibrate prices for the looks alone, on inputs that do not judge; the loss never uses them."""
        if self.fitting is None or measured is None:
            return None
        rows = measured.rows(self.fitting)
        # the mean attention mass is a constant as well, so it comes from rows of its own
        apart = torch.arange(len(rows)) % MASS_EVERY == 0 if tuner.model.runtime.hides_vision else None
        if apart is None:
            return calibrate_prices(rows, torch.zeros(len(rows.layers)), tuner.objective.alpha)
        return calibrate_prices(rows.rows(~apart), rows.rows(apart).mass.mean(0), tuner.objective.alpha)


def split_inputs(tuner: RouterTuner, batches: list[Batch], unpriced: bool) -> Split:
    """Choose the inputs that judge, before anything is measured.

    Args:
        tuner: knows the inputs that its prices were calibrated on, unless they were handed over ready-made.
        batches: the inputs to look at.
        unpriced: the tuner has no prices and will have none, so that every second input has to calibrate them.

    Raises:
        DataError: too few inputs; says how many are needed.
    """
    marks = fingerprints(batches)
    fitted = set(tuner.calibrated_on)
    fitting = torch.arange(len(marks)) % 2 == 0 if unpriced else torch.zeros(len(marks)).bool()
    fitted |= {mark for mark, fits in zip(marks, fitting.tolist(), strict=True) if fits}
    judging = torch.tensor([mark not in fitted for mark in marks], dtype=torch.bool)
    minimum = max(2 * needed(tuner.model, tuner.objective.alpha) - 1, 2 * JUDGED) if unpriced else JUDGED
    excluded = int((~judging & ~fitting).sum())
    if len(marks) < minimum or int(judging.sum()) < JUDGED:
        raise DataError(_too_few(tuner, len(marks), minimum, excluded, unpriced))
    if excluded and tuner.trainer.is_global_zero:
        _log.warning(
            "ConditionCheck: %d of %d inputs are left out of every look: prices were calibrated on the same",
            excluded,
            len(marks),
        )
    return Split(None if judging.all() else judging, fitting if unpriced else None)


def _too_few(tuner: RouterTuner, inputs: int, minimum: int, excluded: int, unpriced: bool) -> str:
    reason = ""
    if unpriced:
        reason = (
            f" (every second one calibrates prices at alpha={tuner.objective.alpha}, as the tuner has none; "
            "with RouterTuner(..., calibration=batches) all are judged)"
        )
    if excluded:
        reason += f", {excluded} of which the prices were calibrated on as well"
    cure = "pass inputs that nothing was fitted on" if excluded else "pass more validation data, or raise examples"
    return f"ConditionCheck: expected at least {minimum} inputs to look at, got {inputs}{reason}; {cure}"
