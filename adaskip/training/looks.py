"""One look at the routers' present decisions: what they cost together, and which of them cost too much."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adaskip.batch import Batch
from adaskip.runtime.attach import RoutedModel
from adaskip.runtime.gates import hard
from adaskip.theory.bounds import redundancy_bound
from adaskip.theory.conditions import Findings, Joint, SkipFinding
from adaskip.theory.costs import compare_predicted, predicted
from adaskip.theory.prices import Prices


@dataclass(frozen=True)
class Look:
    """What one check of the conditions found."""

    step: int
    group: str
    tolerance: float
    findings: Findings
    joint: Joint
    skips: dict[int, SkipFinding]  # of each layer that the routers leave out, on the inputs for which they do
    held: tuple[int, ...] = ()  # layers that were forced to keep when looking

    @property
    def violations(self) -> dict[int, SkipFinding]:
        """The layers whose skips clearly cost more than they may; one that is held makes none."""
        costly = {layer: found for layer, found in self.skips.items() if found.verdict == "inadmissible"}
        return {layer: found for layer, found in costly.items() if layer not in self.held}

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; a line of ``conditions.jsonl``."""
        return {
            "step": self.step,
            "group": self.group,
            "tolerance": self.tolerance,
            "findings": [row.to_dict() for row in self.findings.rows],
            "layers": {str(layer): verdict for layer, verdict in self.findings.layers.items()},
            "rank_correlation": self.findings.rank_correlation,
            "joint": self.joint.to_dict(),
            "skips": [found.to_dict() for found in self.skips.values()],
            "held": list(self.held),
        }


class DenseLogits:
    """The dense logits at the predicted tokens of batches that are looked at again and again.

    The backbone is frozen, so each batch's are computed once and kept on its device, as long as they fit in ``limit``
    bytes; what does not fit is computed at every look.

    Args:
        limit: bytes to keep at most; 2**28 hold 128 answers of 7 tokens at a vocabulary of 150,000 in bfloat16.
    """

    def __init__(self, limit: int = 2**28) -> None:
        self.limit = limit
        self._kept: dict[int, Tensor] = {}

    @torch.no_grad()
    def __call__(self, model: RoutedModel, index: int, batch: Batch) -> Tensor:
        """(k v) of the batch with this index; see `predicted`."""
        if index in self._kept:
            return self._kept[index]
        with model.dense():
            logits = model(**batch.arguments()).logits
        found = predicted(logits, batch.supervised)
        if found.nbytes + sum(x.nbytes for x in self._kept.values()) <= self.limit:
            self._kept[index] = found
        return found


@torch.no_grad()
def joint_cost(
    model: RoutedModel, batches: Iterable[Batch], rho: Tensor, prices: Prices, dense: DenseLogits | None = None
) -> dict[str, Tensor]:
    """What the routers' real decisions cost each input: exact ``kl`` (n), predicted ``bound`` (n), and ``keep`` (l n).

    ``wanted`` (l n) is what the routers would do if no layer were held. Under scope token an input keeps a layer if
    most of its tokens do (a heuristic), and its bound takes the share of them that skip.

    Args:
        model: with frozen or current routers.
        batches: prompts with answers.
        rho: (n l) relative change of every layer in the dense pass, for the same inputs in the same order.
        prices: calibrated constants.
        dense: the memory of the same batches; None: they are looked at once.
    """
    dense = dense or DenseLogits(limit=0)
    kl, keep, wanted = [], [], []
    for index, batch in enumerate(batches):
        before, supervised = dense(model, index, batch), batch.supervised
        routed = model(**batch.arguments()).logits
        kl.append(compare_predicted(before, predicted(routed, supervised), supervised)["kl"].cpu())
        routing = model.routing
        keep.append(routing.share.cpu())
        decided = routing.keep if routing.logits is None else hard(routing.logits, model.policy.threshold)
        wanted.append(routing.per_row(decided).cpu() > 0.5)
    s, u = prices.costs(rho)
    kept = torch.cat(keep, 1)
    bound = redundancy_bound(kept.T, s, u, prices.correlation)
    decisions = {"keep": kept > 0.5, "share": kept, "wanted": torch.cat(wanted, 1)}
    return {"kl": torch.cat(kl), "bound": bound, **decisions}


def describe_skip(look: Look, layer: int) -> str:
    """One sentence on what the routers' skips of a layer cost."""
    found = look.skips.get(layer)
    if found is None:
        return f"the routers no longer ask to skip layer {layer}"
    cost = next(row for row in found.rows if row.notion == "functional")
    return (
        f"layer {layer} is skipped for {found.n} of {look.joint.n} inputs at {cost.estimate:.3g} nats "
        f"[{cost.low:.3g}, {cost.high:.3g}] a token, {look.tolerance:.3g} tolerated"
    )
