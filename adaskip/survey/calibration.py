"""Calibrate prices: the constants of each layer, how skips correlate, and what an input's own gradient says of them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from adaskip.batch import Batch
from adaskip.runtime.attach import RoutedModel
from adaskip.survey.dense_costs import describe_recorded, feature_groups
from adaskip.survey.firstorder import first_order_of
from adaskip.survey.flips import survey_flips
from adaskip.survey.record import Recorded
from adaskip.survey.skips import measure_skips
from adaskip.theory.bounds import gate_matrix
from adaskip.theory.prices import Kind, Prices, calibrate_functional, calibrate_prices, fewest_inputs

MASS_EVERY = 4
"""One input in so many is set apart for the mean attention mass, where constants need one and none is at hand."""


_LIKELIEST = 256
"""Entries of the vocabulary that correlations are taken over, the likeliest of each token; beside them lies little."""


def needed(model: RoutedModel, alpha: float, kind: Kind = "calibrated") -> int:
    """Return the fewest inputs that `price_layers` can calibrate this model on without another source of the mass."""
    scored = fewest_inputs(alpha, "calibrated")
    apart = -(-scored * MASS_EVERY // (MASS_EVERY - 1)) if model.runtime.hides_vision else scored
    return max(apart, fewest_inputs(alpha, kind))


def price_layers(
    model: RoutedModel,
    batches: list[Batch],
    mass: Tensor | None,
    alpha: float,
    kind: Kind = "calibrated",
    seed: int = 0,
) -> Prices:
    """Calibrate the constants that a kind of price needs, on inputs that nothing else was fitted on.

    Costs a `measure_skips` of the batches, and nothing else for ``functional``; ``gates`` costs a `survey_flips` beside
    it, ``fisher`` a few backward passes.

    Args:
        model: attached, with routers.
        batches: prompts with answers, on the model's device.
        mass: (l) attention mass per layer from other inputs; zeros for group ``all``. None: where the routing needs
            it, every fourth input is set apart for it and for nothing else.
        alpha: miscoverage per layer.
        kind: ``calibrated``, ``gates``, ``fisher`` or ``functional``.
        seed: of the label draws.
    """
    reads = mass is None and model.runtime.hides_vision
    watched = _Watched() if kind == "functional" else None
    measured = measure_skips(model, batches, attention=reads, watch=watched)
    correlation = mean_correlation(model, batches) if kind == "gates" else None
    functional = None
    if watched is not None:
        correlation, features = watched.correlation(), torch.cat(watched.features)
        functional = calibrate_functional(features, measured.kl, alpha, feature_groups(features))
    slopes = first_order_of(model, batches, seed=seed) if kind == "fisher" else None
    if mass is None:
        # a quantile holds for fresh inputs only if the score was fixed before it saw these: what the mean mass is
        # taken of must not be scored
        apart = torch.arange(len(measured)) % MASS_EVERY == 0 if reads else torch.zeros(len(measured)).bool()
        mass = measured.rows(apart).mass.mean(0) if reads else torch.zeros(len(measured.layers))
        measured, slopes = measured.rows(~apart), None if slopes is None else slopes[~apart]
    return calibrate_prices(measured, mass, alpha, correlation=correlation, slopes=slopes, functional=functional)


class _Watched:
    """Collect, while skips are measured, what price functional needs beside their costs."""

    def __init__(self) -> None:
        self.features: list[Tensor] = []
        self._pairs: list[Tensor] = []  # (b l l) gate matrices, summed over the input's predicted tokens
        self._skipped: list[Tensor] = []  # (k m) logits at the likeliest entries, of the batch under way
        self._likely: Tensor = torch.empty(0)  # long (k m), which these are

    def __call__(self, recorded: Recorded, column: int, logits: Tensor) -> None:
        """Hear of the next layer of a recorded pass."""
        if column == 0:
            self.features.append(describe_recorded(recorded))
            self._likely = recorded.logits.topk(min(_LIKELIEST, logits.shape[-1]), -1).indices
        self._skipped.append(logits.gather(-1, self._likely))
        if column < len(recorded.keep) - 1:
            return
        pairs = gate_matrix(recorded.logits.gather(-1, self._likely), torch.stack(self._skipped, 1))
        rows = recorded.batch.supervised.nonzero()[:, 0]
        total = pairs.new_zeros(len(recorded.batch), *pairs.shape[1:])
        self._pairs.append(total.index_add(0, rows, pairs).cpu())
        self._skipped.clear()

    def correlation(self) -> Tensor:
        """Return the mean over inputs of how skips correlate, (l l)."""
        return _correlate(torch.cat(self._pairs))


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
    return _correlate(dense.pairs.double())


def _correlate(pairs: Tensor) -> Tensor:
    """Return the mean correlation (l l) of gate matrices (n l l)."""
    own = pairs.diagonal(dim1=1, dim2=2).clamp_min(0.0).sqrt()
    size = own.unsqueeze(1) * own.unsqueeze(2)
    each = torch.where(size > 0, pairs / size.where(size > 0, 1.0), 0.0)
    return each.mean(0).fill_diagonal_(1.0)
