"""Regress the logarithms of costs on features of an input by ridge, judged on inputs that the fit has not seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

FOLDS = 10
"""Folds of the cross-fitting, where there are so many inputs."""
FLOOR = 1e-3
"""Nats added before a logarithm is taken: costs far below it are all the same to a predictor."""


@dataclass(frozen=True)
class Predictor:
    """Predict costs from features, (n f) -> (n k): ``exp((features - centre) @ weight + bias)``."""

    centre: Tensor  # float64 (f)
    weight: Tensor  # float64 (f k)
    bias: Tensor  # float64 (k); -inf where a column costs nothing

    def __call__(self, features: Tensor) -> Tensor:
        """Return what each column will cost each input."""
        centre, weight, bias = (value.to(features.device) for value in (self.centre, self.weight, self.bias))
        return ((features.double() - centre) @ weight + bias).exp()


def fit_predictor(
    features: Tensor, costs: Tensor, floor: float = FLOOR, groups: Sequence[int] = ()
) -> tuple[Predictor, Tensor]:
    """Regress the logarithms of costs (n k) on features (n f) by ridge.

    Args:
        features: one row an input.
        costs: nats >= 0.
        floor: nats added before the logarithm is taken.
        groups: sizes of groups of neighbouring features. Each group weighs alike in the penalty, however many features
            it has; without groups every feature does.

    Returns:
        The predictor, and what it says of these inputs, float64 (n k), cross-fitted: of each by one that did not see
        it. Both are scaled so that each column's predictions have the mean of its costs.
    """
    # takes a second, which every command that loads a model would wait for
    from sklearn.linear_model import RidgeCV
    from sklearn.model_selection import KFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import FunctionTransformer, StandardScaler

    x, dear = features.double().numpy(), (costs > 0).any(0)
    logs = (costs[:, dear].double() + floor).log().numpy()
    sizes = list(groups) or [x.shape[1]]
    column = np.concatenate([np.full(size, (x.shape[1] / (len(sizes) * size)) ** 0.5) for size in sizes])
    weigh = FunctionTransformer(lambda standard: standard * column)
    ridge = make_pipeline(StandardScaler(), weigh, RidgeCV(alphas=np.logspace(0, 5, 11), alpha_per_target=True))
    folds = KFold(min(FOLDS, len(x)), shuffle=True, random_state=0)
    guessed = torch.zeros_like(costs, dtype=torch.float64)
    weight = torch.zeros(x.shape[1], costs.shape[1], dtype=torch.float64)
    bias = torch.full((costs.shape[1],), -torch.inf, dtype=torch.float64)
    if dear.any():
        raw = torch.from_numpy(cross_val_predict(ridge, x, logs, cv=folds).reshape(logs.shape)).exp()
        scale = costs[:, dear].double().mean(0) / raw.mean(0)
        guessed[:, dear] = raw * scale
        scaler, fitted = ridge.fit(x, logs)[0], ridge[-1]
        slope = fitted.coef_.reshape(logs.shape[1], -1).T
        weight[:, dear] = torch.from_numpy(slope * (column / scaler.scale_)[:, None])
        bias[dear] = torch.from_numpy(np.atleast_1d(fitted.intercept_)) + scale.log()
    return Predictor(features.double().mean(0), weight, bias), guessed
