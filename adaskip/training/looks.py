"""The record of one look at the routers during training: what their decisions cost together, and which too much."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from adaskip.batch import Batch
from adaskip.runtime.attach import RoutedModel
from adaskip.runtime.gates import hard
from adaskip.sites import Label, Unit, label_site
from adaskip.survey.dense_costs import SkipCosts
from adaskip.theory.conditions import Finding, Findings, Joint, SkipFinding
from adaskip.theory.costs import compare_predicted, predicted
from adaskip.theory.gauge import Reading, describe_outcome
from adaskip.training.alarms import Alarm, Routers


@dataclass(frozen=True)
class Look:
    """Hold what one check of the conditions has found."""

    step: int
    group: str
    tolerance: float
    findings: Findings
    joint: Joint
    skips: dict[int, SkipFinding]  # of each layer that the routers leave out, on the inputs for which they do
    held: tuple[int, ...] = ()  # layers that were forced to keep when looking
    routers: Routers | None = None  # how much decisions depend on the input; None where no logits tell
    alarms: tuple[Alarm, ...] = ()  # what shows that routers have collapsed
    gauge: Reading | None = None  # what the model's gauge, if it has one, told of these inputs
    together: Reading | None = None  # the geometric mean of B and what the gauge predicts, calibrated as B is
    unit: Unit = "block"  # what every layer above is: a layer, or a half of one

    @property
    def violations(self) -> dict[int, SkipFinding]:
        """Return the layers whose skips clearly cost more than they may; held layers are not skipped, so left out."""
        costly = {layer: skip for layer, skip in self.skips.items() if skip.verdict == "inadmissible"}
        return {layer: skip for layer, skip in costly.items() if layer not in self.held}

    def label(self, site: int) -> Label:
        """Return what a layer, or a half of one, is called."""
        return label_site(self.unit, site)

    def to_dict(self) -> dict[str, Any]:
        """Return a line of ``conditions.jsonl``, JSON-ready; layers, or halves of them, by name."""
        return {
            "step": self.step,
            "group": self.group,
            "tolerance": self.tolerance,
            "findings": [self._named(row) for row in self.findings.rows],
            "layers": {str(self.label(layer)): verdict for layer, verdict in self.findings.layers.items()},
            "rank_correlation": self.findings.rank_correlation,
            "joint": self.joint.to_dict(),
            "skips": [self._named(skip) | {"rows": [*map(self._named, skip.rows)]} for skip in self.skips.values()],
            "held": [self.label(layer) for layer in self.held],
            "routers": None if self.routers is None else asdict(self.routers),
            "alarms": [alarm.to_dict() for alarm in self.alarms],
            "gauge": None if self.gauge is None else self.gauge.to_dict(),
            "together": None if self.together is None else self.together.to_dict(),
        }

    def _named(self, found: Finding | SkipFinding) -> dict[str, Any]:
        return found.to_dict() | {"layer": self.label(found.layer)}


class DenseLogits:
    """Keep the dense logits at the predicted tokens of batches that every look reads again.

    The backbone is frozen, so the logits of each batch are computed once and kept on its device, as long as they fit in
    ``limit`` bytes; those that do not fit are computed at every look.

    Args:
        limit: bytes to keep at most; 2**28 hold 128 answers of 7 tokens at a vocabulary of 150,000 in bfloat16.
    """

    def __init__(self, limit: int = 2**28) -> None:
        self.limit = limit
        self._memory: dict[int, Tensor] = {}

    @torch.no_grad()
    def __call__(self, model: RoutedModel, index: int, batch: Batch) -> Tensor:
        """Return the logits (k v) of the batch with this index; see `predicted`."""
        if index in self._memory:
            return self._memory[index]
        with model.dense():
            logits = model(**batch.arguments()).logits
        dense = predicted(logits, batch.supervised)
        if dense.nbytes + sum(x.nbytes for x in self._memory.values()) <= self.limit:
            self._memory[index] = dense
        return dense


@torch.no_grad()
def joint_cost(
    model: RoutedModel, batches: Iterable[Batch], costs: SkipCosts, dense: DenseLogits | None = None
) -> dict[str, Tensor]:
    """Measure what the routers' decisions cost each input: exact ``kl`` (n), predicted ``bound`` (n), ``keep`` (l n).

    ``requested`` (l n) is what the routers would do if no layer were held, ``logits`` (l n) are theirs, where the
    policy has any, and under scope token the means over an input's tokens; ``told`` (n) is what the model's gauge, if
    it has one, predicts off the routed passes. Under scope token an input counts as keeping a layer if most of its
    tokens do (a heuristic), and its bound is computed from the share of them that skip.

    Args:
        model: with frozen or current routers.
        batches: prompts with answers.
        costs: of `price_inputs`, for the same inputs in the same order.
        dense: the memory of the same batches; None: they are looked at once.
    """
    dense = dense or DenseLogits(limit=0)
    kl, keep, requested, logits, told = [], [], [], [], []
    for index, batch in enumerate(batches):
        before, supervised = dense(model, index, batch), batch.supervised
        routed = predicted(model(**batch.arguments()).logits, supervised)
        kl.append(compare_predicted(before, routed, supervised)["kl"].cpu())
        routing = model.routing
        if model.gauge is not None:
            told.append(model.gauge.predict(describe_outcome(routed, supervised, routing.keep_rate)).cpu())
        keep.append(routing.share.cpu())
        # `keep` has held layers as kept; the logits tell what the router itself asks for
        decisions = routing.keep if routing.logits is None else hard(routing.logits, model.policy.threshold)
        requested.append(routing.per_row(decisions).cpu() > 0.5)
        if routing.logits is not None:
            logits.append(routing.per_row(routing.logits).cpu())
    kept = torch.cat(keep, 1)
    bound = costs.bound(kept.T)
    rows = {"keep": kept > 0.5, "share": kept, "requested": torch.cat(requested, 1)}
    if told:
        rows["told"] = torch.cat(told)
    if logits:
        rows["logits"] = torch.cat(logits, 1)
    return {"kl": torch.cat(kl), "bound": bound, **rows}


def describe_skip(look: Look, layer: int) -> str:
    """Describe in one sentence what the routers' skips of a layer cost."""
    skip, name = look.skips.get(layer), look.label(layer)
    if skip is None:
        return f"the routers no longer ask to skip layer {name}"
    cost = next(row for row in skip.rows if row.notion == "functional")
    return (
        f"layer {name} is skipped for {skip.n} of {look.joint.n} inputs at {cost.estimate:.3g} nats "
        f"[{cost.low:.3g}, {cost.high:.3g}] a token, {look.tolerance:.3g} tolerated"
    )
