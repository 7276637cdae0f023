"""Measure what leaving out a layer, or a band of layers, costs each input: one dense pass, and a rerun for each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from adaskip.batch import Batch
from adaskip.errors import ConfigError
from adaskip.runtime.attach import RoutedModel
from adaskip.survey.record import Recorded, record
from adaskip.theory import measures
from adaskip.theory.bands import Band
from adaskip.theory.tables import LayerMeasures

Watch = Callable[[Recorded, int, Tensor], None]
"""Hears of a recorded dense pass, a column, and the logits (k v) with what the column stands for left out."""


def measure_skips(
    model: RoutedModel,
    batches: Iterable[Batch],
    sites: Iterable[int] | None = None,
    attention: bool = False,
    progress: Callable[[int], None] | None = None,
    watch: Watch | None = None,
) -> LayerMeasures:
    """Measure all quantities of each site, a layer or a half of one, of the routed group on prompts with answers.

    Costs one dense pass a batch and, per site, the decoder's suffix from its layer on. The costs are of leaving out the
    site alone; how far the states move is told of its whole layer, as for every unit that is less than one.

    Args:
        model: attached; its group says which tokens leave a layer.
        batches: as `Collator` makes them, on the model's device.
        sites: which to measure; default all.
        attention: also measure the text's attention mass on vision, in the same pass.
        progress: called with the number of inputs done after each batch.
        watch: called as ``watch(recorded, column, logits)`` after each rerun, for those who measure more.
    """
    chosen = tuple(range(len(model.sites)) if sites is None else sites)
    columns = [((site,), Band(model.sites.layer(site), model.sites.layer(site))) for site in chosen]
    return replace(_measure(model, batches, columns, attention, progress, watch), layers=chosen)


def measure_bands(
    model: RoutedModel,
    batches: Iterable[Batch],
    bands: Sequence[Band],
    attention: bool = False,
    progress: Callable[[int], None] | None = None,
    watch: Watch | None = None,
) -> LayerMeasures:
    """Measure bands as `measure_skips` measures layers: column i is band i, its states those at entry and at exit.

    The single layers of a band say little about it: cosine distances may grow like the square of its length (link 6b),
    and costs neither add up nor bound one another. Costs a dense pass a batch and a suffix from its entry per band.
    ``mass`` is the mean over the band's layers.

    Raises:
        ConfigError: no band, or one outside the model.
    """
    n_layers = len(model.spec.layers)
    if not bands or any(not 0 <= band.first <= band.last < n_layers for band in bands):
        raise ConfigError(f"bands: expected bands within layers 0 to {n_layers - 1}, got {list(bands)}")
    columns = [([*range(model.sites.of(b.first)[0], model.sites.of(b.last)[-1] + 1)], b) for b in bands]
    return _measure(model, batches, columns, attention, progress, watch)


@torch.no_grad()
def _measure(
    model: RoutedModel,
    batches: Iterable[Batch],
    wanted: Sequence[tuple[Sequence[int], Band]],
    attention: bool,
    progress: Callable[[int], None] | None,
    watch: Watch | None,
) -> LayerMeasures:
    """Measure columns: sites to leave out, and the layers whose states around tell how far they move."""
    tables: list[dict[str, Tensor]] = []
    for batch in batches:
        recorded = record(model, batch, attention=attention)
        columns = []
        for column, (sites, band) in enumerate(wanted):
            rerun = recorded.rerun(recorded.skipping(sites))
            columns.append(_measure_band(recorded, band, rerun))
            if watch is not None:
                watch(recorded, column, rerun)
        tables.append({name: torch.stack([c[name] for c in columns], 1).float().cpu() for name in columns[0]})
        if progress is not None:
            progress(sum(len(table["kl"]) for table in tables))
    whole = {name: torch.cat([table[name] for table in tables]) for name in tables[0]}
    return LayerMeasures(tuple(range(len(wanted))), **whole)


def _measure_band(recorded: Recorded, band: Band, rerun: Tensor) -> dict[str, Tensor]:
    """Measure one column, (b) each, from the logits (k v) of a rerun without the band."""
    layers = range(band.first, band.last + 1)
    entry, leave, group = recorded.entered[band.first], recorded.states[band.last + 1], recorded.group
    cost = recorded.compare(rerun)
    mass = torch.zeros_like(cost["kl"]) if recorded.attention is None else recorded.attention.mass[:, layers].mean(1)
    return {
        "cosine": _of_group(measures.cosine_distance(entry, leave, group)),
        "rho": _of_group(measures.relative_change(entry, leave, group)),
        "mass": mass,
        **cost,
    }


def _of_group(values: Tensor) -> Tensor:
    """Put 0 where an input has no token of the group: a skip that nothing makes changes nothing."""
    return values.nan_to_num(0.0, posinf=math.inf)
