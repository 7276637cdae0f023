"""Calibrate prices: the constants of each layer, how skips correlate, and what an input's own gradient says of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

from adaskip.batch import Batch
from adaskip.runtime.attach import RoutedModel
from adaskip.survey.firstorder import first_order_of
from adaskip.survey.flips import survey_flips
from adaskip.survey.skips import measure_skips
from adaskip.theory.conformal import smallest_sample
from adaskip.theory.prices import Prices, calibrate_prices

Kind = Literal["calibrated", "gates", "fisher"]
MASS_EVERY = 4
"""One input in so many is set apart for the mean attention mass, where constants need one and none is at hand."""


def needed(model: RoutedModel, alpha: float) -> int:
    """Return the fewest inputs that `price_layers` can calibrate this model on without another source of the mass."""
    scored = smallest_sample(alpha)
    return -(-scored * MASS_EVERY // (MASS_EVERY - 1)) if model.runtime.hides_vision else scored


def price_layers(
    model: RoutedModel,
    batches: list[Batch],
    mass: Tensor | None,
    alpha: float,
    kind: Kind = "calibrated",
    seed: int = 0,
) -> Prices:
    """Calibrate the constants that a kind of price needs, on inputs that nothing else was fitted on.

    Costs a `measure` of the batches; ``gates`` a `survey_flips` beside it, ``fisher`` a few backward passes.

    Args:
        model: attached, with routers.
        batches: prompts with answers, on the model's device.
        mass: (l) attention mass per layer from other inputs; zeros for group ``all``. None: where the routing needs
            it, every fourth input is set apart for it and for nothing else.
        alpha: miscoverage per layer.
        kind: ``calibrated``, ``gates`` or ``fisher``.
        seed: of the label draws.
    """
    reads = mass is None and model.runtime.hides_vision
    measured = measure_skips(model, batches, attention=reads)
    correlation = mean_correlation(model, batches) if kind == "gates" else None
    slopes = first_order_of(model, batches, seed=seed) if kind == "fisher" else None
    if mass is None:
        # a quantile holds for fresh inputs only if the score was fixed before it saw these: what the mean mass is
        # taken of must not be scored
        apart = torch.arange(len(measured)) % MASS_EVERY == 0 if reads else torch.zeros(len(measured)).bool()
        mass = measured.rows(apart).mass.mean(0) if reads else torch.zeros(len(measured.layers))
        measured, slopes = measured.rows(~apart), None if slopes is None else slopes[~apart]
    return calibrate_prices(measured, mass, alpha, correlation=correlation, slopes=slopes)


def mean_correlation(model: RoutedModel, batches: Iterable[Batch]) -> Tensor:
    """Estimate R_lm, how two skips' changes of the logits correlate under p, averaged over inputs; (l l) [D].

        R_lm = E_x[ G_lm / sqrt(G_ll G_mm) ],  G the gate matrix (link 6c)

    Positive semidefinite, ones on the diagonal. R = 1 everywhere would be the triangle inequality's worst case.
    Costs a `survey_flips` of the dense model.

    Args:
        model: attached, with routers.
        batches: prompts with answers.
    """
    with model.keep_all():
        dense = survey_flips(model, batches)
    own = dense.pairs.double().diagonal(dim1=1, dim2=2).clamp_min(0.0).sqrt()
    size = own.unsqueeze(1) * own.unsqueeze(2)
    each = torch.where(size > 0, dense.pairs.double() / size.where(size > 0, 1.0), 0.0)
    return each.mean(0).fill_diagonal_(1.0)
