"""Measure what one decision more or less costs each input along the routers' own path; nothing is differentiated."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from adaskip.backbone.probe import in_this_thread
from adaskip.batch import Batch
from adaskip.errors import ConfigError
from adaskip.runtime.attach import RoutedModel
from adaskip.survey.record import Recorded, record
from adaskip.theory import bounds
from adaskip.theory.costs import Reference, per_input


@dataclass(frozen=True)
class Flips:
    """Hold n inputs and their paths: what the routers saw, what the path costs, what each flip changes.

    Costs are ``KL(dense || path) + task_weight * CE``, in nats per predicted token.
    """

    pooled: Tensor  # float32 (n l k d): what each layer's router sees on this path
    keep: Tensor  # bool (n l): the path
    cost: Tensor  # float32 (n): of the path, exact
    change: Tensor  # float32 (n l): exact cost with the decision at layer l flipped, minus ``cost``
    pairs: Tensor  # float32 (n l l): covariance of what single flips do to the logits, the gate matrix on this path
    share: Tensor  # float32 (n l): share of the dense decoder FLOPs that a kept layer adds
    floor: Tensor  # float32 (n): share spent with every layer skipped

    def __len__(self) -> int:
        return len(self.cost)

    def take(self, rows: Tensor) -> Flips:
        """Return some inputs (long or bool)."""
        return Flips(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})

    def to(self, device: torch.device) -> Flips:
        """Return the same on a device."""
        return Flips(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})

    def expected_cost(self, gates: Tensor) -> Tensor:
        """Return the mean cost (n) of independent decisions that keep layer l with probability ``gates`` (n l).

            cost + sum_l q_l change_l + sum_{l<m} q_l q_m pairs_lm,  q_l the probability that layer l leaves the path

        Exact at the path and at its single flips, an estimator [D, link 6c] beyond; never below 0.
        """
        q = torch.where(self.keep, 1.0 - gates, gates)
        own = self.pairs.diagonal(dim1=1, dim2=2)
        together = (torch.einsum("nl,nlm,nm->n", q, self.pairs, q) - (q**2 * own).sum(1)) / 2.0
        return (self.cost + (q * self.change).sum(1) + together).clamp_min(0.0)

    def keep_rate(self, gates: Tensor) -> Tensor:
        """Return the expected share of the dense decoder FLOPs under the same decisions, (n l) -> (n)."""
        return self.floor + (gates * self.share).sum(1)


class PathCost:
    """Compute what paths cost each input of a batch: ``KL(dense || path) + task_weight * CE``, mean over its tokens.

    Args:
        dense: (k v) logits of the dense model at the predicted tokens.
        batch: prompts with answers.
        task_weight: of the cross-entropy.
    """

    def __init__(self, dense: Tensor, batch: Batch, task_weight: float) -> None:
        self._dense, self._supervised, self._task_weight = Reference(dense), batch.supervised, task_weight
        self._answers = batch.labels[:, 1:][self._supervised]

    def kl(self, logits: Tensor) -> Tensor:
        """Return the KL of logits (k v), float64 (b)."""
        return self._dense.compare(logits, self._supervised)["kl"]

    def task(self, logits: Tensor) -> Tensor:
        """Return the cross-entropy of logits (k v), float64 (b)."""
        values = torch.nn.functional.cross_entropy(logits.float(), self._answers, reduction="none")
        return per_input(values.double(), self._supervised, "mean")

    def __call__(self, logits: Tensor) -> Tensor:
        """Return the cost of logits (k v), float64 (b)."""
        cost = self.kl(logits)
        return cost + self._task_weight * self.task(logits) if self._task_weight else cost


@torch.no_grad()
def flip(path: Recorded, layers: Tensor, cost: PathCost) -> Tensor:
    """Return how much more a row costs with a layer run than with it left out, beside the path's other decisions.

    Args:
        path: recorded as routed, with its states.
        layers: long (n b): in rerun i, row b has layer ``layers[i, b]`` decided the other way.
        cost: of logits.

    Returns:
        float64 (n b), exact. A rerun costs the layers from the first that some row flips.
    """
    base, differences = cost(path.logits), []
    with path.model.runtime.state.aside():  # `model.routing` stays the path's
        for at in layers.unsqueeze(1):
            kept = path.keep.gather(0, at)
            change = cost(path.rerun(path.keep.scatter(0, at, ~kept))) - base
            differences.append(torch.where(kept[0], -change, change))
    return torch.stack(differences)


@torch.no_grad()
def survey_flips(
    model: RoutedModel,
    batches: Iterable[Batch],
    task_weight: float = 0.0,
    progress: Callable[[int], None] | None = None,
) -> Flips:
    """Rerun every input with each decision of its own path flipped.

    Costs a dense and a routed pass a batch and, per layer, the suffix from that layer on: about ``L/2 * keep + 2``.
    Untrained routers keep everything, so that the first survey is one of the dense model.

    Args:
        model: attached with routers of scope ``prompt``.
        batches: prompts with answers, on the model's device.
        task_weight: of the answers' own cross-entropy beside the KL.
        progress: called with the number of inputs done after each batch.

    Raises:
        ConfigError: the model has no routers, or routers that decide for every token.
    """
    if model.routers is None or model.target.scope != "prompt":
        raise ConfigError(
            "method from-bounds and price gates: expected one decision a layer and prompt, by learned routers; "
            "attach with RouterConfig(scope='prompt') and without a plan"
        )
    parts: list[Flips] = []
    for batch in batches:
        parts.append(_survey_batch(model, batch, task_weight))
        if progress is not None:
            progress(sum(map(len, parts)))
    return Flips(**{f.name: torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Flips)})


def _survey_batch(model: RoutedModel, batch: Batch, task_weight: float) -> Flips:
    supervised = batch.supervised
    pooled: list[Tensor] = []
    assert model.routers is not None
    pool = in_this_thread(lambda _, args: pooled.append(args[0]))
    hooks = [head.register_forward_pre_hook(pool) for head in model.routers]
    try:
        path = record(model, batch, routed=True)
    finally:
        for hook in hooks:
            hook.remove()
    run, skipped = model.flops()  # of the path: the next pass replaces what they are read from
    dense = path.logits if path.keep.all() else path.rerun_dense(0)

    cost = PathCost(dense, batch, task_weight)
    flipped: list[Tensor] = []
    for layer in range(len(path.keep)):
        keep = path.keep.clone()
        keep[layer] = ~keep[layer]
        flipped.append(path.rerun(keep))
    base = cost(path.logits)
    change = torch.stack([cost(logits) - base for logits in flipped], 1)

    # the gate matrix of each predicted token, averaged over the tokens of each input
    together = bounds.gate_matrix(path.logits, torch.stack(flipped, 1))
    rows = supervised.nonzero()[:, 0]
    pairs = together.new_zeros(len(base), *together.shape[1:]).index_add(0, rows, together)
    pairs = (1.0 + task_weight) * pairs / supervised.sum(1)[:, None, None]
    total = run.sum(0)
    values = {
        "pooled": torch.stack(pooled, 1),
        "keep": path.keep.T,
        "cost": base,
        "change": change,
        "pairs": pairs,
        "share": ((run - skipped) / total).T,
        "floor": skipped.sum(0) / total,
    }
    return Flips(**{k: v.cpu() if v.dtype == torch.bool else v.float().cpu() for k, v in values.items()})
