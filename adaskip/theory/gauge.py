"""Read off a routed pass alone what its skips cost: KL(dense || routed), told from how sure the routed model is.

B prices decisions before they are carried out. A gauge reads their outcome: where skips have done harm the routed
prediction is less sure. How much that says is regressed on inputs for which the dense pass was made as well, beside how
much was left out, and of how many tokens. A fresh input needs no dense pass. The prediction is an estimator; its factor
is calibrated (split conformal):

    P(KL(dense || routed) <= factor * predicted) >= 1 - alpha

over a fresh input exchangeable with the calibration inputs [D]. It holds for the decisions that it was calibrated for:
another threshold or other held layers void it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from adaskip.theory.conditions import Joint
from adaskip.theory.conformal import (
    beta_binomial_pvalue,
    conformal_quantile,
    safe_ratio,
    smallest_sample,
    spread_over,
)
from adaskip.theory.measures import spearman
from adaskip.theory.regression import Predictor, fit_predictor
from adaskip.theory.sureness import SURENESS, describe_sureness

_FLOOR = 1e-5
"""Nats below which costs are all the same to a gauge."""
_FITTED = 5
"""Inputs that a gauge is fitted on at least."""
_SCORED_EVERY = 3
"""Of the inputs one in so many calibrates the factor, or more where alpha needs more; the others fit."""
OUTCOME = SURENESS + 3
"""Numbers that `describe_outcome` gives an input."""


def describe_outcome(logits: Tensor, supervised: Tensor, prompt: Tensor, keep: Tensor) -> Tensor:
    """Describe routed passes, float64 (b 9): `describe_sureness`, the keep rate, and log counts of tokens.

    Args:
        logits: (k v) of a routed pass at the predicted tokens, row by row.
        supervised: bool (b t-1), where these are.
        prompt: bool (b t).
        keep: (b) executed over dense decoder FLOPs.
    """
    counts = torch.stack([supervised.sum(1), prompt.sum(1)], 1).clamp(min=1).double().log()
    return torch.cat([describe_sureness(logits, supervised), keep.double().to(counts.device)[:, None], counts], 1)


@dataclass(frozen=True)
class Gauge:
    """Predict from nine numbers of a routed pass what its skips cost the input, in nats per predicted token."""

    centre: tuple[float, ...]  # 9: of `describe_outcome`
    weight: tuple[float, ...]  # 9: of the logarithm of the cost
    bias: float
    factor: float  # calibrated
    alpha: float  # miscoverage of factor * prediction
    scored: int  # inputs that calibrated the factor

    def predict(self, features: Tensor) -> Tensor:
        """Return the predicted costs (n) of outcomes (n 9): an estimator."""
        table = (torch.tensor(values, dtype=torch.float64) for values in (self.centre, self.weight, (self.bias,)))
        centre, weight, bias = table
        return Predictor(centre, weight[:, None], bias)(features)[:, 0]

    def bound(self, features: Tensor) -> Tensor:
        """Return what the skips cost at most, (n) nats, each with probability >= 1 - alpha, from outcomes (n 9)."""
        return self.factor * self.predict(features)

    def read(self, logits: Tensor, supervised: Tensor, prompt: Tensor, keep: Tensor) -> Tensor:
        """Return `bound` (b) of a routed pass.

        Args:
            logits: (b t v) of the pass.
            supervised: bool (b t-1): whether the token after each place counts, of an answer or of what was generated.
            prompt: bool (b t).
            keep: (b), ``model.routing.keep_rate``.
        """
        return self.bound(describe_outcome(logits[:, :-1][supervised], supervised, prompt, keep))

    def to_dict(self) -> dict[str, Any]:
        """Return it JSON-ready."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Gauge:
        """Read what `to_dict` wrote.

        Raises:
            ValueError: says what is missing or is no number.
        """
        try:
            centre, weight = (tuple(float(value) for value in stored[name]) for name in ("centre", "weight"))
            bias, factor, alpha = (float(stored[name]) for name in ("bias", "factor", "alpha"))
            gauge = cls(centre, weight, bias, factor, alpha, int(stored["scored"]))
        except KeyError as error:
            raise ValueError(f"no {error.args[0]}") from None
        except (TypeError, ValueError) as error:
            raise ValueError(f"expected numbers ({error})") from None
        every = (*gauge.centre, *gauge.weight, gauge.bias, gauge.factor)
        if {len(gauge.centre), len(gauge.weight)} != {OUTCOME} or not all(map(math.isfinite, every)):
            raise ValueError(f"expected {OUTCOME} finite numbers in centre and weight, and a finite bias and factor")
        if not (0 < gauge.alpha < 1 and gauge.factor >= 0 and gauge.scored >= smallest_sample(gauge.alpha)):
            raise ValueError(f"alpha={gauge.alpha:g}, factor={gauge.factor:g}, scored={gauge.scored} do not fit")
        return gauge


