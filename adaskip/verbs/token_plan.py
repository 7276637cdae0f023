"""Train without a gradient: plan what each class of tokens leaves out, in a run folder, and end the run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from adaskip.batch import Batch
from adaskip.errors import ConfigError
from adaskip.plan import Target
from adaskip.ranks import launched
from adaskip.recipe import Recipe
from adaskip.runfiles import TOKEN_PRICES
from adaskip.runtime.attach import RoutedModel, build
from adaskip.stages import Stages
from adaskip.survey.greedy import Path as Plan
from adaskip.survey.token_plan import TokenPlans, find_token_plans
from adaskip.training.data import Collator, Record
from adaskip.verbs.bank import by_length
from adaskip.verbs.budget import Budget
from adaskip.verbs.finish import Ending, TrainResult
from adaskip.verbs.judge import judge

_SPARE = 0.01
"""Share of the FLOPs that plans go below the budget: validation inputs may keep a little more than those planned on."""


def plan_tokens(
    recipe: Recipe, folder: Path, model: RoutedModel, records: Sequence[Record], collate: Collator, stages: Stages
) -> TokenPlans:
    """Find nested plans on training records; go on from the costs in the folder.

    Raises:
        ConfigError: several processes were started; or the budget cannot be held behind ``tokens.entry``.
        DataError: too few tokens.
        CheckpointError: the costs in the folder are damaged, or of other inputs or another model.
    """
    if launched()[0] > 1:
        raise ConfigError("method token-plan: expected one process, got several; start it without torchrun")
    section, size = recipe.tokens, recipe.trainer.batch_size
    chosen = by_length(records[: section.examples])
    parts = [chosen[start : start + size] for start in range(0, len(chosen), size)]
    return find_token_plans(
        model,
        [collate(part).to(model.spec.device) for part in parts],
        keep=max(recipe.objective.keep - _SPARE, 0.0),
        classes=(section.prompt, section.answer),
        entry=section.entry,
        band=section.band,
        width=section.width,
        seed=recipe.seed,
        file=folder / TOKEN_PRICES,
        stages=stages,
    )


@torch.no_grad()
def finish_tokens(
    ending: Ending, model: RoutedModel, plans: TokenPlans, validation: list[Batch], static: Plan | None
) -> TrainResult:
    """Hold the budget, check, compare with a ``static`` plan, and leave a complete run folder.

    Args:
        ending: of the run.
        model: that the plans were found on; the one that holds the budget takes its policy's place.
        plans: nested ones.
        validation: says which of them holds the budget, and judges.
        static: the best plan for all tokens; None: none was sought, or none keeps so little.
    """
    keep, stages, held = ending.recipe.objective.keep, ending.stages, model.policy.held
    target = Target(**{name: getattr(model.target, name) for name in ("scope", "unit", "group", "kv", "phase")})
    backbone = model.detach()
    batches = [batch.to(model.spec.device) for batch in validation]
    count = next((n for n, step in enumerate(plans.steps, 1) if step.keep <= keep), len(plans.steps))
    while True:
        model = build(backbone, plans.policy(count, target), ending.recipe.seed)
        plans.load(model.policy)  # type: ignore[arg-type]
        model.hold(model.sites.labels(held))
        with stages(f"validating the plan of {count} steps"):
            judgement = judge(model, batches)
        budget = Budget(keep, judgement.figures["keep"], 0.0, plans.steps[-1].keep)
        if budget.met or count == len(plans.steps):
            break
        count, backbone = count + 1, model.detach()
    stages.note(f"objective.keep={keep:g}: mean keep rate {budget.keep:.3f} after {count} steps")
    with stages("checking the conditions"):
        look = ending.look(model)
    ending.laps.lap("check")
    return ending.end(model, batches, budget, judgement.figures, look, judgement.rates, static)
