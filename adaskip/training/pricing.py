"""The prices of the redundancy bound in training: calibrated when a fit starts, checked, and kept in checkpoints."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from adaskip.batch import Batch, count, take
from adaskip.errors import ConfigError, DataError
from adaskip.runtime.attach import RoutedModel
from adaskip.survey.calibration import needed, price_layers
from adaskip.theory.prices import Functional, Prices
from adaskip.training.objective import Objective

LIMIT = 256
"""Inputs that prices are calibrated on at most; each costs about half a dense pass per layer."""


def read_calibration(
    model: RoutedModel, source: Iterable[Batch], objective: Objective, limit: int = LIMIT
) -> list[Batch]:
    """Read the batches to calibrate on, and refuse too few of them before anything runs.

    Raises:
        DataError: too few inputs for finite constants of the objective's price at its alpha.
    """
    batches, alpha = take(source, limit, "calibration"), objective.alpha
    minimum = needed(model, alpha, objective.price)
    if count(batches) < minimum:
        reason = f" and price {objective.price}" if minimum > needed(model, alpha) else ""
        reason += ", a fourth of which gives the mean attention mass" if model.runtime.hides_vision else ""
        raise DataError(
            f"calibration: expected at least {minimum} inputs for alpha={alpha}{reason}, got {count(batches)}; "
            "pass a loader with more of them, or a larger Objective(alpha=...)"
        )
    return batches


def price_objective(model: RoutedModel, batches: Iterable[Batch], objective: Objective, seed: int) -> Prices:
    """Price skips for the objective's kind and alpha, on the model's device; modes and random numbers stay as they are.

    See `adaskip.survey.calibration.price_layers`.
    """
    inputs = [batch.to(model.spec.device) for batch in batches]
    with torch.random.fork_rng(devices=[]), evaluating(model):
        return price_layers(model, inputs, None, objective.alpha, objective.price, seed)


@contextmanager
def evaluating(model: RoutedModel) -> Iterator[None]:
    """Put the model into ``eval()``, in which it really skips, and back into its mode afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def check_prices(prices: Prices | None, objective: Objective, n_layers: int) -> None:
    """Refuse an objective with a bound for which there are no prices, or prices of another kind.

    Raises:
        ConfigError: says what to type.
    """
    cure = "pass RouterTuner(..., calibration=batches), inputs that nothing else is fitted on or judged by"
    if prices is None:
        if objective.bound_weight:
            raise ConfigError(
                f"RouterTuner: bound_weight={objective.bound_weight} weighs the redundancy bound, but nothing says "
                f"what a skip costs; {cure}, or prices=, or leave the bound out: Objective(bound_weight=0)"
            )
        return
    if len(prices.shift) != n_layers:
        raise ConfigError(f"prices: expected constants of {n_layers} layers, got {len(prices.shift)}; {cure}")
    missing = {
        "gates": prices.correlation is None,
        "fisher": prices.slope is None,
        "functional": prices.functional is None,
    }
    if objective.bound_weight and missing.get(objective.price):
        raise ConfigError(
            f"prices: expected constants of Objective(price={objective.price!r}), got others; {cure}, "
            f"or calibrate with adaskip.survey.calibration.price_layers(..., kind={objective.price!r})"
        )
    used = prices.slope if objective.price == "fisher" else torch.stack([prices.shift, prices.peak])
    if objective.price == "functional":
        used = None  # predictions are above 0, so that every factor is finite
    if objective.bound_weight and used is not None and not used.isfinite().all():
        layers = (~used.isfinite()).any(0).nonzero().squeeze(1).tolist()
        raise ConfigError(
            f"prices: the constants of layers {layers} are not finite: these layers hardly move the states and still "
            "change the logits; take another Objective(price=...), or leave the bound out: Objective(bound_weight=0)"
        )


def to_state(prices: Prices) -> dict[str, Any]:
    """Return the prices as tensors and numbers that a checkpoint holds and ``weights_only=True`` reads."""
    state = asdict(prices)
    for part in (state, state["functional"] or {}):
        part |= {name: value.cpu() for name, value in part.items() if isinstance(value, Tensor)}
    return state


def from_state(state: dict[str, Any]) -> Prices:
    """Return the prices that `to_state` wrote; those of an older checkpoint lack what came later."""
    nested = state.get("functional")
    return Prices(**state | {"functional": None if nested is None else Functional(**nested)})


def same(a: Prices, b: Prices) -> bool:
    """Return whether two prices are equal to the bit."""
    return _same(to_state(a), to_state(b))


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[name], b[name]) for name in a)
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    return a is b or (not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b)