def fewest_to_gauge(alpha: float) -> int:
    """Return how many inputs a gauge needs.

    >>> fewest_to_gauge(0.1)
    14
    """
    return smallest_sample(alpha) + _FITTED


def calibrate_gauge(features: Tensor, kl: Tensor, alpha: float) -> Gauge | None:
    """Fit a gauge on some inputs, and calibrate its factor on the others.

    Args:
        features: (n 9) of `describe_outcome`.
        kl: (n) exact KL(dense || routed) of the same, nats per predicted token.
        alpha: miscoverage.

    Returns:
        None where inputs are too few, their figures are not finite, or no skip costs anything.
    """
    finite = bool(features.isfinite().all() and kl.isfinite().all())
    if len(kl) < fewest_to_gauge(alpha) or not finite:
        return None
    scored = spread_over(max(smallest_sample(alpha), len(kl) // _SCORED_EVERY), len(kl))
    if not (kl[~scored] > 0).any():
        return None
    fitted, _ = fit_predictor(features[~scored], kl[~scored, None], _FLOOR)
    centre, weight = tuple(fitted.centre.tolist()), tuple(fitted.weight[:, 0].tolist())
    raw = Gauge(centre, weight, float(fitted.bias), 1.0, alpha, int(scored.sum()))
    factor = float(conformal_quantile(safe_ratio(kl[scored], raw.predict(features[scored])), alpha))
    return replace(raw, factor=factor) if math.isfinite(factor) else None


@dataclass(frozen=True)
class Reading:
    """Hold how well a gauge told what routing cost inputs that it has not seen."""

    spearman: float  # of prediction and exact KL over inputs; NaN: either is constant
    coverage: float  # share of inputs with KL <= factor * prediction
    coverage_p: float  # p-value of "coverage is at least 1 - alpha" under the beta-binomial law
    slack_median: float  # of factor * prediction / KL, where that is above 0; NaN: nowhere
    slack_90: float  # its 90 % quantile
    n: int

    @classmethod
    def of(cls, joint: Joint) -> Reading:
        """Take the same figures out of a bound's, whose factor half of these inputs calibrated."""
        names = ("spearman", "coverage", "coverage_p", "slack_median", "slack_90", "n")
        return cls(**{name: getattr(joint, name) for name in names})

    def to_dict(self) -> dict[str, Any]:
        """Return it JSON-ready, NaN and infinity as None."""
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(self).items()}


def judge_gauge(gauge: Gauge, features: Tensor, kl: Tensor) -> Reading:
    """Hold a gauge against the exact costs (n) of inputs that it has not seen, and their outcomes (n 9)."""
    kl, bound = kl.double().cpu(), gauge.bound(features.cpu())
    covered, paid = int((kl <= bound).sum()), kl > 0
    slack = (bound[paid] / kl[paid]).quantile(torch.tensor([0.5, 0.9], dtype=torch.float64)) if paid.any() else None
    return Reading(
        spearman=spearman(bound, kl),
        coverage=covered / len(kl),
        coverage_p=beta_binomial_pvalue(covered, len(kl), gauge.scored, gauge.alpha),
        slack_median=math.nan if slack is None else float(slack[0]),
        slack_90=math.nan if slack is None else float(slack[1]),
        n=len(kl),
    )
