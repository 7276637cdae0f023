"""What each layer is worth to each input: one dense pass and one rerun of the suffix per layer, no training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from adaskip.batch import Batch, find_supervised
from adaskip.errors import ConfigError, DataError
from adaskip.runtime.attach import RoutedModel
from adaskip.theory import bounds, measures
from adaskip.theory.conformal import conformal_quantile, safe_ratio, smallest_sample
from adaskip.theory.crossmodal import read_attention


@dataclass(frozen=True)
class LayerMeasures:
    """Per input and layer, for the routed token group. Rows are inputs, columns the measured layers (``layers``)."""

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
        """The given inputs (bool (n))."""
        return LayerMeasures(self.layers, **{f.name: getattr(self, f.name)[rows] for f in fields(self)[1:]})

    def select(self, rows: Tensor, layer: int) -> LayerMeasures:
        """One layer's column, of the given inputs (bool (n))."""
        column = self.layers.index(layer)
        values = {f.name: getattr(self, f.name)[rows, column : column + 1] for f in fields(self)[1:]}
        return LayerMeasures((layer,), **values)


@dataclass(frozen=True)
class Prices:
    """Calibrated per-layer constants: a fresh input has ``s_l <= shift[l] * (rho_l + c * mass_l)`` with probability
    >= 1 - alpha, per layer, if its score is exchangeable with the calibration scores (split conformal); likewise u.
    """

    shift: Tensor  # float64 (l): Lambda for s
    peak: Tensor  # float64 (l): the same for u
    mass: Tensor  # float64 (l): mean attention mass per layer, a constant fixed before calibration
    alpha: float
    c: float = 1.0
    correlation: Tensor | None = None  # float64 (l l): of skips, from `prices.mean_correlation`; None: they add up
    slope: Tensor | None = None  # float64 (2 l): Lambda for s and for u over the first-order s instead of rho

    def costs(self, rho: Tensor) -> tuple[Tensor, Tensor]:
        """(b l) relative changes of the dense pass -> the s and u a skip is predicted to cost, (b l) each."""
        scale = rho.double() + self.c * self.mass.to(rho.device)
        return scale * self.shift.to(rho.device), scale * self.peak.to(rho.device)

    def first_order_costs(self, slopes: Tensor) -> tuple[Tensor, Tensor]:
        """The same from `prices.first_order`, (b l).

        Raises:
            ConfigError: the constants of that price were not calibrated.
        """
        if self.slope is None:
            raise ConfigError("prices: no constants of price fisher; calibrate them with kind='fisher'")
        shift, peak = self.slope.to(slopes.device)
        return slopes.double() * shift, slopes.double() * peak


def calibrate_prices(
    measured: LayerMeasures,
    mass: Tensor,
    alpha: float,
    c: float = 1.0,
    *,
    correlation: Tensor | None = None,
    slopes: Tensor | None = None,
) -> Prices:
    """Split-conformal constants from calibration inputs (one score an input); link 9 of the chain.

    Args:
        measured: of inputs that nothing else was fitted on.
        mass: (l) attention mass per layer from other inputs; zeros for group ``all``.
        alpha: miscoverage per layer.
        c: weight of the attention mass beside rho.
        correlation: (l l) of skips.
        slopes: (n l) first-order s of the same inputs, to calibrate its constants as well.

    Raises:
        DataError: too few inputs for a finite constant at this alpha.
    """
    if len(measured) < (least := smallest_sample(alpha)):
        raise DataError(
            f"calibration: expected at least {least} inputs for alpha={alpha}, got {len(measured)}; "
            "give the calibration split more, or raise conditions.examples"
        )

    def constants(scale: Tensor) -> Tensor:
        return torch.stack([conformal_quantile(safe_ratio(x.double(), scale), alpha) for x in (measured.s, measured.u)])

    shift, peak = constants(measured.rho.double() + c * mass.double())
    slope = None if slopes is None else constants(slopes.double())
    return Prices(shift, peak, mass.double(), alpha, c, correlation, slope)


