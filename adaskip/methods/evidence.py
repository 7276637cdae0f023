"""What methods may look at on some inputs: each figure is measured when it is first asked for, and once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path as FilePath

import torch
from torch import Tensor

from adaskip.batch import Batch
from adaskip.runtime.attach import RoutedModel
from adaskip.survey.forecast import Forecast, find_forecast
from adaskip.survey.greedy import Path
from adaskip.survey.halves import last_strays, site_seconds, site_turns
from adaskip.survey.ledger import Ledger
from adaskip.survey.plans import plan_costs, runs_of
from adaskip.survey.price_file import PriceFile, find_origin
from adaskip.survey.record import record
from adaskip.survey.skips import measure_skips
from adaskip.survey.static import ROUNDING, layer_savings
from adaskip.theory.conditions import Findings, judge
from adaskip.theory.measures import cosine_distance, relative_change
from adaskip.theory.prices import calibrate_prices
from adaskip.theory.tables import LayerMeasures

COSTS, HITS = "costs.safetensors", "hits.safetensors"
_TIMED = 32
"""Inputs whose passes are timed."""


class Evidence:
    """Measure layers and plans on inputs that only plans are chosen by, never judged.

    Args:
        model: attached, of scope ``prompt``; its target says what a skip leaves out, whatever decides in it.
        batches: makes batches, on the model's device, of inputs given by number, in that order.
        inputs: how many there are.
        folder: where exact prices are kept, so that a search that was stopped goes on; None: in memory only.

    Raises:
        CheckpointError: the folder's prices are damaged, or were measured on something else.
    """

    def __init__(
        self,
        model: RoutedModel,
        batches: Callable[[Sequence[int]], Sequence[Batch]],
        inputs: int,
        folder: FilePath | None = None,
    ) -> None:
        self.model, self.batches, self.inputs = model, batches, inputs
        self.layers, self.group = len(model.sites), model.target.group  # layers, or halves of them
        origin = {} if folder is None else find_origin(model, batches(self.everyone))
        files = [None if folder is None else PriceFile(folder / name, origin) for name in (COSTS, HITS)]
        self.costs = Ledger(lambda paths, rows: self._measure(paths, rows)[0], inputs, files[0])
        self.hits = Ledger(lambda paths, rows: self._measure(paths, rows)[1], inputs, files[1])

    @property
    def everyone(self) -> range:
        """Return the numbers of all inputs."""
        return range(self.inputs)

    @cached_property
    def savings(self) -> Tensor:
        """Return float64 (n l): the share of each input's dense decoder FLOPs that leaving out each layer saves."""
        return layer_savings(self.model, self.batches(self.everyone))

    @property
    def saves(self) -> Tensor:
        """Return float64 (l): the same, mean over inputs."""
        return self.savings.mean(0)

    def keeps(self, path: Path) -> float:
        """Return the keep rate of a path, mean over inputs; what layers save adds up."""
        return 1 - float(self.saves[list(path)].sum())

    def holds(self, path: Path, keep: float) -> bool:
        """Return whether a path keeps no more than a budget."""
        return self.keeps(path) <= keep + ROUNDING

    @cached_property
    def geometry(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return cosine distance, relative change and the text's attention on vision, float64 (l) each: one dense pass.

        Inputs without a token of the group do not count. The mass is 0 for group ``all``.
        """
        found: list[Tensor] = []
        for batch in self.batches(self.everyone):
            dense = record(self.model, batch, attention=self.group == "vision")
            pairs = list(zip(dense.entered, dense.states[1:], strict=True))
            cosine = torch.stack([cosine_distance(a, b, dense.group) for a, b in pairs], 1)
            change = torch.stack([relative_change(a, b, dense.group) for a, b in pairs], 1)
            mass = torch.zeros_like(cosine) if dense.attention is None else dense.attention.mass
            counted = dense.group.any(1)
            found.append(torch.stack([cosine, change, mass])[:, counted].double().cpu())
        cosine, change, mass = torch.cat(found, 1).mean(1)
        return cosine, change, mass

    @cached_property
    def turns(self) -> Tensor:
        """Return float64 (s): how far each half of a layer turns a prompt token, mean; costs two dense passes."""
        return site_turns(self.model, self.batches(self.everyone))

    @cached_property
    def strays(self) -> Tensor:
        """Return float64 (s): 1 - cos of the last state with and without each half of a layer, mean."""
        return last_strays(self.model, self.batches(self.everyone))

    @cached_property
    def seconds(self) -> Tensor:
        """Return float64 (s): what each half of a layer takes at the length of these inputs, on this machine."""
        return site_seconds(self.model, self.batches(self.everyone[:_TIMED]))

    @cached_property
    def patches(self) -> Tensor:
        """Return float64 (n): how many vision tokens each input has; inputs without any are left out."""
        counts = []
        for batch in self.batches(self.everyone):
            vision = self.model.read_tokens(batch.inputs).vision
            counts.append(torch.zeros(len(batch)) if vision is None else vision.sum(1).cpu())
        found = torch.cat(counts).double()
        return found[found > 0]

    @cached_property
    def forecast(self) -> Forecast:
        """Return what later layers do to each input by the first quarter of them: one dense pass.

        Raises:
            DataError: too few inputs to fit a regression on.
        """
        return find_forecast(self.model, self.batches(self.everyone), entry=max(1, self.layers // 4))

    @cached_property
    def single(self) -> Tensor:
        """Return float64 (l): the exact cost of leaving out each layer alone, nats per predicted token, mean."""
        return self.costs([(layer,) for layer in range(self.layers)], self.everyone).mean(0)

    def accuracy(self, paths: Sequence[Path]) -> Tensor:
        """Return float64 (p): the share of inputs whose every answer token is right along each path."""
        return self.hits(paths, self.everyone).mean(0)

    def findings(self, tolerance: float, alpha: float = 0.1) -> Findings:
        """Return the verdicts on every layer: constants are calibrated on every other input, the rest judges.

        Args:
            tolerance: nats per predicted token that one skipped layer may cost.
            alpha: miscoverage of the constants.

        Raises:
            DataError: too few inputs for that alpha.
        """
        calibrating = torch.arange(self.inputs) % 2 == 0
        fitted, judged = self._measured.rows(calibrating), self._measured.rows(~calibrating)
        return judge(judged, calibrate_prices(fitted, judged.mass.mean(0), alpha), self.group, tolerance)

    @cached_property
    def _measured(self) -> LayerMeasures:
        return measure_skips(self.model, self.batches(self.everyone), attention=self.group == "vision")

    def _measure(self, paths: Sequence[Path], rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return what paths cost and score, float64 (n p) each; either ledger learns what the other had measured."""
        found = plan_costs(self.model, self.batches(rows), [runs_of(path, self.layers) for path in paths])
        for ledger, values in ((self.costs, found.kl), (self.hits, found.hit)):
            for path, column in zip(paths, values.T, strict=True):
                known = ledger.known.setdefault(path, torch.full((self.inputs,), torch.nan, dtype=torch.float64))
                known[list(rows)] = column
        return found.kl, found.hit
