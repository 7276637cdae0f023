"""Settings of training: the loss that routers minimise, and the schedule of a fit from bounds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from adaskip.errors import ConfigError

Bound = Literal["two-point", "quadratic"]
Price = Literal["calibrated", "gates", "fisher", "functional"]
Gradient = Literal["straight-through", "flips"]


def is_number(value: Any) -> bool:
    """Return whether a value is a finite number; text that reads like one is not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_count(value: Any) -> bool:
    """Return whether a value is an integer of at least one."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


@dataclass(frozen=True)
class Objective:
    """Weigh the parts of the training loss: ``KL(dense || routed) + task_weight * CE + bound_weight * B + budget``.

    Args:
        keep: target share of the dense decoder FLOPs, in (0, 1].
        task_weight: weight of the cross-entropy with the data's own answers.
        bound_weight: weight of the redundancy bound B (nats); a heuristic while training, calibrated afterwards.
        bound: the shape of B: ``two-point`` (Bennett, clipped) or ``quadratic`` (S^2 / 2).
        price: of a skip within B: ``calibrated`` (Lambda_l rho_l, skips add up), ``gates`` (the same, and skips add up
            as far as the mean gate matrix says that they correlate), ``fisher`` (Lambda_l times the input's own
            first-order s, for about three more passes a step) or ``functional`` (the exact cost of the skip, predicted
            from the input's dense pass; skips add up as with ``gates``, and B is quadratic whatever ``bound`` says).
        alpha: miscoverage of the calibrated per-layer constants that price a skip.
        warmup: share of the steps over which the target falls from 1 to ``keep``.
        gradient: of the cost by the routers' decisions: ``straight-through`` (the slope of a soft gate, by
            back-propagation through the backbone) or ``flips`` (exact reruns of drawn paths with one decision flipped:
            unbiased, forward passes only; scope ``prompt``).
        flips: layers of each drawn path that ``gradient: flips`` reruns, in each of so many parts of the model one.
        budget_start: the budget's Lagrange multiplier before the first step, nats per unit of keep.
        budget_rate: step size of the dual ascent on it.
        budget_weight: weight of the squared overshoot beside it (augmented Lagrangian).

    Raises:
        ConfigError: a value outside its range; all faults at once.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    keep: float = 0.6
    task_weight: float = 1.0
    bound_weight: float = 0.01
    bound: Bound = "two-point"
    price: Price = "functional"
    alpha: float = 0.1
    warmup: float = 0.3
    gradient: Gradient = "straight-through"
    flips: int = 4
    budget_start: float = 0.0
    budget_rate: float = 0.05
    budget_weight: float = 10.0

    def __post_init__(self) -> None:
        ranges = {
            "keep": (is_number(self.keep) and 0 < self.keep <= 1, "a share in (0, 1]"),
            "task_weight": (is_number(self.task_weight) and self.task_weight >= 0, "a number >= 0"),
            "bound_weight": (is_number(self.bound_weight) and self.bound_weight >= 0, "a number >= 0"),
            "bound": (self.bound in get_args(Bound), " | ".join(get_args(Bound))),
            "price": (self.price in get_args(Price), " | ".join(get_args(Price))),
            "alpha": (is_number(self.alpha) and 0 < self.alpha < 1, "a share in (0, 1)"),
            "warmup": (is_number(self.warmup) and 0 <= self.warmup < 1, "a share in [0, 1)"),
            "gradient": (self.gradient in get_args(Gradient), " | ".join(get_args(Gradient))),
            "flips": (is_count(self.flips), "an integer >= 1"),
            "budget_start": (is_number(self.budget_start) and self.budget_start >= 0, "a number >= 0"),
            "budget_rate": (is_number(self.budget_rate) and self.budget_rate > 0, "a number > 0"),
            "budget_weight": (is_number(self.budget_weight) and self.budget_weight >= 0, "a number >= 0"),
        }
        faults = [f"{k}: expected {span}, got {getattr(self, k)!r}" for k, (ok, span) in ranges.items() if not ok]
        if faults:
            raise ConfigError("Objective: " + "; ".join(faults))


def check_gradient(goal: Objective, scope: str, adapted: bool = False) -> None:
    """Refuse what flips do not train: decisions of single tokens, and adapters.

    Raises:
        ConfigError: every token decides, or there are adapters to train.
    """
    if goal.gradient == "flips" and scope != "prompt":
        raise ConfigError(
            "RouterTuner: objective.gradient: expected straight-through for scope token, since flips take routers that "
            f"decide once a row (scope prompt), got {goal.gradient!r}"
        )
    if goal.gradient == "flips" and adapted:
        raise ConfigError(
            "RouterTuner: objective.gradient: expected straight-through where adapters are trained along, since flips "
            f"take forward passes only (or train without them, and heal the finished run), got {goal.gradient!r}"
        )


@dataclass(frozen=True)
class Fit:
    """Set the schedule of `fit_from_bounds`.

    Args:
        rounds: surveys, each along the path of the routers that the round before fitted; the target keep rate falls
            from 1 by equal steps. With 1 the only survey is one dense pass with a rerun of every layer's suffix.
        examples: inputs a round surveys.
        steps: optimiser steps a round, on cached features.
        batch_size: inputs a step.
        learning_rate: peak of a one-cycle schedule, every round anew.

    Raises:
        ConfigError: a value outside its range; all faults at once.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    rounds: int = 5
    examples: int = 512
    steps: int = 150
    batch_size: int = 256
    learning_rate: float = 3e-3

    def __post_init__(self) -> None:
        counts = {name: getattr(self, name) for name in ("rounds", "examples", "steps", "batch_size")}
        wrong = [name for name, value in counts.items() if not is_count(value)]
        faults = [f"{name}: expected an integer >= 1, got {getattr(self, name)!r}" for name in wrong]
        if not (is_number(self.learning_rate) and self.learning_rate > 0):
            faults.append(f"learning_rate: expected a number > 0, got {self.learning_rate!r}")
        if faults:
            raise ConfigError("Fit: " + "; ".join(faults))
