"""Calibrate the gauge of a model's decisions: what a routed pass tells of its own cost."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from adaskip.batch import Batch
from adaskip.runtime.attach import RoutedModel
from adaskip.survey.record import record
from adaskip.theory.gauge import Gauge, calibrate_gauge, describe_outcome


@torch.no_grad()
def gauge_routing(model: RoutedModel, batches: Sequence[Batch], alpha: float) -> Gauge | None:
    """Calibrate a gauge of a model's current decisions; costs a dense and a routed pass a batch.

    Args:
        model: as its policy, its threshold and its held layers decide.
        batches: prompts with answers, on the model's device, that neither policy nor threshold was fitted on.
        alpha: miscoverage.

    Returns:
        None where there are too few inputs, or nothing to read: see `calibrate_gauge`.
    """
    features, kl = [], []
    for batch in batches:
        dense = record(model, batch, states=False)
        routed = record(model, batch, routed=True, states=False)
        keep = model.routing.keep_rate
        features.append(describe_outcome(routed.logits, batch.supervised, batch.prompt_mask, keep).cpu())
        kl.append(dense.compare(routed.logits)["kl"].double().cpu())
    return calibrate_gauge(torch.cat(features), torch.cat(kl), alpha)
