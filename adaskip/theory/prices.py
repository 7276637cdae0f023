"""Prices of a skip beside the calibrated rho: how skips correlate, and what the input's own gradient says of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

from adaskip.batch import Batch
from adaskip.runtime.attach import RoutedModel
from adaskip.theory.conformal import smallest_sample
from adaskip.theory.firstorder import label_law
from adaskip.theory.flips import survey_flips
from adaskip.theory.profile import Prices, calibrate_prices, measure

Kind = Literal["calibrated", "gates", "fisher"]
DRAWS = 2
"""Labels drawn of an input; constants hold only for slopes of as many draws as they were calibrated on."""

MASS_EVERY = 4
"""One input in so many is set apart for the mean attention mass, where constants need one and none is at hand."""


def needed(model: RoutedModel, alpha: float) -> int:
    """The fewest inputs that `price` can calibrate this model's constants on without another source of the mass."""
    scored = smallest_sample(alpha)
    return -(-scored * MASS_EVERY // (MASS_EVERY - 1)) if model.runtime.hides_vision else scored


def price(
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
    measured = measure(model, batches, attention=reads)
    correlation = mean_correlation(model, batches) if kind == "gates" else None
    slopes = first_order_of(model, batches, seed=seed) if kind == "fisher" else None
    if mass is None:
        apart = torch.arange(len(measured)) % MASS_EVERY == 0 if reads else torch.zeros(len(measured)).bool()
        mass = measured.rows(apart).mass.mean(0) if reads else torch.zeros(len(measured.layers))
        measured, slopes = measured.rows(~apart), None if slopes is None else slopes[~apart]
    return calibrate_prices(measured, mass, alpha, correlation=correlation, slopes=slopes)


def mean_correlation(model: RoutedModel, batches: Iterable[Batch]) -> Tensor:
    """R_lm: how two skips' changes of the logits correlate under p, averaged over inputs; (l l), estimator [D].

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
    found = each.mean(0)
    found.fill_diagonal_(1.0)
    return found


def first_order(model: RoutedModel, batch: Batch, draws: int, noise: torch.Generator) -> tuple[Tensor, Tensor]:
    """The dense logits, and s_l of every skip to first order: (b t v) and (b l), nats; estimator [D, link 8].

        s_l^2 = E_{Y ~ p} (d log p(Y) / d g_l)^2 at g = 1,  mean over the input's predicted tokens

    In the soft mix ``left + g_l (run - left)`` the gate's gradient is the first-order change by the skip, so that one
    pass with every gate open and a backward pass a draw price all layers at once. Labels are drawn from q ~ p (1 - p),
    weighted by p / q, with random signs, so that squares of sums over tokens add up. Noisy for a single input.

    Args:
        model: attached, with routers.
        batch: prompts with answers.
        draws: label draws, a backward pass each.
        noise: of the draws, on any device.
    """
    where = batch.supervised
    with torch.enable_grad(), model.keep_all(), model.soft():
        logits = model(**batch.arguments()).logits
        gates = model.gates()
        log_p = logits[:, :-1][where].double().log_softmax(-1)
    p, q = label_law(log_p)
    total = torch.zeros(len(where), len(gates), dtype=torch.float64, device=log_p.device)
    for left in reversed(range(draws)):
        cut = torch.rand(len(q), 1, generator=noise, device=noise.device, dtype=torch.float32).to(q)
        label = (q.cumsum(-1) < cut).sum(-1, keepdim=True).clamp(max=q.shape[-1] - 1)
        sign = torch.randint(2, label.shape, generator=noise, device=noise.device).to(q) * 2 - 1
        weight = (p.gather(1, label) / q.gather(1, label).clamp_min(1e-300)).sqrt() * sign
        slopes = torch.autograd.grad(log_p, gates, torch.zeros_like(p).scatter(1, label, weight), retain_graph=left > 0)
        total += torch.stack(slopes, 1).double() ** 2
    return logits.detach(), (total / draws / where.sum(1, keepdim=True)).sqrt()


def first_order_of(model: RoutedModel, batches: Iterable[Batch], draws: int = DRAWS, seed: int = 0) -> Tensor:
    """`first_order` over batches: (n l), on the CPU."""
    noise = torch.Generator().manual_seed(seed)
    return torch.cat([first_order(model, batch, draws, noise)[1].cpu() for batch in batches])
