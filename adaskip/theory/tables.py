"""Tables of what was measured: a row an input, a column a layer (or band), for one token group."""

from __future__ import annotations

from dataclasses import dataclass, fields

from torch import Tensor

from adaskip.theory.sinks import Sinks


@dataclass(frozen=True)
class LayerMeasures:
    """Hold the measures that verdicts rest on, for the routed token group: a row an input, a column a layer or band."""

    layers: tuple[int, ...]
    cosine: Tensor  # (n l) mean 1 - cos of the states before and after the layer, in [0, 2]
    rho: Tensor  # (n l) norm of the layer's change over the norm of its result
    kl: Tensor  # (n l) exact KL(dense || layer skipped), nats per predicted token
    s: Tensor  # (n l) largest std of dz under p over the input's predicted tokens, nats
    u: Tensor  # (n l) largest max dz - E dz, nats
    mass: Tensor  # (n l) share of the text's attention that lies on vision; 0 for group all

    def __len__(self) -> int:
        return len(self.kl)

    def rows(self, rows: Tensor) -> LayerMeasures:
        """Return some inputs (bool (n))."""
        return LayerMeasures(self.layers, **{f.name: getattr(self, f.name)[rows] for f in fields(self)[1:]})

    def select(self, rows: Tensor, layer: int) -> LayerMeasures:
        """Return one layer's column, of some inputs (bool (n))."""
        column = self.layers.index(layer)
        values = {f.name: getattr(self, f.name)[rows, column : column + 1] for f in fields(self)[1:]}
        return LayerMeasures((layer,), **values)


@dataclass(frozen=True)
class Survey:
    """Hold all measures of n inputs and l layers, for one token group. float64 on the CPU; NaN: not measured there."""

    group: str
    cosine: Tensor  # (n l) mean 1 - cos of the states around the layer, in [0, 2]
    rho: Tensor  # (n l) norm of the layer's change over the norm of its result
    kl: Tensor  # (n l) exact KL(dense || layer skipped), nats per predicted token
    s: Tensor  # (n l) largest std of dz under p over the predicted tokens, nats
    u: Tensor  # (n l) largest max dz - E dz, nats
    hit: Tensor  # (n l) 1 where the teacher-forced answer is right with the layer skipped
    mass: Tensor  # (n l) share of the text's attention on vision; 0 for group all
    moved: Tensor  # (n l) how far vision's keys move the text's attention output; 0 for group all
    removal: Tensor  # (n l) KL when the text cannot see vision at that layer only, nats; 0 for group all
    tangent: Tensor  # (n l) mean s^2 / 2 with s = std_p(J dh), nats: first order, forward mode
    score: Tensor  # (n l) half of (grad log p(Y*) . dh)^2 per predicted token, nats: one backward pass
    dense_hit: Tensor  # (n) as `hit`, nothing skipped
    drawn: Tensor  # long (n) label drawn from the dense model at the first predicted token
    first: Tensor  # (n l) norm of the group's first state after the layer over its median token's
    longest: Tensor  # (n l) the same of its longest state
    pooled: Tensor  # float32 (n l+1 d) mean state of the group before layer 0 and after every layer
    tokens: Tensor  # float32 (n m l+1 d) states of m tokens of the group
    chain: dict[str, tuple[int, int]]  # link -> how often it was checked, how often violated
    sinks: Sinks  # where states are many times as long as the others'

    def __len__(self) -> int:
        return len(self.kl)

    def select(self, rows: Tensor) -> LayerMeasures:
        """Return what `calibrate_prices` and `judge` read, of some inputs."""
        names = [f.name for f in fields(LayerMeasures) if f.name != "layers"]
        return LayerMeasures(tuple(range(self.kl.shape[1])), **{name: getattr(self, name)[rows] for name in names})
