"""Train recipes for a comparison: a run for each policy, budget and seed, in the comparison's folder, each once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaskip.errors import ConfigError
from adaskip.recipe import Recipe, dump, load, recipes
from adaskip.runfiles import BANK_PRICES, ENVIRONMENT, RECIPE, SUMMARY, TOKEN_PRICES, write, write_text
from adaskip.stages import Stages
from adaskip.verbs.cells import CELLS, cell_name
from adaskip.verbs.entries import FOUND_BY, Entry, check_same, name_found, same_place, split_label
from adaskip.verbs.start import changed_keys
from adaskip.verbs.subject import Subject
from adaskip.verbs.train import train

RUNS = "runs"
_UNTUNED = ["trainer.steps=0", "static.start=false", "conditions.on_violation=warn"]
_BY_METHOD: dict[str, list[str]] = {
    "learned": [],
    "from_bounds": _UNTUNED,
    "path_bank": ["router.scope=prompt", *_UNTUNED],
    "token_plan": ["router.scope=token", "objective.gradient=straight-through", *_UNTUNED],
}
"""What each policy that training finds asks of a recipe that was written for another one, beside its method."""
TRAINED = tuple(_BY_METHOD)
"""Policies that training finds, by the names that a comparison has for them."""
# a comparison judges the policy itself, whatever becomes of it, and keeps its own log
_SETTLED: dict[str, Any] = {
    "static.fallback": False,
    "conditions.on_violation": "warn",
    "tracking.wandb": "disabled",
    "trainer.progress": False,
}


@dataclass(frozen=True)
class Training:
    """Hold one run that a comparison needs: what its policy is called there, and the recipe of this budget and seed."""

    policy: str
    recipe: Recipe

    @property
    def folder(self) -> Path:
        """Return the folder of the run."""
        return Path(self.recipe.output)

    def cell(self, folder: Path) -> Path:
        """Return the file of its cell, in the folder of all cells."""
        return folder / f"{cell_name(self.policy, self.recipe.objective.keep, self.recipe.seed)}.json"

    def run(self, stages: Stages) -> None:
        """Train, or go on with what was stopped; nothing where the run has finished.

        Raises:
            AdaSkipError: as `adaskip.train`.
        """
        if (self.folder / SUMMARY).is_file():
            return
        if not (self.folder / RECIPE).is_file():
            self._take_over_prices()
        keep, seed = self.recipe.objective.keep, self.recipe.seed
        stages.note(f"training {self.policy} at keep {keep:g}, seed {seed}, in {self.folder}")
        train(self.recipe, resume=(self.folder / RECIPE).is_file(), stages=stages)

    def _take_over_prices(self) -> None:
        """Begin with the exact costs that a search for another budget has measured: they do not depend on it."""
        for name in (BANK_PRICES, TOKEN_PRICES):
            for file in sorted(self.folder.parent.glob(f"*/{name}")):
                other = load(file.parent / RECIPE)
                if changed_keys(other, load(self.recipe, {"objective.keep": other.objective.keep})):
                    continue
                self.folder.mkdir(parents=True, exist_ok=True)
                write_text(self.folder / RECIPE, dump(self.recipe))  # with which a run has begun, and goes on
                write(self.folder / ENVIRONMENT, (file.parent / ENVIRONMENT).read_bytes())
                write(self.folder / name, file.read_bytes())
                return


def read_recipes(given: Sequence[str | Path | Recipe], overrides: Sequence[str]) -> dict[str, Recipe]:
    """Read recipes as they are typed, ``RECIPE`` or ``LABEL=RECIPE``, by what their policies are called.

    Args:
        given: names that `adaskip ls` shows, YAML files, or recipes that were loaded before.
        overrides: ``["trainer.steps=400"]``.

    Raises:
        ConfigError: a recipe cannot be read, or two are called alike.
    """
    found: dict[str, Recipe] = {}
    for each in given:
        label, named = (None, each) if isinstance(each, Recipe) else split_label("--train", each, "RECIPE")
        recipe = load(named, overrides)
        policy = label or name_found(recipe.method)
        if policy in found:
            raise ConfigError(
                f"compare: --train: expected one recipe for {policy}, got two; give one a name of its own: "
                "--train LABEL=RECIPE"
            )
        found[policy] = recipe
    return found


def plan_trainings(
    subject: Subject,
    names: Sequence[str],
    given: dict[str, Recipe],
    overrides: Sequence[str],
    budgets: Sequence[float],
    seeds: int,
    folder: Path,
) -> list[Training]:
    """Return the runs that a comparison needs, seed by seed of each budget and policy.

    A policy that no given recipe finds is found by a variant of the recipe of the run that is compared on, of the first
    given one, or of one that ships for this model and group.

    Args:
        subject: what is compared on.
        names: of policies that training finds.
        given: recipes by what their policies are called.
        overrides: that recipes which are not given get as well.
        budgets: each a keep rate.
        seeds: of training.
        folder: of the comparison.

    Raises:
        ConfigError: a recipe is of another model, data or group, no recipe finds a policy, or the comparison holds
            another run of that name.
    """
    for policy, recipe in given.items():
        check_same(f"compare: --train {policy}", "recipe", recipe, subject, same_data=True)
    chosen = {name: _variant(subject, name, given, overrides) for name in names if name not in given} | given
    trainings = [
        Training(policy, load(recipe, _SETTLED | _place(folder, policy, budget, seed)))
        for policy, recipe in chosen.items()
        for budget in budgets
        for seed in range(seeds)
    ]
    for training in trainings:
        _check_unchanged(training, folder)
    return trainings


def check_apart(entries: Sequence[Entry], trainings: Sequence[Training], folder: Path) -> None:
    """Refuse a finished run under the name of one that is trained here, before either is measured.

    Raises:
        ConfigError: names both.
    """
    cells = {training.cell(folder / CELLS): training.folder for training in trainings}
    for entry in entries:
        if entry.folder.resolve() != cells.get(entry.file, entry.folder).resolve():
            raise ConfigError(
                f"{entry.folder}: expected another name than {entry.policy}, which is also trained here, at keep "
                f"{entry.keep:g} and seed {entry.seed}; give it one of its own: --run LABEL={entry.folder}"
            )


def _place(folder: Path, policy: str, budget: float, seed: int) -> dict[str, Any]:
    return {"objective.keep": budget, "seed": seed, "output": str(folder / RUNS / cell_name(policy, budget, seed))}


def _variant(subject: Subject, policy: str, given: dict[str, Recipe], overrides: Sequence[str]) -> Recipe:
    """Return a recipe that finds a policy: the first whose method does, else the first, changed."""
    bases: list[Any] = [*filter(None, [subject.recipe]), *given.values()] or [
        name
        for name, file in recipes().items()
        if same_place((recipe := load(file)).backbone.path, subject.model) and recipe.router.group == subject.group
    ]
    if not bases:
        raise ConfigError(
            f"compare: --policies {policy}: no recipe is known for {subject.model} and group {subject.group}; "
            "name one: --train RECIPE (see them with: adaskip ls)"
        )
    own = [base for base in bases if name_found(load(base).method) == policy]
    method = next(method for method, found in FOUND_BY.items() if found == policy)
    untuned = ["trainer.steps=0"] if policy in ("path_bank", "token_plan") else []
    changes = untuned if own else [f"method={method}", *_BY_METHOD[policy]]
    # what a method must have comes last: the steps that somebody asks for are those of routers
    recipe = load((own or bases)[0], [*overrides, *changes])
    check_same(f"compare: --policies {policy}", "recipe", recipe, subject, same_data=True)
    return recipe


def _check_unchanged(training: Training, folder: Path) -> None:
    """Refuse to take another run for this one."""
    resolved, cell = training.folder / RECIPE, training.cell(folder / CELLS)
    instead = (
        "give the recipe a name of its own, --train LABEL=RECIPE, or choose another folder: --output "
        f"{training.folder.parents[1]}-2"
    )
    if cell.is_file() and not (training.folder / SUMMARY).is_file():
        raise ConfigError(
            f"{cell}: was measured on another run than that of {training.folder}, which is not there; {instead}"
        )
    if resolved.is_file() and (changed := changed_keys(load(resolved), training.recipe)):
        raise ConfigError(f"{training.folder}: holds a run with another {', '.join(changed[:5])}; {instead}")
