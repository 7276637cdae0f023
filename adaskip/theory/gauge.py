"""Read off a routed pass alone what its skips cost: KL(dense || routed), told token by token from its logits.

B prices decisions before they are carried out. A gauge reads their outcome: where skips have done harm the routed
prediction is less sure, and how much that means depends on what is predicted. This is regressed on inputs for which
the dense pass was made as well. A fresh input needs no dense pass. The prediction is an estimator; its factor is
calibrated (split conformal):

    P(KL(dense || routed) <= factor * predicted) >= 1 - alpha

over a fresh input exchangeable with the calibration inputs [D]. It holds for the decisions that it was calibrated for:
another threshold or other held layers void it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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
from adaskip.theory.sureness import token_sureness

_FLOOR = 1e-4
"""Nats below which the costs of a token are all the same to a gauge."""
_SMALL = 1e-6
_FITTED = 5
"""Inputs that a gauge is fitted on at least."""
_SCORED_EVERY = 3
"""Of the inputs one in so many calibrates the factor, or more where alpha needs more; the others fit."""
_MOST = 4096
"""Predicted tokens that a gauge is fitted on at most."""
SURE, SKETCH = 4, 512
"""Numbers of a token that say how sure its prediction is, and that stand for what is predicted."""
NUMBERS = SURE + SKETCH
_AT_ONCE = 64
"""Predicted tokens that are projected at once, so that no second copy of all logits is made."""
_RATE = 3
"""Which of a token's numbers is the keep rate of its input."""
_NINE = 9
"""Numbers that the first gauges read, of a whole input."""
_GOLDEN = 0x9E3779B1
"""Multiplied by a label's number it gives 32 bits that are spread evenly: Knuth's multiplicative hash."""


@dataclass(frozen=True)
class Outcome:
    """Hold what routed passes show of their predicted tokens."""

    tokens: Tensor  # float64 (k 516), row by row: see `describe_outcome`
    counts: Tensor  # long (b): how many of them each input has

    @classmethod
    def join(cls, parts: Sequence[Outcome]) -> Outcome:
        """Return several as one."""
        return cls(torch.cat([part.tokens for part in parts]), torch.cat([part.counts for part in parts]))

    def mean(self, values: Tensor) -> Tensor:
        """Return each input's mean (b) of values of its tokens (k)."""
        rows = torch.repeat_interleave(
            torch.arange(len(self.counts), device=values.device), self.counts.to(values.device)
        )
        total = torch.zeros(len(self.counts), dtype=values.dtype, device=values.device).index_add_(0, rows, values)
        return total / self.counts.to(values).clamp(min=1)

    @property
    def whole(self) -> Tensor:
        """Return bool (b): inputs whose pass is the dense one, as it left nothing out; adapters' FLOPs would show."""
        return self.mean((self.tokens[:, _RATE] == 1).double()) == 1

    def select(self, inputs: Tensor) -> Outcome:
        """Return that of some inputs, bool (b)."""
        inputs = inputs.to(self.counts.device)
        return Outcome(self.tokens[torch.repeat_interleave(inputs, self.counts)], self.counts[inputs])


def describe_outcome(logits: Tensor, supervised: Tensor, keep: Tensor) -> Outcome:
    """Describe routed passes: of each predicted token 516 numbers.

    Logs of entropy and of the probability beside the top label, the top label's lead, the input's keep rate; then the
    direction of a fixed projection of the logits, in which every label adds to one of 512 sums or takes from it. The
    logits are linear in the state behind the last layer, so this stands for it, whatever the model calls it.

    Args:
        logits: (k v) of a routed pass at the predicted tokens, row by row.
        supervised: bool (b t-1), where these are.
        keep: (b) executed over dense decoder FLOPs.
    """
    counts = supervised.sum(1)
    sure = token_sureness(logits)
    sure[:, :2] = (sure[:, :2] + _SMALL).log()
    rate = torch.repeat_interleave(keep.double().to(counts.device), counts)
    return Outcome(torch.cat([sure, rate[:, None].to(sure), _sketch(logits)], 1), counts)


def _sketch(logits: Tensor) -> Tensor:
    """Return float64 (k 512): the direction of the projection."""
    hashed = (torch.arange(logits.shape[-1], device=logits.device) * _GOLDEN) % 2**32
    place, sign = hashed >> 23, ((hashed >> 22) & 1) * 2 - 1
    sums = torch.zeros(len(logits), SKETCH, dtype=torch.float64, device=logits.device)
    for part, found in zip(logits.split(_AT_ONCE), sums.split(_AT_ONCE), strict=True):
        inside = part > -torch.inf  # of the vocabulary
        known = torch.where(inside, part, 0.0).double()
        centre = known.sum(-1, keepdim=True) / inside.sum(-1, keepdim=True).clamp(min=1)
        found.index_add_(1, place, torch.where(inside, known - centre, 0.0) * sign)
    length: Tensor = torch.linalg.vector_norm(sums, dim=1, keepdim=True)
    return sums / length.clamp_min(_SMALL)


