"""Remember what paths cost inputs: no price is measured twice, and a search that was stopped goes on from its file.

Planning is a function of prices alone. So nothing else has to be stored: run again, it asks for the same prices in the
same order, and those that the ledger knows cost nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from adaskip.survey.greedy import Path, Price
from adaskip.survey.price_file import PriceFile


class Ledger:
    """Ask for prices once.

    Args:
        price: what paths cost inputs, asked for what is not known yet.
        inputs: how many there are.
        file: where prices are kept after every question that had to be measured; None: in memory only.

    Raises:
        CheckpointError: the file is damaged, or its prices were measured on something else.
    """

    def __init__(self, price: Price, inputs: int, file: PriceFile | None = None) -> None:
        self.price, self.inputs, self.file = price, inputs, file
        self.known: dict[Path, Tensor] = {}  # float64 (n) each, NaN where it was not measured
        stored = None if file is None else file.read("skip", "cost")
        for skip, column in () if stored is None else zip(*stored, strict=True):
            self.known[tuple(skip.nonzero().flatten().tolist())] = column.clone()

    def __call__(self, paths: Sequence[Path], rows: Sequence[int]) -> Tensor:
        """Return what paths cost inputs, float64 (n p); a `Price`."""
        chosen = torch.tensor(list(rows))
        groups: dict[tuple[int, ...], list[Path]] = {}  # inputs that lack a price -> the paths that they lack
        for path in dict.fromkeys(paths):
            column = self.known.setdefault(path, torch.full((self.inputs,), torch.nan, dtype=torch.float64))
            if len(lacking := chosen[column[chosen].isnan()]):
                groups.setdefault(tuple(lacking.tolist()), []).append(path)
        for lacking_rows, lacking_paths in groups.items():
            measured = self.price(lacking_paths, lacking_rows).double().cpu()
            for path, column in zip(lacking_paths, measured.T, strict=True):
                self.known[path][list(lacking_rows)] = column
            self._write()
        return torch.stack([self.known[path][chosen] for path in paths], 1)

    def _write(self) -> None:
        if self.file is None:
            return
        layers = 1 + max((layer for path in self.known for layer in path), default=0)
        skip = torch.zeros(len(self.known), layers, dtype=torch.bool)
        for row, path in zip(skip, self.known, strict=True):
            row[list(path)] = True
        self.file.write({"skip": skip, "cost": torch.stack([*self.known.values()])})
