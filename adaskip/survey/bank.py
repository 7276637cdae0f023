"""Find a bank of paths, and what tells from a prompt which of them costs it least.

    price every layer alone          one greedy plan for all          groups of inputs that find the same layers dear
                                     -> the first path                -> a greedy plan for each
    price all paths on all inputs    every input moves to its cheapest path, every path is planned anew for its inputs
    regress the prices on prompts    cross-fitted; kept only where choosing by it is cheaper than the first path alone

Every price is exact: the mean KL of the routed model from the dense one over an input's answer. No gradient is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.cluster import KMeans
from sklearn.linear_model import RidgeCV
from sklearn.model_selection import KFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from adaskip.batch import Batch
from adaskip.errors import ConfigError, DataError
from adaskip.plan import Target
from adaskip.policies.path_bank import PathBank, describe_prompt
from adaskip.runtime.attach import RoutedModel
from adaskip.stages import SILENT, Stages
from adaskip.survey.greedy import Path, Price, exact_prices, greedy_paths
from adaskip.survey.record import record
from adaskip.survey.skips import measure_skips

_FOLDS = 10
_CLEAR = 1.645
"""Standard errors by which choosing must pay."""
_FEWEST = 4
"""A group of fewer inputs than this gets no path of its own."""


@dataclass(frozen=True)
class Bank:
    """Hold paths, what they cost the inputs that they were found on, and a predictor of that."""

    paths: tuple[Path, ...]  # the first is the best found for all inputs together
    costs: Tensor  # float64 (n k)
    entry: int
    centre: Tensor  # float32 (f): the mean features
    weight: Tensor  # float32 (f k); all 0 where predicting did not pay
    bias: Tensor  # float32 (k)
    chosen: Tensor  # long (n): the path that each input takes, by a predictor that was fitted without it

    @property
    def figures(self) -> dict[str, float]:
        """Return mean costs, nats per predicted token: of the ``first`` path, as ``chosen``, and at ``best``."""
        taken = self.costs.gather(1, self.chosen[:, None])
        means = {"first": self.costs[:, 0], "chosen": taken, "best": self.costs.amin(1)}
        return {name: float(values.mean()) for name, values in means.items()}

    def policy(self, target: Target | None = None) -> PathBank:
        """Return the policy; attach it, and `load` the predictor into it."""
        return PathBank(self.paths, self.entry, target)

    def load(self, policy: PathBank) -> None:
        """Give an attached policy of these paths the predictor."""
        policy.load_state_dict({"centre": self.centre, "weight": self.weight, "bias": self.bias})


def find_bank(
    model: RoutedModel,
    batches: Callable[[Sequence[int]], Sequence[Batch]],
    inputs: int,
    *,
    skips: int,
    paths: int = 8,
    entry: int = 3,
    width: int = 8,
    rounds: int = 1,
    seed: int = 0,
    stages: Stages = SILENT,
) -> Bank:
    """Find paths that leave out ``skips`` layers each, and how to choose among them.

    Costs a `measure_skips` of the inputs and, for every layer left out, about ``width`` plans on them; twice that with
    one round.

    Args:
        model: attached, of scope ``prompt``; whatever decides in it, only its execution is used.
        batches: makes batches, on the model's device, of inputs given by number, in that order.
        inputs: how many there are; nothing else is fitted on them.
        skips: layers that every path leaves out.
        paths: at most so many.
        entry: no path leaves out an earlier layer; the choice falls before this one.
        width: candidates tried for each further layer, those that cost least so far.
        rounds: how often inputs move to their cheapest path and paths are planned anew.
        seed: of the first groups.
        stages: hears what is under way.

    Raises:
        ConfigError: fewer layers behind the entry than are to be left out.
        DataError: too few inputs to fit a predictor on.
    """
    layers = len(model.spec.layers)
    if not 0 < skips <= layers - entry:
        raise ConfigError(
            f"find_bank: skips: expected 1 to {layers - entry}, as many as stand behind entry={entry}, got {skips}"
        )
    if inputs < 2 * _FOLDS:
        raise DataError(f"find_bank: expected at least {2 * _FOLDS} inputs to fit a predictor on, got {inputs}")
    everyone = range(inputs)

    price = exact_prices(model, batches)
    with stages(f"pricing {layers - entry} layers on {inputs} inputs", inputs) as advance:
        table = measure_skips(model, batches(everyone), range(entry, layers), progress=advance).kl.double()
    single = torch.cat([torch.full((inputs, entry), torch.inf, dtype=torch.float64), table], 1)
    found, costs = find_paths(price, single, skips, paths, width, rounds, seed, stages)
    with stages("fitting the predictor"):
        features = torch.cat([_features(model, batch, entry) for batch in batches(everyone)])
        centre, weight, bias, chosen = fit_predictor(features, costs)
    return Bank(found, costs, entry, centre, weight, bias, chosen)


def find_paths(
    price: Price, single: Tensor, skips: int, count: int, width: int, rounds: int, seed: int, stages: Stages = SILENT
) -> tuple[tuple[Path, ...], Tensor]:
    """Find at most ``count`` paths of ``skips`` layers, the best for all first, and price them on all inputs (n k).

    Args:
        price: what paths cost inputs.
        single: float64 (n l), what leaving out one layer costs each input; inf where that is not allowed.
        skips, count, width, rounds, seed, stages: as in `find_bank`.
    """
    everyone = range(len(single))
    with stages(f"planning {skips} layers for all inputs"):
        paths = [greedy_paths(price, everyone, single.mean(0), skips, width)[-1][0]]
    owners = _group(single, count - 1, seed) if count > 1 else torch.zeros(len(single)).long()
    for _ in range(1 + rounds if count > 1 else 0):
        with stages(f"planning {skips} layers for {len(owners.unique())} groups of inputs"):
            for owner in owners.unique().tolist():
                rows = (owners == owner).nonzero().flatten()
                if len(rows) >= _FEWEST:
                    paths.append(greedy_paths(price, rows.tolist(), single[rows].mean(0), skips, width)[-1][0])
        paths = [*dict.fromkeys(paths)]
        costs = price(paths, everyone)
        best = _choose(costs, count)
        paths, costs = [paths[index] for index in best], costs[:, best]
        owners = costs.argmin(1)
    return tuple(paths), costs if count > 1 else price(paths, everyone)


def fit_predictor(features: Tensor, costs: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Regress costs (n k) on features (n f) by ridge; return centre (f), weight (f k), bias (k) and choices (n).

    What is regressed is a path's cost beside the mean of all paths: how dear an input is altogether chooses nothing,
    and varies most. The choices are cross-fitted: each input's by a predictor that did not see it. Unless they cost
    clearly less than the first path for all (one-sided, 95 %), the weights are 0 and the first path is everybody's.
    """
    x = features.double().numpy()
    beside = (costs - costs.mean(1, keepdim=True)).double().numpy()
    centre, scale = x.mean(0), x.std(0).clip(1e-6)
    ridge = make_pipeline(StandardScaler(), RidgeCV(alphas=np.logspace(0, 5, 11)))
    guessed = cross_val_predict(ridge, x, beside, cv=KFold(_FOLDS, shuffle=True, random_state=0))
    chosen = torch.from_numpy(guessed.reshape(len(x), -1)).argmin(1)
    slopes, level = np.zeros((x.shape[1], costs.shape[1])), np.ones(costs.shape[1])
    gain = costs[:, 0] - costs.gather(1, chosen[:, None])[:, 0]
    if gain.mean() > _CLEAR * gain.std() / len(gain) ** 0.5:
        fitted = RidgeCV(alphas=np.logspace(0, 5, 11)).fit((x - centre) / scale, beside)
        slopes, level = fitted.coef_.T / scale[:, None], fitted.intercept_
    else:
        chosen, level[0] = torch.zeros(len(x)).long(), 0.0
    weight, bias = torch.from_numpy(slopes).float(), torch.from_numpy(level).float()
    return torch.from_numpy(centre).float(), weight, bias, chosen


def _group(single: Tensor, count: int, seed: int) -> Tensor:
    """Group inputs that find the same layers dear, whatever their level: long (n)."""
    allowed = single[:, single.isfinite().all(0)]
    levels = (allowed + 1e-4).log()
    means = KMeans(min(count, len(single)), n_init=10, random_state=seed)
    return torch.from_numpy(means.fit_predict((levels - levels.mean(1, keepdim=True)).numpy())).long()


def _choose(costs: Tensor, count: int) -> list[int]:
    """Choose paths (columns) so that the inputs' cheapest among them cost least: the first, then greedily."""
    chosen = [0]
    while len(chosen) < min(count, costs.shape[1]):
        best = torch.minimum(costs[:, chosen].amin(1, keepdim=True), costs).mean(0)
        best[chosen] = torch.inf
        chosen.append(int(best.argmin()))
    return chosen


@torch.no_grad()
def _features(model: RoutedModel, batch: Batch, entry: int) -> Tensor:
    recorded = record(model, batch)
    return describe_prompt(recorded.entered[entry], batch.prompt_mask & recorded.tokens.valid).cpu()
