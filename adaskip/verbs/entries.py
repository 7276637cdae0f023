"""Read which finished runs stand in a comparison, and refuse those that cannot, before anything is measured."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from adaskip.errors import ConfigError
from adaskip.methods.method import METHODS
from adaskip.plan import Group
from adaskip.recipe import Recipe
from adaskip.runtime.description import CONFIG, WEIGHTS, read_config
from adaskip.verbs.cells import Cell, cell_name
from adaskip.verbs.run import read_recipe, router_folder

_LABEL = re.compile(r"[A-Za-z0-9][\w.+-]*")


@dataclass(frozen=True)
class Named:
    """Hold the folder of a run, and what it is called; None: by what it holds."""

    folder: Path
    label: str | None = None


@dataclass(frozen=True)
class Entry:
    """Hold what a finished run is called in a comparison, and which saved policy it is."""

    folder: Path
    policy: str
    keep: float
    seed: int
    origin: str  # a mark of the saved policy, its settings and weights
    file: Path  # of its cell


def read_named(runs: Sequence[str | Path]) -> list[Named]:
    """Read runs as they are typed, ``FOLDER`` or ``LABEL=FOLDER``.

    Raises:
        ConfigError: a label is no name for a file, or that of a method.

    >>> [(run.label, run.folder.name) for run in read_named(["kept=runs/a", "runs/b"])]
    [('kept', 'a'), (None, 'b')]
    """
    found = []
    for run in runs:
        label, equals, folder = str(run).partition("=")
        if not equals or Path(run).exists():  # a folder's own name may hold the sign
            found.append(Named(Path(run)))
            continue
        if not _LABEL.fullmatch(label) or not folder:
            raise ConfigError(
                f"compare: --run {run}: expected LABEL=FOLDER with a label of letters, digits and . + - _, such as "
                f"kept=runs/kept, got {label!r}"
            )
        if label in METHODS:
            raise ConfigError(f"compare: --run {run}: {label} is a method; choose another label, such as my-{label}")
        found.append(Named(Path(folder), label))
    return found


def with_target(target: Path, runs: Sequence[Named]) -> list[Named]:
    """Return the run that is the comparison's subject and the others; it comes once, under a label that it is given."""
    named = {run.folder.resolve() for run in runs}
    return [*runs] if target.resolve() in named else [Named(target), *runs]


def read_entries(runs: Sequence[Named], model: str, group: Group, cells: Path) -> list[Entry]:
    """Read what runs are called, and which policies they hold.

    Args:
        runs: their folders and labels.
        model: the backbone that is compared on.
        group: the tokens that policies speak of.
        cells: folder of the comparison's cells.

    Raises:
        ConfigError: a run is of another model or group, or its cell is taken by another run.
        CheckpointError: a folder is no finished run, or a cell is damaged.
    """
    entries: list[Entry] = []
    for named in runs:
        run, recipe = named.folder, read_recipe(named.folder)
        for name, own, here in (
            ("backbone.path", recipe.backbone.path, model),
            ("router.group", recipe.router.group, group),
        ):
            if own != here:
                raise ConfigError(f"{run}: expected a run with {name}={here}, got {own}; compare it apart")
        saved = router_folder(run)
        policy, keep, seed = named.label or _name(recipe, saved), recipe.objective.keep, recipe.seed
        origin = hashlib.sha256(b"".join((saved / name).read_bytes() for name in (CONFIG, WEIGHTS))).hexdigest()[:16]
        file = cells / f"{cell_name(policy, keep, seed)}.json"
        taken = [each.origin for each in entries if each.file == file]
        if file.is_file():
            taken.append(Cell.read(file).origin)
        if any(other != origin for other in taken):
            raise ConfigError(
                f"{run}: expected one run of {policy}, keep {keep:g} and seed {seed}, found another in {file.name}; "
                f"give it a name of its own: --run LABEL={run}"
            )
        entries.append(Entry(run, policy, keep, seed, origin, file))
    return entries


def _name(recipe: Recipe, saved: Path) -> str:
    """Return what a run is called beside the methods: by what it holds, which may be a plan that beat its routers."""
    meta = read_config(saved)
    kind: str = meta["policy"]["kind"] if "policy" in meta else "learned"
    return "from_bounds" if (kind, recipe.method) == ("learned", "from-bounds") else kind
