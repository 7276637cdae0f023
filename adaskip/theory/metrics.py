"""The measures as torchmetrics: streamed over batches, reduced across ranks, one thin class a notion.

Half-precision inputs are accumulated in float32 or wider; sums are float64. Rows for which a measure is undefined (an
empty mask) are left out and counted in ``left_out``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from adaskip.errors import DataError
from adaskip.theory import measures
from adaskip.theory.costs import compare
from adaskip.theory.probes import code_entropy, probe_loss, usable_information_lost
from adaskip.theory.similarity import Moments, linear_cka, svcca


class _MeanOverInputs(Metric):
    """Average over inputs of one number each; ``compute`` raises DataError before any defined input."""

    full_state_update = False
    total: Tensor
    count: Tensor
    left_out: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        for name in ("count", "left_out"):
            self.add_state(name, torch.tensor(0), dist_reduce_fx="sum")

    def add(self, values: Tensor) -> None:
        """Count (b) values; NaN is an undefined input."""
        defined = ~values.isnan()
        self.total += values[defined].double().sum().to(self.total.device)
        self.count += int(defined.sum())
        self.left_out += int((~defined).sum())

    def compute(self) -> Tensor:
        """Return the mean, float64 ()."""
        if not self.count:
            raise DataError(
                f"{type(self).__name__}: no input to average over ({int(self.left_out)} with an empty mask left out)"
            )
        return self.total / self.count


class GeometricRedundancy(_MeanOverInputs):
    """Measure E[1 - cos] of the states around a layer, in [0, 2] [P]; `measures.cosine_distance`.

    >>> metric = GeometricRedundancy()
    >>> h = torch.tensor([[[1.0, 0.0]]])
    >>> metric.update(h, h.flip(-1), torch.ones(1, 1).bool())
    >>> metric.compute().item()
    1.0
    """

    def update(self, before: Tensor, after: Tensor, mask: Tensor) -> None:
        """Count (b t d), (b t d), bool (b t)."""
        self.add(measures.cosine_distance(before, after, mask))


class RelativeChange(_MeanOverInputs):
    """Measure E rho, the norm of a layer's change over that of its result [D]; `measures.relative_change`."""

    def update(self, before: Tensor, after: Tensor, mask: Tensor) -> None:
        """Count (b t d), (b t d), bool (b t)."""
        self.add(measures.relative_change(before, after, mask))


class FunctionalCost(_MeanOverInputs):
    """Measure E KL(dense || skipped), nats per predicted token [P]; exact, `costs.compare`."""

    def update(self, dense: Tensor, skipped: Tensor, supervised: Tensor) -> None:
        """Count (b t v) logits twice; bool (b t-1), whether the next token is scored: `adaskip.Batch.supervised`."""
        self.add(compare(dense, skipped, supervised)["kl"])


class AttentionMass(_MeanOverInputs):
    """Average the share of masked queries' attention on masked keys, in [0, 1] [P]; `measures.attention_mass`."""

    def update(self, attention: Tensor, query_mask: Tensor, key_mask: Tensor) -> None:
        """Count (b h q k), bool (b q), bool (b k)."""
        self.add(measures.attention_mass(attention, query_mask, key_mask))


class ValueWeightedMass(_MeanOverInputs):
    """Average a ||v_removed - v_rest|| [D, link 7], in the unit of the values; `measures.value_weighted_mass`."""

    def update(self, attention: Tensor, values: Tensor, query_mask: Tensor, key_mask: Tensor) -> None:
        """Count (b h q k), (b h k e), bool (b q), bool (b k)."""
        self.add(measures.value_weighted_mass(attention, values, query_mask, key_mask))


