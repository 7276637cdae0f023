"""Read which finished runs stand in a comparison, and refuse those that cannot, before anything is measured."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from adaskip.errors import ConfigError
from adaskip.plan import Group
from adaskip.recipe import Recipe
from adaskip.runtime.description import CONFIG, WEIGHTS, read_config
from adaskip.verbs.cells import Cell, cell_name
from adaskip.verbs.run import read_recipe, router_folder


@dataclass(frozen=True)
class Entry:
    """Hold what a finished run is called in a comparison, and which saved policy it is."""

    folder: Path
    policy: str
    keep: float
    seed: int
    origin: str  # a mark of the saved policy, its settings and weights
    file: Path  # of its cell


def read_entries(runs: Sequence[Path], model: str, group: Group, cells: Path) -> list[Entry]:
    """Read what runs are called, and which policies they hold.

    Args:
        runs: their folders.
        model: the backbone that is compared on.
        group: the tokens that policies speak of.
        cells: folder of the comparison's cells.

    Raises:
        ConfigError: a run is of another model or group, or its cell is taken by another run.
        CheckpointError: a folder is no finished run, or a cell is damaged.
    """
    entries: list[Entry] = []
    for run in runs:
        recipe = read_recipe(run)
        for name, own, here in (
            ("backbone.path", recipe.backbone.path, model),
            ("router.group", recipe.router.group, group),
        ):
            if own != here:
                raise ConfigError(f"{run}: expected a run with {name}={here}, got {own}; compare it apart")
        saved = router_folder(run)
        policy, keep, seed = _name(recipe, saved), recipe.objective.keep, recipe.seed
        origin = hashlib.sha256(b"".join((saved / name).read_bytes() for name in (CONFIG, WEIGHTS))).hexdigest()[:16]
        file = cells / f"{cell_name(policy, keep, seed)}.json"
        taken = [each.origin for each in entries if each.file == file]
        if file.is_file():
            taken.append(Cell.read(file).origin)
        if any(other != origin for other in taken):
            raise ConfigError(
                f"{run}: expected one run of {policy}, keep {keep:g} and seed {seed}, found another in {file.name}; "
                f"compare it apart: --output {cells.parent}-2"
            )
        entries.append(Entry(run, policy, keep, seed, origin, file))
    return entries


def _name(recipe: Recipe, saved: Path) -> str:
    """Return what a run is called beside the methods: by what it holds, which may be a plan that beat its routers."""
    meta = read_config(saved)
    kind: str = meta["policy"]["kind"] if "policy" in meta else "learned"
    return "from_bounds" if (kind, recipe.method) == ("learned", "from-bounds") else kind
