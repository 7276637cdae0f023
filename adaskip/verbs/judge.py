"""Judge a policy that took no gradient on validation data: what it keeps, costs, and gets right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adaskip.batch import Batch
from adaskip.runtime.attach import RoutedModel
from adaskip.survey.record import record
from adaskip.training.keep_rates import KeepByKind


@dataclass(frozen=True)
class Judgement:
    """Hold means over inputs, and how often each layer runs."""

    figures: dict[str, float]  # kl (nats per predicted token), keep, accuracy
    rates: dict[str, list[float]]  # kind of input -> keep rate of each layer


@torch.no_grad()
def judge(model: RoutedModel, batches: Sequence[Batch]) -> Judgement:
    """Run batches, on the model's device, densely and as the policy decides."""
    kinds = sorted({str(kind) for batch in batches for kind in batch.kind if kind not in (None, "")})
    rates = KeepByKind(len(model.sites), kinds)
    columns: dict[str, list[Tensor]] = {"kl": [], "keep": [], "accuracy": []}
    for batch in batches:
        dense = record(model, batch, states=False)
        routed = record(model, batch, routed=True, states=False)
        columns["keep"].append(model.routing.keep_rate)
        columns["kl"].append(dense.compare(routed.logits)["kl"])
        columns["accuracy"].append(dense.match(routed.logits))
        rates.update(model.routing.share, batch.kind)
    figures = {name: float(torch.cat(values).double().mean()) for name, values in columns.items()}
    return Judgement(figures, {kind: row.tolist() for kind, row in rates.compute().items()})