class ProximalTail(Metric):
    """Measure P(1 - cos > delta) over inputs for every delta of a grid at once: the whole tail [P], estimator.

    Args:
        deltas: the grid, ascending; default 129 points from 1e-6 to 2, evenly spaced in the logarithm.
    """

    full_state_update = False
    above: Tensor
    count: Tensor
    deltas: Tensor

    def __init__(self, deltas: Sequence[float] | None = None) -> None:
        super().__init__()
        grid = torch.logspace(-6, 0.30103, 129, dtype=torch.float64) if deltas is None else torch.tensor(deltas)
        self.register_buffer("deltas", grid.double())
        self.add_state("above", torch.zeros(len(grid), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, before: Tensor, after: Tensor, mask: Tensor) -> None:
        """Count (b t d), (b t d), bool (b t); rows with an empty mask are left out."""
        distance = measures.cosine_distance(before, after, mask).double()
        distance = distance[~distance.isnan()]
        self.above += (distance[:, None] > self.deltas.to(distance.device)).sum(0).to(self.above)
        self.count += len(distance)

    def compute(self) -> tuple[Tensor, Tensor]:
        """Return float64 (p) twice: the deltas, and the share of inputs above each."""
        if not self.count:
            raise DataError("ProximalTail: no input with a token of the group yet")
        return self.deltas, self.above / self.count


class StateSimilarity(Metric):
    """Estimate linear CKA and SVCCA of the states around a layer, from sums over its masked tokens; estimators.

    Links 1, 2 and 6b do not hold for them. ``compute`` gives ``{"cka": ..., "svcca": ...}`` and raises DataError on
    too few tokens.

    Args:
        width: of the states.
    """

    full_state_update = False
    n: Tensor
    x: Tensor
    y: Tensor
    xx: Tensor
    yy: Tensor
    xy: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        for name, shape in {"n": (), "x": (width,), "y": (width,)}.items():
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")
        for name in ("xx", "yy", "xy"):
            self.add_state(name, torch.zeros(width, width, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, before: Tensor, after: Tensor, mask: Tensor) -> None:
        """Count (b t d), (b t d), bool (b t)."""
        for name, value in vars(Moments.of(before, after, mask)).items():
            setattr(self, name, getattr(self, name) + value.to(self.xx.device))

    def compute(self) -> dict[str, float]:
        """Return similarities in [0, 1]; NaN where a side does not vary."""
        moments = Moments(self.n, self.x, self.y, self.xx, self.yy, self.xy)
        return {"cka": linear_cka(moments), "svcca": svcca(moments)}


class _PairedStates(Metric):
    """Keep float32 states around a layer, gathered across ranks."""

    full_state_update = False
    before: list[Tensor]
    after: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        for name in ("before", "after"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def gathered(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return all states before and after the layer, in an order of their own: neither batches nor ranks matter.

        And that order, long (n).
        """
        if not len(self.before):
            raise DataError(f"{type(self).__name__}: no input yet; call update first")
        before, after = dim_zero_cat(self.before), dim_zero_cat(self.after)
        keys = torch.cat([before.flatten(1)[:, :3], after.flatten(1)[:, :3]], 1).cpu().numpy()
        order = torch.from_numpy(np.lexsort(keys.T)).to(before.device)
        return before[order], after[order], order


class UsableInformationLost(_PairedStates):
    """Estimate H_V(Y | H') - H_V(Y | H), nats: what a probe no longer reads when the layer is skipped [D]; estimator.

    Args:
        folds: of the cross-fitting.
        level: of the interval.
        seed: of the folds.
    """

    labels: list[Tensor]

    def __init__(self, folds: int = 5, level: float = 0.95, seed: int = 0) -> None:
        super().__init__()
        self.folds, self.level, self.seed = folds, level, seed
        self.add_state("labels", [], dist_reduce_fx="cat")

    def update(self, before: Tensor, after: Tensor, labels: Tensor) -> None:
        """Keep (b d) pooled states twice, long (b) labels."""
        self.before.append(before.float())
        self.after.append(after.float())
        self.labels.append(labels)

    def compute(self) -> dict[str, float]:
        """Return ``estimate, low, high, n``, over inputs, paired."""
        before, after, order = self.gathered()
        labels = dim_zero_cat(self.labels)[order]
        skipped, full = (probe_loss(states, labels, self.folds, seed=self.seed) for states in (before, after))
        return {**vars(usable_information_lost(skipped, full, self.level))}


class QuantisedEntropy(_PairedStates):
    """Measure H(Q_l | Q_{l-1}) under a shared k-means quantiser beside Fano's bound [D, link 5]; estimator, biased low.

    Args:
        codes: K.
        level: of the interval over inputs.
        seed: of k-means and the bootstrap.
    """

    def __init__(self, codes: int, level: float = 0.95, seed: int = 0) -> None:
        super().__init__()
        self.codes, self.level, self.seed = codes, level, seed

    def update(self, before: Tensor, after: Tensor) -> None:
        """Keep (b m d) m states of each input, twice."""
        self.before.append(before.float())
        self.after.append(after.float())

    def compute(self) -> dict[str, float]:
        """Return the fields of `CodeEntropy`; raises DataError with fewer than 10 K^2 states."""
        before, after, _ = self.gathered()
        return {**vars(code_entropy(before, after, self.codes, self.level, seed=self.seed))}
