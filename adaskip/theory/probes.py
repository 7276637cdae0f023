"""Informational redundancy [P], what a layer adds that a reader can use: cross-fitted probes, and entropy of codes."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from adaskip.errors import DataError
from adaskip.theory.bounds import fano
from adaskip.theory.intervals import Interval, bootstrap_mean

_PER_CELL = 10  # samples that each cell of a K x K table must rest on


def probe_loss(states: Tensor, labels: Tensor, folds: int = 5, penalty: float = 1.0, seed: int = 0) -> Tensor:
    """Return the out-of-fold log loss of a linear probe, nats per input: its mean estimates H_V(Y | H) from above.

    V: multinomial logistic regression on standardised states with an L2 penalty. Every input is scored by a probe that
    was fitted on other folds (cross-fitting), so over-fitting cannot pass for information. Label classes with fewer
    members than folds cannot be cross-fitted and are left out: their inputs get NaN. (n d), long (n) -> float64 (n).

    Args:
        states: one pooled state per input.
        labels: what is to be read off them.
        folds: of the cross-fitting, stratified.
        penalty: inverse strength of the L2 penalty (scikit-learn's C).
        seed: of the folds.

    Raises:
        DataError: fewer than two classes with enough members, or states that are not finite.
    """
    if not states.isfinite().all():
        raise DataError(f"probe: expected finite states, got {int((~states.isfinite()).sum())} values that are not")
    if len(states) != len(labels):
        raise DataError(f"probe: expected one label per state, got {len(labels)} labels for {len(states)} states")
    y = labels.cpu().numpy()
    names, counts = np.unique(y, return_counts=True)
    usable = np.isin(y, names[counts >= folds])
    if len(set(y[usable])) < 2:
        seen = ", ".join(f"{name} x {count}" for name, count in zip(names[:8], counts, strict=False))
        raise DataError(
            f"probe: expected at least two labels with {folds} inputs each, got {seen}; give more inputs or other data"
        )
    x = states.double().cpu().numpy()
    rows = np.flatnonzero(usable)
    loss = np.full(len(y), np.nan)
    splits = StratifiedKFold(folds, shuffle=True, random_state=seed)
    for fit, score in splits.split(x[rows], y[rows]):
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=penalty, max_iter=300))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # an early stop is another, still honest, reader
            probe.fit(x[rows[fit]], y[rows[fit]])
        log_p = probe.predict_log_proba(x[rows[score]])
        columns = np.searchsorted(probe.classes_, y[rows[score]])
        loss[rows[score]] = -np.maximum(log_p[np.arange(len(score)), columns], -700.0)
    return torch.from_numpy(loss)


def usable_information_lost(loss_skipped: Tensor, loss_full: Tensor, level: float = 0.95) -> Interval:
    """Estimate H_V(Y | H') - H_V(Y | H), nats: how much worse a probe reads Y when the layer is skipped [D].

    From `probe_loss` of the states before the layer (what a skip hands on) and after it; the interval is over inputs,
    paired, given the fitted probes. Negative where the layer makes Y harder to read. A linear probe is not the
    network's own suffix, so the functional cost does not bound it (link 4). Raises DataError when no input has both.
    """
    both = loss_skipped.isfinite() & loss_full.isfinite()
    if not both.any():
        raise DataError("usable_information_lost: expected losses of the same inputs, got none")
    return bootstrap_mean((loss_skipped - loss_full)[both], level)


@dataclass(frozen=True)
class CodeEntropy:
    """Hold the uncertainty of a layer's code given the code before it, for one codebook size."""

    codes: int  # K
    entropy: float  # plug-in H(Q_l | Q_{l-1}), nats; biased low by about (K - 1)^2 / 2n
    low: float  # bootstrap interval over inputs, quantiser fixed
    high: float
    changed: float  # share of samples whose code changes, P_e
    fano: float  # h_b(P_e) + P_e log(K - 1): bounds `entropy`
    n: int  # samples


def conditional_entropy(before: Tensor, after: Tensor, codes: int) -> float:
    """Estimate H(Q' | Q), nats, of two long (n) code sequences in 0..codes-1: plug-in, biased low.

    >>> round(conditional_entropy(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 1, 1]), 2), 4)
    0.3466
    """
    joint = torch.bincount(before * codes + after, minlength=codes**2).double().view(codes, codes) / len(before)
    return (torch.xlogy(joint.sum(1), joint.sum(1)).sum() - torch.xlogy(joint, joint).sum()).clamp_min(0.0).item()


def code_entropy(
    before: Tensor, after: Tensor, codes: int, level: float = 0.95, resamples: int = 200, seed: int = 0
) -> CodeEntropy:
    """Estimate H(Q_l | Q_{l-1}) under one k-means quantiser of both layers, beside Fano's bound [D, link 5].

    The quantiser is fitted on both layers' states together, so that an unchanged state keeps its code. Estimator: the
    plug-in entropy is biased low and depends on K, hence sweep K. The interval resamples inputs, the quantiser fixed.
    Fano's bound holds exactly for the plug-in figures.

    Args:
        before: (n m d) m states of each of n inputs, before the layer.
        after: (n m d) the same states after it.
        codes: K >= 2.
        level: of the interval.
        resamples: of the bootstrap.
        seed: of k-means and the bootstrap.

    Raises:
        DataError: fewer than 10 K^2 samples, or states that are not finite.
    """
    n, m = before.shape[:2]
    if before.shape != after.shape or codes < 2:
        raise DataError(
            f"code_entropy: expected states of one shape and K >= 2, got {tuple(before.shape)}, "
            f"{tuple(after.shape)} and K={codes}"
        )
    if n * m < _PER_CELL * codes**2:
        raise DataError(
            f"code_entropy: K={codes} codes need at least {_PER_CELL} K^2 = {_PER_CELL * codes**2} states, "
            f"got {n * m}; give more inputs or fewer codes"
        )
    states = torch.cat([before.flatten(0, 1), after.flatten(0, 1)]).float().cpu()
    if not states.isfinite().all():
        raise DataError("code_entropy: expected finite states, got NaN or infinity")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct states than codes
        assigned = KMeans(codes, n_init=3, random_state=seed).fit_predict(states.numpy())
    first, second = torch.from_numpy(assigned).long().view(2, n, m)
    draw = torch.Generator().manual_seed(seed)
    again = []
    for _ in range(resamples):
        rows = torch.randint(n, (n,), generator=draw)
        again.append(conditional_entropy(first[rows].flatten(), second[rows].flatten(), codes))
    tail = (1.0 - level) / 2.0
    low, high = np.quantile(again, [tail, 1.0 - tail])
    changed = (first != second).double().mean().item()
    bound = fano(changed, codes).item()
    entropy = conditional_entropy(first.flatten(), second.flatten(), codes)
    return CodeEntropy(codes, entropy, min(float(low), entropy), max(float(high), entropy), changed, bound, n * m)


def sizes_for(samples: int, sizes: tuple[int, ...] = (2, 4, 8, 16, 32)) -> tuple[int, ...]:
    """Return the codebook sizes that so many samples can carry (n >= 10 K^2).

    >>> sizes_for(1000)
    (2, 4, 8)
    """
    return tuple(k for k in sizes if k <= math.isqrt(samples // _PER_CELL))
