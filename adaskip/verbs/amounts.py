"""How many inputs a piece of work needs, said before it starts."""

from __future__ import annotations

from adaskip.errors import DataError
from adaskip.recipe import Recipe
from adaskip.theory.conditions import LEAST
from adaskip.theory.conformal import smallest_sample
from adaskip.theory.prices import fewest_inputs
from adaskip.training.reading import describe_half


def fitted(recipe: Recipe) -> int:
    """Count the calibration inputs, the first ones, that training fits the bound's constants on."""
    return 2 * recipe.conditions.examples


def enough_to_train(recipe: Recipe, validation: int, calibration: int) -> None:
    """Check that a run's splits are large enough for what follows on them.

    Args:
        recipe: of the run.
        validation: inputs that the validation split holds.
        calibration: inputs that the calibration split holds.

    Raises:
        DataError: they are not; says which split or which key is too small, what is needed, and why.
    """
    examples, alpha = recipe.conditions.examples, recipe.objective.alpha
    needed, faults = fewest_inputs(alpha, recipe.objective.price), []
    price = " and objective.price=functional" if recipe.objective.price == "functional" else ""
    if fitted(recipe) < needed:
        faults.append(
            f"conditions.examples: expected at least {-(-needed // 2)}, got {examples}: twice as many calibration "
            f"inputs fit the bound's constants, which at objective.alpha={alpha:g}{price} takes {needed}; raise "
            "conditions.examples or objective.alpha"
        )
    elif calibration < needed:
        faults.append(
            f"calibration: expected at least {needed} inputs at objective.alpha={alpha:g}{price}, got {calibration}; "
            f"{_more(recipe, 'calibration')}, or raise objective.alpha"
        )
    if examples < LEAST:
        faults.append(
            f"conditions.examples: expected at least {LEAST} inputs to judge the routers' skips on, got {examples}"
        )
    elif validation < LEAST:
        faults.append(
            f"validation: expected at least {LEAST} inputs to judge the routers' skips on, got {validation}; "
            f"{_more(recipe, 'validation')}"
        )
    if faults:
        raise DataError("\n  ".join(["train: too few inputs, nothing was started", *faults]))


def enough_to_check(recipe: Recipe, fresh: int, split: str, calibration: int | None) -> None:
    """Check that a run can be judged on so many fresh inputs of a split; ``calibration``: so many serve bands.

    Raises:
        DataError: it cannot.
    """
    if fresh < LEAST:
        raise DataError(
            f"check: expected at least {LEAST} inputs that nothing was fitted on, got {fresh} of split {split}; "
            f"{_more(recipe, split)}"
        )
    needed = smallest_sample(recipe.objective.alpha)
    if calibration is not None and min(calibration, fitted(recipe)) < needed:
        raise DataError(
            f"check --bands: expected at least {needed} calibration inputs at objective.alpha="
            f"{recipe.objective.alpha:g}, got {min(calibration, fitted(recipe))}; {_more(recipe, 'calibration')}, "
            "or leave --bands out"
        )


def _more(recipe: Recipe, split: str) -> str:
    """Say how a split gets more inputs, and where half of them went."""
    half = describe_half(recipe.data.source, split)
    return f"give {split}.jsonl more lines (or raise data.examples.{split}){half and f' ({half})'}"
