"""Read which finished runs stand in a comparison, and refuse those that cannot, before anything is measured."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaskip import sources
from adaskip.errors import ConfigError
from adaskip.methods.names import METHODS
from adaskip.recipe import Recipe
from adaskip.runfiles import LEARNED
from adaskip.runtime.description import read_config
from adaskip.verbs.cells import Cell, cell_name
from adaskip.verbs.run import policy_mark, read_recipe, router_folder
from adaskip.verbs.start import training_mark
from adaskip.verbs.subject import Subject

FOUND_BY = {
    "end-to-end": "learned",
    "from-bounds": "from_bounds",
    "path-bank": "path_bank",
    "token-plan": "token_plan",
}
"""What a comparison calls the policies that are trained."""
_WEIGHTS = ("dtype", "quantise", "revision")
"""What of a backbone's section says which weights it has; the dense model of a comparison has one kind."""
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
    recipe: str  # a mark of what it was trained by, but for budget and seed
    file: Path  # of its cell


def name_found(method: str) -> str:
    """Return what a comparison calls the policy that a recipe's method finds.

    A choice that a run made stands apart from the one that a comparison makes of its own inputs.

    >>> name_found("end-to-end"), name_found("fastv")
    ('learned', 'fastv-run')
    """
    return FOUND_BY.get(method, f"{method}-run")


def split_label(option: str, text: str | Path, what: str) -> tuple[str | None, str]:
    """Split what is typed as ``LABEL=FOLDER`` or as a folder alone; a label that is not there is None.

    Args:
        option: that it was typed behind, for errors.
        text: as typed.
        what: the word for what the label is of.

    Raises:
        ConfigError: the label is no name for a file, or that of a method.
    """
    label, equals, rest = str(text).partition("=")
    if not equals or Path(text).exists():  # a file's own name may hold the sign
        return None, str(text)
    if not _LABEL.fullmatch(label) or not rest:
        raise ConfigError(
            f"compare: {option} {text}: expected LABEL={what} with a label of letters, digits and . + - _, such as "
            f"kept=runs/kept, got {label!r}"
        )
    if label in METHODS:
        raise ConfigError(f"compare: {option} {text}: {label} is a method; choose another label, such as my-{label}")
    return label, rest


def read_named(runs: Sequence[str | Path]) -> list[Named]:
    """Read runs as they are typed, ``FOLDER`` or ``LABEL=FOLDER``.

    Raises:
        ConfigError: a label is none.

    >>> [(run.label, run.folder.name) for run in read_named(["kept=runs/a", "runs/b"])]
    [('kept', 'a'), (None, 'b')]
    """
    split = [split_label("--run", run, "FOLDER") for run in runs]
    return [Named(Path(folder), label) for label, folder in split]


def with_target(target: Path, runs: Sequence[Named]) -> list[Named]:
    """Return the run that is the comparison's subject and the others; it comes once, under a label that it is given."""
    named = {run.folder.resolve() for run in runs}
    return [*runs] if target.resolve() in named else [Named(target), *runs]


def read_entries(runs: Sequence[Named], subject: Subject, cells: Path) -> list[Entry]:
    """Read what runs are called, and which policies they hold.

    Args:
        runs: their folders and labels.
        subject: what is compared on.
        cells: folder of the comparison's cells.

    Raises:
        ConfigError: a run is of another model or group, has trained on what is judged, or its cell is another run's.
        CheckpointError: a folder is no finished run, or a cell is damaged.
    """
    entries: list[Entry] = []
    for named in runs:
        run, recipe = named.folder, read_recipe(named.folder)
        check_same(str(run), "run", recipe, subject)
        saved = router_folder(run)
        policy, keep, seed = named.label or _name(recipe, saved), recipe.objective.keep, recipe.seed
        origin = policy_mark(saved)
        file = cells / f"{cell_name(policy, keep, seed)}.json"
        taken = [each.origin for each in entries if each.file == file]
        if file.is_file():
            taken.append(Cell.read(file).origin)
        if any(other != origin for other in taken):
            raise ConfigError(
                f"{run}: expected one run of {policy}, keep {keep:g} and seed {seed}, found another in {file.name}; "
                f"give it a name of its own: --run LABEL={run}"
            )
        healed = "-healed" if recipe.lora is None and read_config(saved).get("adapters") else ""
        entries.append(Entry(run, policy, keep, seed, origin, training_mark(recipe) + healed, file))
    return entries


def check_alike(wanted: Iterable[tuple[str, str, str]], cells: Path) -> None:
    """Refuse runs of different settings under one name: a row averages its seeds, and a curve joins its budgets.

    Args:
        wanted: of each run where it is, what it is called, and the mark of what it is trained by.
        cells: folder of the comparison's cells.

    Raises:
        ConfigError: names a run, and how to give it a name of its own.
    """
    known = {cell.policy: (cell.name, cell.recipe) for cell in map(Cell.read, cells.glob("*.json")) if cell.recipe}
    for where, policy, mark in wanted:
        other, theirs = known.setdefault(policy, (where, mark))
        if theirs != mark:
            raise ConfigError(
                f"{where}: expected a run of {policy} trained by the recipe of {other} but for keep and seed, got one "
                f"of other settings; give it a name of its own: --run LABEL={where}, or --train LABEL=RECIPE"
            )


def check_same(where: str, what: str, recipe: Recipe, subject: Subject, same_data: bool = False) -> None:
    """Refuse a recipe of something else than what is compared on.

    Args:
        where: begins the error.
        what: has the recipe.
        recipe: of a run, or to train by.
        subject: what is compared on.
        same_data: whether it must be of the same data as well.

    Raises:
        ConfigError: names the key.
    """
    own, here = recipe.backbone, subject.backbone_section
    pairs: list[tuple[str, Any, Any]] = [("backbone.path", own.path, subject.model)]
    pairs.append(("router.group", recipe.router.group, subject.group))
    pairs += [(f"backbone.{name}", getattr(own, name), getattr(here, name)) for name in _WEIGHTS]
    if same_data:
        pairs.append(("data.source", recipe.data.source, subject.source))
    if same_place(recipe.data.source, subject.source) and not sources.is_shipped(subject.source):
        pairs.append(
            ("data.seed", recipe.data.seed, subject.data_section.seed)
        )  # another one trains on what is judged here
    for name, its, wanted in pairs:
        if its != wanted and not (isinstance(its, str) and same_place(its, str(wanted))):
            raise ConfigError(f"{where}: expected a {what} with {name}={wanted}, got {its}; compare it apart")


def same_place(one: str, other: str) -> bool:
    """Return whether two names of a model or of data mean the same, of folders wherever they are looked at from."""
    return one == other or (Path(other).is_dir() and Path(one).resolve() == Path(other).resolve())


def _name(recipe: Recipe, saved: Path) -> str:
    """Return what a run is called beside the methods: by what it holds, which may be a plan that beat its policy."""
    meta = read_config(saved)
    kind: str = meta["policy"]["kind"] if "policy" in meta else "learned"
    beaten = (saved.parent / LEARNED).is_dir()
    return name_found(recipe.method) if kind == "learned" or (recipe.chooses and not beaten) else kind
