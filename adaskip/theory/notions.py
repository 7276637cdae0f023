"""The notions of one survey, layer by layer with intervals, and as predictors of the exact cost."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from adaskip.errors import DataError
from adaskip.theory import bounds
from adaskip.theory.intervals import Interval, bootstrap_mean, share_lost
from adaskip.theory.measures import TailCurve
from adaskip.theory.probes import code_entropy, probe_loss, sizes_for, usable_information_lost
from adaskip.theory.similarity import Moments, dissimilarity
from adaskip.theory.tables import Survey

PER_LAYER = ("cka", "svcca", "usable_information_lost", "code_entropy")
"""Notions of a layer over all inputs, which say nothing of a single one."""
_FOLDS = 10  # groups of inputs in the jackknife


class Notions:
    """Hold the notions of each layer, read off a survey's numbers.

    Args:
        measured: the survey.
        bound: (n l) the bound B of skipping that layer alone, NaN where its constants were calibrated.
        level: of the intervals.
        seed: of folds, codebooks and bootstraps.

    ``undecided`` says of each notion that could not be measured, why.
    """

    def __init__(self, measured: Survey, bound: Tensor, level: float, seed: int) -> None:
        self.measured, self.bound, self.level, self.seed = measured, bound, level, seed
        self.n, self.n_layers = measured.kl.shape
        self.undecided: dict[str, str] = {}
        self.similar = {name: self._similarity(name) for name in ("cka", "svcca")}
        self.probes, self.codes = self._probes(), self._codes()

    def row(self, layer: int) -> dict[str, Any]:
        """Return every notion of one layer, JSON-ready."""
        measured, similar, codes = self.measured, self.similar, self.codes

        def mean(values: Tensor) -> dict[str, Any] | None:
            finite = values[values.isfinite()]
            return plain(bootstrap_mean(finite, self.level, seed=self.seed)) if len(finite) else None

        tail = TailCurve.of(measured.cosine[:, layer])
        deltas = tail.sample.quantile(torch.tensor([0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0], dtype=torch.float64))
        row: dict[str, Any] = {
            "layer": layer,
            "group": measured.group,
            "functional": mean(measured.kl[:, layer]),
            "accuracy_lost": plain(share_lost(measured.dense_hit, measured.hit[:, layer], self.level)),
            "cosine": mean(measured.cosine[:, layer]),
            "rho": mean(measured.rho[:, layer]),
            "proximal": {"delta": deltas.tolist(), "share_above": tail(deltas).tolist()},
            "cka": plain(similar["cka"][layer]) if similar["cka"] else None,
            "svcca": plain(similar["svcca"][layer]) if similar["svcca"] else None,
            "usable_information_lost": plain(self.probes[layer]) if self.probes else None,
            "code_entropy": codes[layer],
            "first_order": mean(measured.tangent[:, layer]),
            "score": mean(measured.score[:, layer]),
            "bound": mean(self.bound[:, layer]),
        }
        row["sinks"] = {
            "first": float(measured.first[:, layer].median()),
            "longest": float(measured.longest[:, layer].median()),
            "positions": measured.sinks.at(layer),
        }
        if measured.group == "vision":
            row["attention_mass"] = mean(measured.mass[:, layer])
            row["value_weighted_mass"] = mean(measured.moved[:, layer])
            row["key_removal"] = mean(measured.removal[:, layer])
        return row

    def predictors(self) -> dict[str, Tensor]:
        """Return notion -> (n l); what is known per layer only stands in every row."""
        measured = self.measured

        def everywhere(values: Iterable[float]) -> Tensor:
            return torch.tensor([*values], dtype=torch.float64).expand(self.n, -1)

        middle = measured.cosine.median()
        columns = {
            "cosine": measured.cosine,
            "rho": measured.rho,
            "proximal": (measured.cosine > middle).double(),
            "first_order": measured.tangent,
            "score": measured.score,
            "bound": self.bound,
        }
        for name, intervals in self.similar.items():
            if intervals:
                columns[name] = everywhere(i.estimate for i in intervals)
        if self.probes:
            columns["usable_information_lost"] = everywhere(i.estimate for i in self.probes)
        if all(self.codes):
            columns["code_entropy"] = everywhere(rows[-1]["entropy"] for rows in self.codes)
        if measured.group == "vision":
            columns |= {"attention_mass": measured.mass, "value_weighted_mass": measured.moved}
            columns["key_removal"] = measured.removal
        return columns

    def _similarity(self, name: str) -> list[Interval] | None:
        folds = torch.randperm(self.n, generator=torch.Generator().manual_seed(self.seed)) % min(_FOLDS, self.n)
        tokens = self.measured.tokens
        intervals = []
        try:
            for layer in range(self.n_layers):
                parts = [
                    Moments.of(tokens[folds == fold, :, layer], tokens[folds == fold, :, layer + 1])
                    for fold in range(int(folds.max()) + 1)
                ]
                intervals.append(dissimilarity(parts, name, self.level))
        except DataError as error:
            self.undecided[name] = str(error)
            return None
        return intervals

    def _probes(self) -> list[Interval] | None:
        measured = self.measured
        try:
            losses = [probe_loss(states, measured.drawn, seed=self.seed) for states in measured.pooled.unbind(1)]
            return [
                usable_information_lost(losses[layer], losses[layer + 1], self.level) for layer in range(self.n_layers)
            ]
        except DataError as error:
            self.undecided["usable_information_lost"] = str(error)
            return None

    def _codes(self) -> list[list[dict[str, Any]]]:
        tokens = self.measured.tokens
        sizes = sizes_for(tokens.shape[0] * tokens.shape[1], (2, 4, 8))
        if not sizes:
            self.undecided["code_entropy"] = f"K=2 codes need at least 40 states, got {len(tokens) * tokens.shape[1]}"
        return [
            [
                vars(code_entropy(tokens[:, :, layer], tokens[:, :, layer + 1], size, self.level, seed=self.seed))
                for size in sizes
            ]
            for layer in range(self.n_layers)
        ]

    def state_links(self) -> dict[str, tuple[int, int]]:
        """Return link -> times checked and violated: 1 (tails), 5 (Fano) and 6b (a band's entry and exit)."""
        tails = torch.tensor([0.5, 1.0, 2.0])
        checked: dict[str, list[bool]] = {"1 proximal": [], "1 geometric": [], "5 fano": [], "6b band": []}
        for column in self.measured.cosine.T:
            curve, eps = TailCurve.of(column), column.mean()
            for delta in (eps * tails).clamp_min(1e-12):
                tau = curve(delta)
                checked["1 proximal"].append(bool(tau > bounds.proximal_from_geometric(eps, delta) + 1e-9))
                checked["1 geometric"].append(bool(eps > bounds.geometric_from_proximal(delta, tau) + 1e-9))
        for rows in self.codes:
            checked["5 fano"].extend(row["entropy"] > row["fano"] + 1e-9 for row in rows)
        # (n m l+1 d) on the unit sphere: half a squared chord is 1 - cos
        unit = torch.nn.functional.normalize(self.measured.tokens.double(), dim=-1)
        steps = (unit.diff(dim=2) ** 2).sum(-1) / 2
        whole = ((unit[:, :, -1] - unit[:, :, 0]) ** 2).sum(-1) / 2
        checked["6b band"] = (whole > bounds.cosine_band(steps) + 1e-9).flatten().tolist()
        return {link: (len(wrong), sum(wrong)) for link, wrong in checked.items()}


def plain(interval: Interval | None) -> dict[str, Any] | None:
    """Return it JSON-ready; an end that the sample cannot tell is None."""
    if interval is None:
        return None
    return {k: v if math.isfinite(v) else None for k, v in vars(interval).items()}
