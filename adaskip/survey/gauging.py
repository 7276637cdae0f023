"""Calibrate the gauge of a model's decisions: what a routed pass tells of its own cost."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from adaskip.batch import Batch
from adaskip.runtime.attach import RoutedModel
from adaskip.survey.record import record
from adaskip.theory.bounds import kl_exact
from adaskip.theory.gauge import Gauge, Outcome, calibrate_gauge, describe_outcome

_AT_ONCE = 64
"""Predicted tokens that are compared at once, so that no second copy of all logits is made."""


def gauge_routing(model: RoutedModel, batches: Sequence[Batch], alpha: float) -> Gauge | None:
    """Calibrate a gauge of a model's current decisions; costs a dense and a routed pass a batch.

    Args:
        model: as its policy, its threshold and its held layers decide.
        batches: prompts with answers, on the model's device, that neither policy nor threshold was fitted on.
        alpha: miscoverage.

    Returns:
        None where there are too few inputs, or nothing to read: see `calibrate_gauge`.
    """
    return calibrate_gauge(*observe(model, batches), alpha)


@torch.no_grad()
def observe(model: RoutedModel, batches: Sequence[Batch]) -> tuple[Outcome, Tensor]:
    """Make a dense and a routed pass of each batch; return what the routed ones show, and each token's exact KL (k)."""
    outcomes, kl = [], []
    for batch in batches:
        dense = record(model, batch, states=False)
        routed = record(model, batch, routed=True, states=False)
        outcome = describe_outcome(routed.logits, batch.supervised, model.routing.keep_rate)
        outcomes.append(Outcome(outcome.tokens.cpu(), outcome.counts.cpu()))
        pairs = zip(dense.logits.split(_AT_ONCE), routed.logits.split(_AT_ONCE), strict=True)
        kl += [kl_exact(before, after).double().cpu() for before, after in pairs]
    return Outcome.join(outcomes), torch.cat(kl)
