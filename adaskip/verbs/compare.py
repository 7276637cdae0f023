"""`adaskip compare`: every policy at every budget on the same inputs; what each recovers, costs and saves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from adaskip.errors import ConfigError, did_you_mean
from adaskip.methods.method import Method, find
from adaskip.methods.names import METHODS
from adaskip.plan import Group
from adaskip.recipe import Recipe
from adaskip.runfiles import COMPARISON_PLOT, write_json
from adaskip.stages import SILENT, Stages
from adaskip.training.digest import digest
from adaskip.training.tracking import Board, wandb_logger
from adaskip.verbs.cells import CELLS
from adaskip.verbs.entries import check_alike, read_entries, read_named, with_target
from adaskip.verbs.filling import Comparison, Filling
from adaskip.verbs.run import check_writable
from adaskip.verbs.splits import check_split
from adaskip.verbs.start import check_tracking, training_mark
from adaskip.verbs.subject import open_subject
from adaskip.verbs.trained import TRAINED, check_apart, plan_trainings, read_recipes

BUDGETS = (0.9, 0.8, 0.7, 0.6, 0.5)
_SETTINGS = "settings.json"


def compare(
    target: str | Path,
    data: str | None = None,
    *,
    policies: Sequence[str] | None = None,
    budgets: Sequence[float] = BUDGETS,
    group: str | None = None,
    runs: Sequence[str | Path] = (),
    train: Sequence[str | Path | Recipe] = (),
    overrides: Sequence[str] = (),
    split: str = "test",
    examples: int = 600,
    fit: int = 200,
    seeds: int = 3,
    batch_size: int = 64,
    new_tokens: int = 8,
    generate: int = 0,
    oracle: int = 0,
    output: str | Path | None = None,
    wandb: str = "disabled",
    stages: Stages = SILENT,
) -> Comparison:
    """Choose layers by every method at every budget, run the plans and finished runs on the same inputs, and compare.

    Every cell, one policy at one budget and seed, is stored as it is done: a comparison that was stopped goes on, and
    a policy that is added later costs its own cells alone.

    Args:
        target: a Hugging Face id, a folder, ``digits-vlm``, or the folder of a run, whose model, data and group are
            then taken, and which is compared too.
        data: a folder of JSON lines, or a dataset id; default: the run's, or the demo's for the demo.
        policies: names of methods, and ``learned``, ``from_bounds``, ``path_bank`` or ``token_plan``, which are
            trained; default: all methods that speak of the group. ``none`` and ``random`` are always there.
        budgets: executed over dense decoder FLOPs that plans may keep, mean over the inputs that they are fitted on.
        group: ``all`` or ``vision``; default: the run's, or ``all``.
        runs: folders of finished runs on the same model and group, each compared at the budget it was trained for;
            ``LABEL=FOLDER`` gives one a name of its own, so that runs of one method stand apart.
        train: recipes to train for every budget and seed, in the folder of the comparison; ``LABEL=RECIPE`` gives their
            policy a name of its own. Policies that are trained and have no recipe here take the run's, a variant of the
            first here, or of one that ships for this model and group.
        overrides: ``["trainer.steps=400"]``, of all recipes that are trained.
        split: that is judged on.
        examples: inputs of it.
        fit: inputs of split ``train`` that plans are chosen by.
        seeds: draws of a method that draws, and trainings.
        batch_size: inputs at once, also where seconds are taken.
        new_tokens: generated where seconds are taken.
        generate: so many inputs, the first ones, are also answered freely, by every policy; 0: none.
        oracle: so many inputs also get a plan of their own at every budget; 0: none.
        output: the folder; default ``runs/compare-NAME-GROUP``.
        wandb: ``offline`` or ``online``: the rows and the picture also go to Weights & Biases.
        stages: hears what is under way.

    Raises:
        ConfigError, DataError: no such method, group, split or budget, or the folder holds another comparison.
        CheckpointError: no such run, or a file of the comparison is damaged.
    """
    budgets = tuple(dict.fromkeys(budgets))
    chosen, learned = _check(policies, budgets, group, split, seeds)
    named, given = read_named(runs), read_recipes(train, overrides)
    if overrides and not (learned or given):
        raise ConfigError(
            f"compare: --set {overrides[0]}: changes recipes that are trained, and none is; name one, --train RECIPE, "
            f"or a policy, --policies {TRAINED[0]}"
        )
    mode = check_tracking(wandb, "--wandb")
    subject = open_subject(target, data, group)
    folder = Path(output or f"runs/compare-{Path(subject.model).name}-{subject.group}")
    check_writable(folder, "the comparison", "choose another folder: --output DIR")
    if subject.recipe is not None:
        named = with_target(Path(target), named)
    test, fitted = subject.records(split, examples), subject.records("train", fit)
    weights = subject.backbone_section.model_dump(include={"dtype", "quantise", "revision"})
    setting = {
        "model": subject.model, "data": subject.source, "group": subject.group, "split": split, "examples": examples,
        "fit": fit, "batch_size": batch_size, "new_tokens": new_tokens, "generate": generate,
        "weights": weights, "digests": {"judged": digest(test), "chosen_by": digest(fitted)},
    }  # fmt: skip
    _claim(folder, setting)
    entries = read_entries(named, subject, folder / CELLS)
    trainings = plan_trainings(subject, learned, given, overrides, budgets, seeds, folder)
    check_apart(entries, trainings, folder)
    marks = [(str(entry.folder), entry.policy, entry.recipe) for entry in entries]
    marks += [(str(training.folder), training.policy, training_mark(training.recipe)) for training in trainings]
    check_alike(marks, folder / CELLS)
    bench = Filling(subject, test, fitted, folder, setting, stages)
    left_out = [text for method in chosen for text in bench.method(method, budgets, seeds)]
    for entry in entries:
        bench.run(entry)
    left_out += [text for training in trainings for text in bench.train(training)]
    found = bench.conclude(left_out, oracle, budgets)
    if mode != "disabled":
        board = Board([wandb_logger(folder, mode, "adaskip", None, ["compare"], found.setting)])
        board.comparison(found.rows, folder / COMPARISON_PLOT)
        board.finish()
    return found


def read_budgets(text: str) -> tuple[float, ...]:
    """Read budgets out of what was typed.

    Raises:
        ConfigError: no list of numbers.

    >>> read_budgets("0.9, 0.5")
    (0.9, 0.5)
    """
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"compare: expected --budgets as numbers, such as 0.9,0.7, got {text!r}") from None


def _check(
    policies: Sequence[str] | None, budgets: Sequence[float], group: str | None, split: str, seeds: int
) -> tuple[list[Method], list[str]]:
    """Refuse what cannot be compared, before anything is loaded.

    Returns the methods, the controls among them, and the names of policies that are trained.
    """
    check_split(split)
    if split == "train":
        raise ConfigError("compare: --split train: plans are chosen by it; judge on test or validation")
    if group not in (None, *get_args(Group)):
        raise ConfigError(f"compare: expected --group all or vision, got {group!r}")
    if wrong := [budget for budget in budgets if not 0 < budget <= 1]:
        raise ConfigError(f"compare: expected --budgets in (0, 1], such as 0.9,0.7, got {wrong[0]:g}")
    if seeds < 1:
        raise ConfigError(f"compare: expected --seeds of at least 1, got {seeds}")
    names = dict.fromkeys(METHODS if policies is None else ("none", "random", *policies))
    if unknown := [name for name in names if name not in (*METHODS, *TRAINED)]:
        raise ConfigError(
            f"compare: --policies {unknown[0]!r}: no such method, {did_you_mean(unknown[0], (*METHODS, *TRAINED))}"
        )
    return [find(name) for name in names if name in METHODS], [name for name in names if name in TRAINED]


def _claim(folder: Path, setting: dict[str, Any]) -> None:
    """Make the folder this comparison's, and refuse one that holds another."""
    file = folder / _SETTINGS
    (folder / CELLS).mkdir(parents=True, exist_ok=True)
    if not file.is_file():
        write_json(file, setting, indent=1)
        return
    try:
        stored = {"generate": 0} | json.loads(file.read_text(encoding="utf-8"))  # which older comparisons do not say
    except ValueError as error:
        raise ConfigError(f"{file}: cannot be read ({error}); choose another folder: --output {folder}-2") from error
    other = [key for key in setting if key in stored and stored[key] != setting[key]]  # older ones do not say all
    if other == ["digests"]:
        raise ConfigError(
            f"{folder}: holds a comparison on other inputs of {setting['data']}, which has changed since; choose "
            f"another folder: --output {folder}-2"
        )
    if differs := [f"{key}={stored[key]!r}" for key in other if key != "digests"]:
        raise ConfigError(
            f"{folder}: holds a comparison with {', '.join(differs)}; choose another folder: --output {folder}-2"
        )
