"""Forecast what later layers do to an input from what early ones did, by ridge regression, judged cross-fitted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adaskip.batch import Batch
from adaskip.errors import ConfigError, DataError
from adaskip.plan import Target
from adaskip.policies.skip_it import FLOOR, Notion, SkipIt, measure, read_change
from adaskip.runtime.attach import RoutedModel
from adaskip.survey.record import record
from adaskip.survey.static import whole_rows
from adaskip.theory.measures import spearman
from adaskip.theory.regression import FOLDS, Predictor, fit_predictor


@dataclass(frozen=True)
class Forecast:
    """Hold a notion of later layers on inputs, what predicts it, and how well; k layers from the entry on."""

    entry: int
    notion: Notion
    delta: float
    predictor: Predictor
    rows: Tensor  # long (m): the inputs that have tokens of the group; they alone are fitted on
    measured: Tensor  # float64 (m k), on a dense pass
    guessed: Tensor  # float64 (m k), of each input by a regression that did not see it

    @property
    def ranks(self) -> list[float]:
        """Return, for each layer, Spearman's correlation over inputs of what was guessed with what was measured."""
        return [spearman(a, b) for a, b in zip(self.guessed.T, self.measured.T, strict=True)]

    def limit(self, saved: Tensor, keep: float) -> float:
        """Return the smallest limit at which the decisions' mean keep rate over these inputs is no more than a budget.

        By bisection: the keep rate only falls as the limit rises. Inputs are decided as if they were new.

        Args:
            saved: float64 (n l), the share of the dense FLOPs that leaving out each layer saves each input.
            keep: the budget.

        Raises:
            ConfigError: not even leaving out every layer from the entry on holds the budget.
        """
        worth = saved[self.rows, self.entry :]

        def kept(limit: float) -> float:
            return 1 - float((worth * (self.guessed <= limit)).sum() / len(saved))

        low, high = 0.0, float(self.guessed.max())
        if (least := kept(high)) > keep:
            raise ConfigError(
                f"keep={keep:g}: expected at least {least:.3f}, what remains when every layer from entry={self.entry} "
                "on is left out"
            )
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (low, middle) if kept(middle) <= keep else (middle, high)
        return high

    def policy(self, limit: float, target: Target) -> SkipIt:
        """Return the policy of a limit, to be attached; the target is that of the model that this was found on."""
        policy = SkipIt(limit, self.entry, self.notion, self.delta, Target(**whole_rows(target)))
        return policy.fitted(self.predictor)


@torch.no_grad()
def find_forecast(
    model: RoutedModel,
    batches: Sequence[Batch],
    entry: int = 3,
    notion: Notion = "geometric",
    delta: float = 0.05,
) -> Forecast:
    """Measure a notion of every layer on dense passes, and regress it on that of the layers before the entry.

    Args:
        model: attached, of scope ``prompt``; its target says of which tokens the notion is.
        batches: inputs that nothing is judged by, on the model's device.
        entry: the first layer that may be skipped, at least 1.
        notion: see `SkipIt`.
        delta: of the notion ``proximal``.

    Raises:
        ConfigError: a value that `SkipIt` does not take.
        DataError: fewer than 20 inputs with tokens of the group.

    Example:
        ``forecast = find_forecast(model, batches); forecast.policy(0.02, model.target)``
    """
    SkipIt(1.0, entry, notion, delta, Target(**whole_rows(model.target)))  # refuses what it does not take
    found, notions = [], []
    for batch in batches:
        dense = record(model, batch)
        prompt = batch.prompt_mask & dense.tokens.valid
        vision = dense.tokens.vision if model.target.group == "vision" else None
        tokens = prompt if vision is None else prompt & vision
        entered = dense.entered
        seen = [read_change(entered[i], entered[i + 1], tokens, prompt, notion, delta) for i in range(entry)]
        later = [measure(entered[i], dense.states[i + 1], tokens, notion, delta) for i in range(entry, len(entered))]
        has = tokens.any(1)[:, None]
        found.append(torch.cat([torch.cat(seen, 1), has], 1).double().cpu())
        notions.append(torch.stack(later, 1).double().cpu())
    features, measured = torch.cat(found), torch.cat(notions)
    rows = features[:, -1].nonzero().squeeze(1)
    if len(rows) < 2 * FOLDS:
        raise DataError(
            f"find_forecast: expected at least {2 * FOLDS} inputs with tokens of group {model.target.group!r} to fit "
            f"a regression on, got {len(rows)}"
        )
    predictor, guessed = fit_predictor(features[rows, :-1], measured[rows], FLOOR)
    return Forecast(entry, notion, delta, predictor, rows, measured[rows], guessed)
