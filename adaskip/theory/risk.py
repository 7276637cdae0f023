"""Risk control: the router threshold that may be relied on, how surely, and an alarm for when traffic drifts away.

Learn-then-Test (Angelopoulos et al. 2021) over a threshold path in a fixed order; its use for routers is ours [D].
Losses lie in [0, 1], one an input; inputs are i.i.d. from the traffic that the guarantee speaks of. Everything else is
fixed beforehand: routers, path, loss, risk, delta, and which p-value is used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special, stats

from adaskip.errors import ConfigError, DataError

Array = NDArray[np.float64]

_BETS = 16  # stakes the drift monitor spreads its wealth over


def binomial_pvalue(errors: ArrayLike, n: int, risk: float) -> Array:
    """Return the p-value of "the loss is 1 with probability above `risk`": P(Bin(n, risk) <= errors).

    Bound, exact at the boundary; 0/1 losses only. Broadcasts over `errors`. Raises ConfigError outside 0 < risk < 1 or
    without inputs, DataError on counts outside 0..n.

    >>> round(float(binomial_pvalue(0, 114, 0.02)), 4)
    0.0999
    """
    errors = np.asarray(errors, dtype=np.float64)
    _check_shares(n, risk=risk)
    if not ((errors >= 0) & (errors <= n)).all():
        raise DataError(f"binomial_pvalue: expected 0 to n={n} errors, got {errors.min():g} to {errors.max():g}")
    tails: Array = stats.binom.cdf(errors, n, risk)
    return tails


def hoeffding_bentkus_pvalue(mean_loss: ArrayLike, n: int, risk: float) -> Array:
    """Return the p-value of "the mean of a loss in [0, 1] is above `risk`", from the mean loss of n inputs.

    Bound: min(exp(-n kl(min(mean, risk), risk)), e P(Bin(n, risk) <= ceil(n mean))), kl between two coins; Hoeffding's
    and Bentkus' inequalities (Bates et al. 2021). Broadcasts over `mean_loss`. Raises as `binomial_pvalue`.

    >>> round(float(hoeffding_bentkus_pvalue(0.0, 200, 0.02)), 4)
    0.0176
    """
    mean = np.asarray(mean_loss, dtype=np.float64)
    _check_shares(n, risk=risk)
    if not ((mean >= 0) & (mean <= 1)).all():
        raise DataError(f"hoeffding_bentkus_pvalue: expected means in [0, 1], got {mean.min():g} to {mean.max():g}")
    low = np.minimum(mean, risk)
    hoeffding = np.exp(-n * (special.rel_entr(low, risk) + special.rel_entr(1.0 - low, 1.0 - risk)))
    # n * mean of a sum that was exact may lie a rounding above the integer it was
    bentkus = np.e * stats.binom.cdf(np.ceil(n * mean - 1e-9 * n), n, risk)
    bound: Array = np.minimum(1.0, np.minimum(hoeffding, bentkus))
    return bound


def fixed_sequence(p_values: ArrayLike, delta: float) -> NDArray[np.intp]:
    """Count the leading hypotheses that are rejected, stopping at the first p-value above delta. (..., k) -> (...).

    The chance of a single false rejection is at most delta, whatever the dependence and however long the path (bound).

    >>> int(fixed_sequence([0.01, 0.05, 0.2, 0.01], 0.1))
    2
    """
    count: NDArray[np.intp] = np.cumprod(np.asarray(p_values) <= delta, axis=-1).sum(-1)
    return count


def smallest_sample(risk: float, delta: float) -> int:
    """Return how many inputs without a single error it takes to reject at all: ceil(log delta / log(1 - risk)).

    >>> smallest_sample(0.02, 0.1)
    114
    """
    _check_shares(1, risk=risk, delta=delta)
    return int(np.ceil(np.log(delta) / np.log1p(-risk) - 1e-9))


@dataclass(frozen=True)
class Step:
    """Hold one threshold of the path, tested."""

    threshold: float
    loss: float  # mean over the calibration inputs
    p_value: float


@dataclass(frozen=True)
class Certificate:
    """Certify P(risk of the model at `threshold` <= `risk`) >= 1 - `delta` over calibration draws; None means dense."""

    risk: float
    delta: float
    n: int
    threshold: float | None
    steps: tuple[Step, ...]  # as far as the test went; the last one is the first not rejected, unless the path ended

    def to_dict(self) -> dict[str, Any]:
        """Return it JSON-ready."""
        return {**asdict(self), "steps": [asdict(step) for step in self.steps]}


def learn_then_test(
    path: Sequence[float], losses_at: Callable[[float], ArrayLike], risk: float, delta: float, binary: bool
) -> Certificate:
    """Walk the threshold path until one cannot be rejected; certify the last before it. Calibrated [D].

    Args:
        path: thresholds, conservative to aggressive, fixed before these inputs were seen.
        losses_at: losses (n,) in [0, 1] of the same calibration inputs at a threshold; called only as far as needed.
        risk: tolerated expected loss.
        delta: tolerated chance, over calibration draws, that the risk is larger after all.
        binary: whether the loss can only be 0 or 1, which allows the exact p-value; decided beforehand.

    Raises:
        ConfigError: risk or delta outside (0, 1), or an empty path.
        DataError: too few inputs to reject anything, or losses outside [0, 1], NaN included.

    >>> learn_then_test([0.0, 1.0], lambda t: np.full(200, t), 0.02, 0.1, binary=True).threshold
    0.0
    """
    needed, steps, chosen, n = smallest_sample(risk, delta), [], None, 0
    if not len(path):
        raise ConfigError("learn_then_test: expected at least one threshold, got an empty path")
    for threshold in map(float, path):
        losses = np.asarray(losses_at(threshold), dtype=np.float64)
        n = len(losses)
        if n < needed:
            raise DataError(
                f"risk control: a risk of {risk} at delta {delta} needs at least {needed} inputs, got {n}; "
                "give the calibration split more, or allow a larger risk"
            )
        fits = np.isin(losses, (0.0, 1.0)) if binary else (losses >= 0) & (losses <= 1)
        if not fits.all():
            values = "0 or 1" if binary else "in [0, 1]"
            raise DataError(f"risk control: expected losses {values}, got {losses[~fits][0]} at threshold {threshold}")
        mean = float(losses.mean())
        p = binomial_pvalue(losses.sum(), n, risk) if binary else hoeffding_bentkus_pvalue(mean, n, risk)
        steps.append(Step(threshold, mean, float(p)))
        if p > delta:
            break
        chosen = threshold
    return Certificate(risk, delta, n, chosen, tuple(steps))


def e_process(losses: ArrayLike, risk: float) -> Array:
    """Return the evidence after each audited input that the mean loss exceeds `risk`. (..., t) in [0, 1] -> (..., t).

    While E[L_t | past] <= risk it ever exceeds 1/delta with probability <= delta (bound; Ville 1939):

        E_t = 1/(t+1) + sum_{k<=t} 1/(k(k+1)) mean_lambda prod_{i=k..t} (1 + lambda (L_i - risk))

    each product is a test martingale that starts betting at input k with a stake lambda < 1/risk; mixing over k keeps
    the power when drift sets in late, over lambda when its size is unknown. Raises DataError on losses outside [0, 1].

    >>> e = e_process([0.0] * 50 + [1.0] * 5, 0.02)
    >>> bool(e[49] < 2), bool(e[54] > 100)
    (True, True)
    """
    losses = np.asarray(losses, dtype=np.float64)
    state, evidence = _start(losses.shape[:-1]), np.empty_like(losses)
    for t in range(losses.shape[-1]):
        state = _bet(state, losses[..., t], t + 1, risk)
        evidence[..., t] = np.exp(_log_evidence(state, t + 1))
    return evidence


class DriftMonitor:
    """Watch the losses of randomly audited traffic, and alarm once they are too high for the certified risk.

    Args:
        risk: the certified risk.
        delta: chance of ever alarming although the mean loss of each input given the past stays within `risk` (bound).

    Audit a random share of the traffic: choosing inputs by what the model answered breaks the guarantee.

    >>> monitor = DriftMonitor(risk=0.02, delta=0.1)
    >>> [monitor.update(loss) for loss in (0, 0, 1, 0, 1, 0)]
    [False, False, False, False, True, True]
    """

    def __init__(self, risk: float, delta: float) -> None:
        _check_shares(1, risk=risk, delta=delta)
        self.risk, self.delta, self.n, self.alarm = risk, delta, 0, False
        self._state = _start(())

    def update(self, loss: float) -> bool:
        """Count one audited input; returns whether there is, or has been, an alarm.

        Raises DataError on a loss outside [0, 1].
        """
        self._state = _bet(self._state, np.asarray(float(loss)), self.n + 1, self.risk)
        self.n += 1
        self.alarm = self.alarm or self.evidence >= 1.0 / self.delta
        return self.alarm

    @property
    def evidence(self) -> float:
        """Return the e-process: 1 before the first input; alarm at 1/delta."""
        return float(np.exp(_log_evidence(self._state, self.n)))


def _start(shape: tuple[int, ...]) -> Array:
    return np.full((*shape, _BETS), -np.inf)


def _bet(state: Array, loss: Array, t: int, risk: float) -> Array:
    """Return the log wealth of each stake, summed over the starts so far: joined by the start at t, then multiplied."""
    if not ((loss >= 0) & (loss <= 1)).all():
        raise DataError(f"drift monitor: expected a loss in [0, 1], got {loss}")
    stakes = np.geomspace(0.1, 0.95 / risk, _BETS)
    bets: Array = np.logaddexp(state, -np.log(t * (t + 1.0))) + np.log1p(stakes * (loss[..., None] - risk))
    return bets


def _log_evidence(state: Array, t: int) -> Array:
    evidence: Array = np.logaddexp(special.logsumexp(state, axis=-1) - np.log(_BETS), -np.log(t + 1.0))
    return evidence


def _check_shares(n: int, **shares: float) -> None:
    for name, value in shares.items():
        if not 0 < value < 1:
            raise ConfigError(f"{name}: expected a number in (0, 1), got {value}")
    if n < 1:
        raise DataError(f"risk control: expected at least one input, got {n}")
