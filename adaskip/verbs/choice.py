"""Train nothing: let a method of the field choose what is left out by training inputs, and end the run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from adaskip.batch import Batch
from adaskip.errors import ConfigError
from adaskip.methods.evidence import Evidence
from adaskip.methods.method import find
from adaskip.ranks import launched
from adaskip.runfiles import EVIDENCE
from adaskip.runtime.attach import RoutedModel, build
from adaskip.survey.greedy import Path as Plan
from adaskip.training.data import Collator, NumberedBatches, Record
from adaskip.verbs.budget import Budget
from adaskip.verbs.finish import Ending, TrainResult
from adaskip.verbs.judge import judge

_DEAR = ("costs", "answers")
"""What takes long to look at, and is kept in the run's folder."""
_TRIES = 4
"""Choices at most; validation inputs may keep a little more than those that a choice was made by."""


@torch.no_grad()
def choose_and_finish(
    ending: Ending,
    model: RoutedModel,
    records: Sequence[Record],
    collate: Collator,
    validation: list[Batch],
    static: Plan | None,
) -> TrainResult:
    """Choose within the budget, go on from what the folder knows of costs, check, and leave a complete run folder.

    Args:
        ending: of the run.
        model: of the recipe's target, whatever decides in it; what is chosen takes its policy's place.
        records: of training, the first of which a choice is made by.
        collate: makes batches of them.
        validation: says whether the budget is held, and judges.
        static: the best static plan; None: none was sought, or none keeps so little.

    Raises:
        ConfigError: several processes were started, or no choice of the method keeps so little.
        CheckpointError: the costs in the folder are damaged, or of other inputs or another model.
    """
    recipe, stages = ending.recipe, ending.stages
    if launched()[0] > 1:
        raise ConfigError(f"method {recipe.method}: expected one process, got several; start it without torchrun")
    method, device, keep = find(recipe.method), model.spec.device, recipe.objective.keep
    chosen_by = records[: recipe.choice.examples]
    inputs = NumberedBatches(chosen_by, collate, device, recipe.trainer.batch_size)
    batches = [batch.to(device) for batch in validation]
    backbone, empty = model.detach(), method.empty(recipe.router.group, recipe.router.phase)
    known, evidence = _make_folder(Path(recipe.output)) if method.looks in _DEAR else None, None
    goal, tries, least = keep, 0, ""
    while True:
        model = build(backbone, empty, recipe.seed)
        with stages(f"{method.title}: choosing by {len(chosen_by)} training inputs"):
            evidence = evidence or Evidence(model, inputs, len(chosen_by), known)
            evidence.model = model
            try:
                policy = method.policy(evidence, goal, recipe.seed)
            except ConfigError as error:
                if not tries:
                    raise
                least = f"the method can choose no less by the inputs that it chooses by ({error})"
        model.detach()
        model = build(backbone, policy, recipe.seed)
        with stages("validating the choice"):
            judgement = judge(model, batches)
        kept, tries = judgement.figures["keep"], tries + 1
        reason = least or f"validation inputs keep more than those that it chooses by, after {tries} choices"
        budget = Budget(keep, kept, 0.0, kept, (reason,))
        if budget.met or least or tries == _TRIES:
            break
        goal -= kept - keep
        model.detach()
    stages.note(f"objective.keep={keep:g}: mean keep rate {kept:.3f}")
    with stages("checking the conditions"):
        look = ending.look(model)
    ending.laps.lap("choice")
    return ending.end(model, batches, budget, judgement.figures, look, judgement.rates, static)


def _make_folder(run: Path) -> Path:
    folder = run / EVIDENCE
    folder.mkdir(exist_ok=True)
    return folder
