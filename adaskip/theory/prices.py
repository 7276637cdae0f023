"""Prices: constants that say, from what the dense pass shows, what a skip will cost a fresh input."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from adaskip.errors import ConfigError, DataError
from adaskip.theory.conformal import conformal_quantile, safe_ratio, smallest_sample, spread_over
from adaskip.theory.regression import Predictor, fit_predictor
from adaskip.theory.tables import LayerMeasures

Kind = Literal["calibrated", "gates", "fisher", "functional"]
_SCORED_EVERY = 3
"""Of the inputs of price functional one in so many calibrates, or more where alpha needs more; the others fit."""
_FITTED = 5
"""Inputs that a predictor needs: too few to tell inputs apart, enough to tell layers apart."""
_FLOOR = 1e-5
"""Nats below which the costs of single skips are all the same to price functional."""


@dataclass(frozen=True)
class Functional:
    """Predict what skipping each layer alone costs an input, in nats, from features of its dense pass.

    A fresh input's cost is at most ``factor[l]`` times the prediction with probability >= 1 - alpha, per layer, if it
    is exchangeable with the inputs that calibrated the factor (split conformal). The predictor never saw these.
    """

    centre: Tensor  # float64 (f)
    weight: Tensor  # float64 (f l)
    bias: Tensor  # float64 (l)
    highest: Tensor  # float64 (l): predictions end at the largest cost that the predictor was fitted on
    factor: Tensor  # float64 (l)

    def predict(self, features: Tensor) -> Tensor:
        """Return what each skip will cost, before the factor: float64 (n l) > 0, from features (n f)."""
        predicted = Predictor(self.centre, self.weight, self.bias)(features)
        return predicted.minimum(self.highest.to(predicted.device))

    def costs(self, features: Tensor) -> Tensor:
        """Return s (n l): the spread whose half square is the calibrated cost, KL ~ s^2/2 inverted (estimator)."""
        nats = self.factor.to(features.device) * self.predict(features)
        return (2 * nats).sqrt()


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
    functional: Functional | None = None  # exact costs, predicted

    @property
    def kind(self) -> Kind:
        """Return the price that these constants were calibrated for."""
        if self.functional is not None:
            return "functional"
        if self.slope is not None:
            return "fisher"
        return "calibrated" if self.correlation is None else "gates"

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
    functional: Functional | None = None,
) -> Prices:
    """Calibrate split-conformal constants on inputs of their own (one score an input); link 9 of the chain.

    Args:
        measured: of inputs that nothing else was fitted on.
        mass: (l) attention mass per layer from other inputs; zeros for group ``all``.
        alpha: miscoverage per layer.
        c: weight of the attention mass beside rho.
        correlation: (l l) of skips.
        slopes: (n l) first-order s of the same inputs, to calibrate its constants as well.
        functional: of `calibrate_functional`.

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
    return Prices(shift, peak, mass.double(), alpha, c, correlation, slope, functional)


def fewest_inputs(alpha: float, kind: Kind) -> int:
    """Return how many inputs a kind of price needs for finite constants at this alpha.

    >>> fewest_inputs(0.1, "calibrated"), fewest_inputs(0.1, "functional")
    (9, 14)
    """
    return smallest_sample(alpha) + (_FITTED if kind == "functional" else 0)


def calibrate_functional(features: Tensor, costs: Tensor, alpha: float, groups: Sequence[int] = ()) -> Functional:
    """Fit a predictor of the exact costs of single skips on some inputs, and calibrate its factor on the others.

    Args:
        features: (n f) of the dense pass, one row an input; nothing else was fitted on these inputs.
        costs: (n l) exact KL of skipping each layer alone, nats per predicted token.
        alpha: miscoverage per layer.
        groups: of the features, as in `fit_predictor`.

    Raises:
        DataError: too few inputs to fit and to calibrate on.
    """
    if len(costs) < (least := fewest_inputs(alpha, "functional")):
        raise DataError(
            f"calibration: expected at least {least} inputs for price functional and alpha={alpha}, got {len(costs)}; "
            "give the calibration split more, raise conditions.examples, or take another objective.price"
        )
    count = max(smallest_sample(alpha), len(costs) // _SCORED_EVERY)
    scored = spread_over(count, len(costs))
    own = costs[~scored].double()
    fitted, _ = fit_predictor(features[~scored], own, _FLOOR, groups)
    bias = torch.where(fitted.bias.isinf(), math.log(_FLOOR), fitted.bias)  # of a layer that cost none of them anything
    highest, one = own.amax(0).clamp_min(_FLOOR), torch.ones(own.shape[1], dtype=torch.float64)
    uncalibrated = Functional(fitted.centre, fitted.weight, bias, highest, one)
    factor = conformal_quantile(safe_ratio(costs[scored], uncalibrated.predict(features[scored])), alpha)
    return replace(uncalibrated, factor=factor)
