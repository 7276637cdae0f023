"""Keep prices in a file that names what they were measured on, and refuse those of other inputs, weights or settings.

A search is a function of its prices. Taken over from other inputs or another model, they give a plan that looks like
any other, and is wrong.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from adaskip import runfiles
from adaskip.batch import Batch, fingerprints
from adaskip.errors import CheckpointError
from adaskip.plan import Target
from adaskip.runtime.attach import RoutedModel
from adaskip.runtime.fingerprint import fingerprint


class PriceFile:
    """Read and write named tensors beside the name of what they were measured on.

    Args:
        path: of the file, which need not be there yet.
        origin: what prices are measured on, name by name; `find_origin`.
    """

    def __init__(self, path: Path, origin: dict[str, str]) -> None:
        self.path, self.origin = path, origin

    def read(self, *names: str) -> tuple[Tensor, ...] | None:
        """Return the tensors of these names, or None where nothing has been written yet.

        Raises:
            CheckpointError: the file is damaged, or what it holds was measured on something else.
        """
        if not self.path.is_file():
            return None
        try:
            with safe_open(self.path, "pt") as file:
                found = file.metadata() or {}
                self._check(found)
                return tuple(file.get_tensor(name) for name in names)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{self.path}: expected prices, cannot be read ({error}); remove it to measure them anew"
            ) from error

    def write(self, tensors: dict[str, Tensor]) -> None:
        """Write the tensors, whole or not at all."""
        runfiles.write(self.path, save(tensors, metadata=self.origin))

    def _check(self, found: dict[str, str]) -> None:
        differing = [
            f"{name}: expected {value}, found {found.get(name, 'none named')}"
            for name, value in self.origin.items()
            if found.get(name) != value
        ]
        if differing:
            raise CheckpointError(
                f"{self.path}: its prices were measured on something else ({'; '.join(differing)}); remove the file to "
                "measure them anew"
            )


def find_origin(model: RoutedModel, batches: Iterable[Batch], **settings: object) -> dict[str, str]:
    """Name what prices of a model on inputs, in this order, depend on.

    Args:
        model: attached; what its decisions speak of counts, and every weight of its backbone.
        batches: prompts with answers; their padding does not count.
        settings: whatever else does.
    """
    marks = fingerprints(batches)
    target = {field.name: getattr(model.target, field.name) for field in fields(Target)}
    return {
        "inputs": f"{len(marks)} inputs {hashlib.sha256(''.join(marks).encode()).hexdigest()[:16]}",
        "backbone": f"weights {fingerprint(model.spec).digest()[:16]}",
        "settings": " ".join(f"{name}={value}" for name, value in (target | settings).items()),
    }
