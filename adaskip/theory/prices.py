"""Prices: constants that say, from what the dense pass shows, what a skip will cost a fresh input."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adaskip.errors import ConfigError, DataError
from adaskip.theory.conformal import conformal_quantile, safe_ratio, smallest_sample
from adaskip.theory.tables import LayerMeasures


@dataclass(frozen=True)
class Prices:
    """Hold calibrated per-layer constants: a fresh input has ``s_l <= shift[l] * (rho_l + c * mass_l)`` with
    probability >= 1 - alpha, per layer, if its score is exchangeable with the calibration scores (split conformal);
    likewise u.
    """

    shift: Tensor  # float64 (l): Lambda for s
    peak: Tensor  # float64 (l): the same for u
    mass: Tensor  # float64 (l): mean attention mass per layer, a constant fixed before calibration
    alpha: float
    c: float = 1.0
    correlation: Tensor | None = None  # float64 (l l): of skips, from `mean_correlation`; None: they add up
    slope: Tensor | None = None  # float64 (2 l): Lambda for s and for u over the first-order s instead of rho

    def costs(self, rho: Tensor) -> tuple[Tensor, Tensor]:
        """Predict the s and u that a skip costs from relative changes of the dense pass, (b l) -> (b l) each."""
        scale = rho.double() + self.c * self.mass.to(rho.device)
        return scale * self.shift.to(rho.device), scale * self.peak.to(rho.device)

    def first_order_costs(self, slopes: Tensor) -> tuple[Tensor, Tensor]:
        """Predict the same from `survey.firstorder.first_order`, (b l).

        Raises:
            ConfigError: the constants of that price were not calibrated.
        """
        if self.slope is None:
            raise ConfigError("prices: no constants of price fisher; calibrate them with kind='fisher'")
        shift, peak = self.slope.to(slopes.device)
        return slopes.double() * shift, slopes.double() * peak


def calibrate_prices(
    measured: LayerMeasures,
    mass: Tensor,
    alpha: float,
    c: float = 1.0,
    *,
    correlation: Tensor | None = None,
    slopes: Tensor | None = None,
) -> Prices:
    """Calibrate split-conformal constants on inputs of their own (one score an input); link 9 of the chain.

    Args:
        measured: of inputs that nothing else was fitted on.
        mass: (l) attention mass per layer from other inputs; zeros for group ``all``.
        alpha: miscoverage per layer.
        c: weight of the attention mass beside rho.
        correlation: (l l) of skips.
        slopes: (n l) first-order s of the same inputs, to calibrate its constants as well.

    Raises:
        DataError: too few inputs for a finite constant at this alpha.
    """
    if len(measured) < (least := smallest_sample(alpha)):
        raise DataError(
            f"calibration: expected at least {least} inputs for alpha={alpha}, got {len(measured)}; "
            "give the calibration split more, or raise conditions.examples"
        )

    def constants(scale: Tensor) -> Tensor:
        return torch.stack([conformal_quantile(safe_ratio(x.double(), scale), alpha) for x in (measured.s, measured.u)])

    shift, peak = constants(measured.rho.double() + c * mass.double())
    slope = None if slopes is None else constants(slopes.double())
    return Prices(shift, peak, mass.double(), alpha, c, correlation, slope)