def per_input(values: Tensor, mask: Tensor, reduce: str) -> Tensor:
    """(k) values, one for each True of mask (b t), row by row -> (b): ``mean`` or ``max`` over each row's own."""
    empty = -torch.inf if reduce == "max" else 0.0
    spread = torch.full(mask.shape, empty, dtype=values.dtype, device=values.device).masked_scatter(mask, values)
    return spread.amax(1) if reduce == "max" else spread.sum(1) / mask.sum(1)


def compare(dense: Tensor, routed: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Exact KL (mean), s and u (largest) of each row over its predicted tokens.

    Args:
        dense: (b t v) logits of the dense model.
        routed: (b t v) logits with something skipped.
        labels: long (b t), -100 where nothing is predicted.
    """
    return compare_predicted(predicted(dense, labels), predicted(routed, labels), labels)


def predicted(logits: Tensor, labels: Tensor) -> Tensor:
    """(b t v) logits -> (k v): those that predict a supervised token, row by row."""
    return logits[:, :-1][find_supervised(labels)]


def compare_predicted(before: Tensor, after: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """The same from `predicted` logits (k v), which are all that has to be kept of a dense pass."""
    mask = find_supervised(labels)
    shift = bounds.logit_shift(before, after)
    found = {"kl": bounds.kl_exact(before, after), "s": shift.s, "u": shift.u}
    return {k: per_input(v, mask, "mean" if k == "kl" else "max") for k, v in found.items()}


def _of_group(values: Tensor) -> Tensor:
    """Measures of each input, 0 where it has no token of the group: a skip that nothing makes changes nothing."""
    return values.nan_to_num(0.0, posinf=math.inf)


@torch.no_grad()
def measure(
    model: RoutedModel,
    batches: Iterable[Batch],
    layers: Iterable[int] | None = None,
    attention: bool = False,
    progress: Callable[[int], None] | None = None,
) -> LayerMeasures:
    """All per-layer quantities of the routed group on batches of prompts with answers.

    Costs one dense pass a batch and, per layer, the decoder's suffix from that layer on.

    Args:
        model: attached; its group says which tokens leave a layer.
        batches: as `Collator` makes them, on the model's device.
        layers: which layers to measure; default all.
        attention: also measure the text's attention mass on vision, in the same pass.
        progress: called with the number of inputs done after each batch.
    """
    n_layers = len(model.spec.layers)
    chosen = tuple(range(n_layers) if layers is None else layers)
    rows: list[dict[str, Tensor]] = []
    for batch in batches:
        states: list[Tensor] = []
        geometry: dict[str, list[Tensor]] = {"cosine": [], "rho": []}

        def watch(index: int, before: Tensor, after: Tensor) -> None:
            # what a layer returned, not what the next one got: some models add to the states in between
            states.extend([after] if states else [before, after])  # noqa: B023 - read within this very batch
            group = model.group_mask()
            geometry["cosine"].append(_of_group(measures.cosine_distance(before, after, group)))  # noqa: B023
            geometry["rho"].append(_of_group(measures.relative_change(before, after, group)))  # noqa: B023

        reading = read_attention(model, model.read_tokens(batch.inputs)) if attention else nullcontext()
        with model.dense(), model.observe(watch), reading as read:
            dense = model(**batch.arguments()).logits
        found: dict[str, list[Tensor]] = {"kl": [], "s": [], "u": []}
        for index in chosen:
            keep = torch.ones(n_layers, len(dense), dtype=torch.bool, device=dense.device)
            keep[index] = False
            with model.replay(states[: index + 1]):
                out = model(**batch.arguments(), routing=keep)
            for name, value in compare(dense, out.logits, batch.labels).items():
                found[name].append(value)
        columns = {name: torch.stack(values, 1) for name, values in found.items()}
        columns |= {name: torch.stack([values[i] for i in chosen], 1) for name, values in geometry.items()}
        columns["mass"] = torch.zeros_like(columns["rho"]) if read is None else read.mass[:, list(chosen)]
        rows.append({name: value.float().cpu() for name, value in columns.items()})
        if progress is not None:
            progress(sum(len(row["kl"]) for row in rows))
    names = [f.name for f in fields(LayerMeasures) if f.name != "layers"]
    return LayerMeasures(chosen, **{name: torch.cat([row[name] for row in rows]) for name in names})
