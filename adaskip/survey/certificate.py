"""Certify what a bank's choices cost: a factor on the predicted cost that holds for a new input, and how well it ranks.

    score of a calibration input    exact cost of its path / predicted cost of its path
    kappa                           their conformal quantile: P(cost <= kappa * predicted) >= 1 - alpha for a new input

The probability is over calibration and test draws together, and asks of the data only that they are exchangeable
(standard split conformal, `adaskip.theory.conformal`); its use for paths is ours. A poor predictor makes kappa large,
and the certificate loose, but never wrong.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor

from adaskip.batch import Batch
from adaskip.errors import ConfigError
from adaskip.policies.features import describe_prompt
from adaskip.policies.path_bank import PathBank
from adaskip.runtime.attach import RoutedModel
from adaskip.survey.record import record
from adaskip.theory.conformal import conformal_quantile, safe_ratio


@dataclass(frozen=True)
class Certificate:
    """Hold a certificate's factor, and how it does on inputs that neither fitted nor calibrated it."""

    kappa: float  # inf where there were too few inputs to calibrate on
    alpha: float
    calibrated: int  # inputs
    judged: int  # inputs
    coverage: float  # share of the judged that cost at most kappa times what was predicted
    rank: float  # Spearman's, of predicted and exact cost over the judged inputs; NaN where one of them does not vary
    slack: tuple[float, float]  # median and 90 % quantile of kappa * predicted / exact cost, where that is above 0

    def to_dict(self) -> dict[str, Any]:
        """Return it JSON-ready, what is not finite as None."""
        values = {
            "kappa": self.kappa,
            "coverage": self.coverage,
            "spearman": self.rank,
            "slack_median": self.slack[0],
            "slack_90": self.slack[1],
        }
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        return finite | {"alpha": self.alpha, "calibrated": self.calibrated, "judged": self.judged}


def certify(
    model: RoutedModel, calibration: Sequence[Batch], judged: Sequence[Batch], alpha: float = 0.1
) -> Certificate:
    """Calibrate the factor of a bank's certificate, judge it on other inputs, and keep it in the policy.

    Args:
        model: attached with a `PathBank` whose predictor and price are final.
        calibration: prompts with answers, on the model's device, that nothing of the bank was fitted on.
        judged: others.
        alpha: share of new inputs that may cost more.

    Raises:
        ConfigError: another policy.
    """
    predicted, exact = price_choices(model, calibration)
    kappa = conformal_quantile(safe_ratio(exact, predicted), alpha)
    model.policy.kappa.fill_(float(kappa))  # type: ignore[operator]
    predicted, exact = price_choices(model, judged)
    covered = (exact <= kappa * predicted) | (exact == 0)
    costly = exact > 0
    slack = (kappa * predicted[costly] / exact[costly]).quantile(torch.tensor([0.5, 0.9]).double())
    rank = float(spearmanr(predicted, exact).statistic) if len({*predicted.tolist()}) > 1 else math.nan
    return Certificate(
        float(kappa),
        alpha,
        sum(map(len, calibration)),
        len(exact),
        float(covered.double().mean()),
        rank,
        (float(slack[0]), float(slack[1])) if costly.any() else (math.nan, math.nan),
    )


@torch.no_grad()
def price_choices(model: RoutedModel, batches: Sequence[Batch]) -> tuple[Tensor, Tensor]:
    """Return what the paths that a bank chooses were predicted to cost, and what they cost: float64 (n) each, nats."""
    policy = model.policy
    if not isinstance(policy, PathBank):
        raise ConfigError(f"certify: expected a model with a path bank, got one with policy {policy.kind!r}")
    predicted, exact = [], []
    for batch in batches:
        dense = record(model, batch)
        features = describe_prompt(dense.entered[policy.entry], batch.prompt_mask & dense.tokens.valid)
        costs = policy.predict(features)
        predicted.append(costs.gather(1, policy.choose(costs)[:, None])[:, 0].double().cpu())
        routed = record(model, batch, routed=True, states=False)
        exact.append(dense.compare(routed.logits)["kl"].double().cpu())
    return torch.cat(predicted), torch.cat(exact)