@dataclass(frozen=True)
class Gauge:
    """Predict from a routed pass's logits what its skips cost the input, in nats per predicted token."""

    centre: tuple[float, ...]  # 516: of `describe_outcome`
    weight: tuple[float, ...]  # 516: of the logarithm of a token's cost
    bias: float
    factor: float  # calibrated
    alpha: float  # miscoverage of factor * prediction
    scored: int  # inputs that calibrated the factor

    def predict(self, outcome: Outcome) -> Tensor:
        """Return the predicted costs (b), means over an input's tokens: an estimator.

        What left nothing out costs nothing; a millionth stands for it, beside which rounding is little.
        """
        table = (torch.tensor(values, dtype=torch.float64) for values in (self.centre, self.weight, (self.bias,)))
        centre, weight, bias = table
        costs = outcome.mean(Predictor(centre, weight[:, None], bias)(outcome.tokens)[:, 0])
        return torch.where(outcome.whole, _SMALL, costs)

    def bound(self, outcome: Outcome) -> Tensor:
        """Return what the skips cost at most, (b) nats, each with probability >= 1 - alpha."""
        return self.factor * self.predict(outcome)

    def read(self, logits: Tensor, supervised: Tensor, keep: Tensor) -> Tensor:
        """Return `bound` (b) of a routed pass.

        Args:
            logits: (b t v) of the pass.
            supervised: bool (b t-1): whether the token after each place counts, of an answer or of what was generated.
            keep: (b), ``model.routing.keep_rate``.
        """
        return self.bound(describe_outcome(logits[:, :-1][supervised], supervised, keep))

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
        if {len(gauge.centre), len(gauge.weight)} != {NUMBERS} or not all(map(math.isfinite, every)):
            raise ValueError(f"expected {NUMBERS} finite numbers in centre and weight, and a finite bias and factor")
        if not (0 < gauge.alpha < 1 and gauge.factor >= 0 and gauge.scored >= smallest_sample(gauge.alpha)):
            raise ValueError(f"alpha={gauge.alpha:g}, factor={gauge.factor:g}, scored={gauge.scored} do not fit")
        return gauge


def stored_gauge(stored: Mapping[str, Any] | None) -> Gauge | None:
    """Read what a checkpoint holds: None where it holds none, or one of nine numbers, as they were at first.

    Raises:
        ValueError: it is damaged.
    """
    if stored is None or len(stored.get("centre") or ()) == _NINE:
        return None
    return Gauge.from_dict(stored)


def fewest_to_gauge(alpha: float) -> int:
    """Return how many inputs a gauge needs.

    >>> fewest_to_gauge(0.1)
    14
    """
    return smallest_sample(alpha) + _FITTED


def calibrate_gauge(outcome: Outcome, kl: Tensor, alpha: float) -> Gauge | None:
    """Fit a gauge on some inputs, and calibrate its factor on the others.

    Args:
        outcome: of the inputs' routed passes.
        kl: (k) exact KL(dense || routed) of each predicted token, nats.
        alpha: miscoverage.

    Returns:
        None where inputs are too few, their figures are not finite, or no skip costs anything.
    """
    count, costs = len(outcome.counts), outcome.mean(kl)
    finite = bool(outcome.tokens.isfinite().all() and kl.isfinite().all())
    if count < fewest_to_gauge(alpha) or not finite:
        return None
    scored = spread_over(max(smallest_sample(alpha), count // _SCORED_EVERY), count)
    fitted = torch.repeat_interleave(~scored & ~outcome.whole, outcome.counts)
    tokens, paid = outcome.tokens[fitted], kl[fitted]
    if not (paid > 0).any():
        return None
    chosen = spread_over(min(_MOST, len(paid)), len(paid))
    found, _ = fit_predictor(tokens[chosen], paid[chosen, None], _FLOOR, (SURE, SKETCH))
    centre, weight = tuple(found.centre.tolist()), tuple(found.weight[:, 0].tolist())
    raw = Gauge(centre, weight, float(found.bias), 1.0, alpha, int(scored.sum()))
    factor = float(conformal_quantile(safe_ratio(costs[scored], raw.predict(outcome.select(scored))), alpha))
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


def judge_gauge(gauge: Gauge, predicted: Tensor, kl: Tensor) -> Reading:
    """Hold what a gauge predicted (b) against the exact costs (b) of inputs that it has not seen."""
    kl, bound = kl.double().cpu(), gauge.factor * predicted.double().cpu()
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
