"""Train without a gradient: find a bank of paths in a run folder, certify what it costs, and end the run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from adaskip.batch import Batch, count
from adaskip.errors import ConfigError
from adaskip.plan import Target
from adaskip.policies.path_bank import PathBank
from adaskip.ranks import launched
from adaskip.recipe import Recipe
from adaskip.runfiles import BANK_PRICES
from adaskip.runtime.attach import RoutedModel, build
from adaskip.stages import Stages
from adaskip.survey.bank import Bank, describe, find_bank, lowest_price
from adaskip.survey.certificate import certify
from adaskip.survey.greedy import Path as Plan
from adaskip.survey.static import whole_rows
from adaskip.training.data import Collator, Record
from adaskip.verbs.budget import Budget
from adaskip.verbs.finish import Ending, TrainResult
from adaskip.verbs.judge import judge

_SIDES = ("chosen", "static")


def bank_model(
    recipe: Recipe,
    folder: Path,
    model: RoutedModel,
    records: Sequence[Record],
    collate: Collator,
    stages: Stages,
) -> RoutedModel:
    """Find a bank on training records and attach it in place of the model's routers; go on from the folder's prices.

    Raises:
        ConfigError: several processes were started; or the budget cannot be held behind ``bank.entry``.
        DataError: too few training records.
        CheckpointError: the prices in the folder are damaged, or of other inputs or another model.
    """
    if launched()[0] > 1:
        raise ConfigError("method path-bank: expected one process, got several; start it without torchrun")
    section, device = recipe.bank, model.spec.device
    chosen = by_length(records[: section.examples])
    size = recipe.trainer.batch_size

    def batches(rows: Sequence[int]) -> list[Batch]:
        parts = [rows[start : start + size] for start in range(0, len(rows), size)]
        return [collate([chosen[row] for row in part]).to(device) for part in parts]

    bank = find_bank(
        model,
        batches,
        len(chosen),
        keep=recipe.objective.keep,
        paths=section.paths,
        groups=section.groups,
        deepest=section.deepest,
        entry=section.entry,
        width=section.width,
        sample=section.sample,
        seed=recipe.seed,
        file=folder / BANK_PRICES,
        stages=stages,
    )
    stages.note(sentence(bank))
    held = model.policy.held
    routed = build(model.detach(), bank.policy(Target(**whole_rows(model.target))), recipe.seed)
    assert isinstance(routed.policy, PathBank)
    bank.load(routed.policy)
    routed.hold(routed.sites.labels(held))
    return routed


def by_length(records: Sequence[Record]) -> list[Record]:
    """Return records with those of like length side by side: a batch is as slow as its longest row."""
    return sorted(records, key=lambda record: len(record["prompt"]) + len(record["answer"]))


def sentence(bank: Bank) -> str:
    """Say what choosing saves, cross-fitted, on the inputs that the bank was found on."""
    figures = bank.figures
    if len(bank.paths) == 1:
        return f"a bank of one path, {figures['static']:.3g} nats a token: choosing by the prompt does not clearly pay"
    chosen, static = (f"{figures[name]:.3g} nats a token at keep {figures[f'{name}_keep']:.3f}" for name in _SIDES)
    paths, best = len(bank.paths), figures["best"]
    return f"a bank of {paths} paths: {chosen}, its static plan {static}, chosen with hindsight {best:.3g}"


@torch.no_grad()
def finish_bank(ending: Ending, model: RoutedModel, validation: list[Batch], plan: Plan | None) -> TrainResult:
    """Hold the budget, certify, check, compare with a static ``plan``, and leave a complete run folder.

    Args:
        ending: of the run; its calibration data fits the certificate's factor and the gauge, and nothing else.
        model: with the bank.
        validation: sets the price that holds the budget, and judges.
        plan: the static one; None: none was sought, or none keeps so little.
    """
    policy, keep, stages = model.policy, ending.recipe.objective.keep, ending.stages
    assert isinstance(policy, PathBank)
    batches, judges = ([batch.to(model.spec.device) for batch in part] for part in (validation, ending.calibration))
    with stages(f"finding the price for objective.keep={keep:g}"):
        predicted = torch.cat([policy.predict(describe(model, batch, policy.entry)) for batch in batches])
        policy.price = lowest_price(predicted.double(), policy.share.double(), keep)
    with stages("validating, and checking the conditions"):
        judgement = judge(model, batches)
        look = ending.look(model)
    with stages(f"certifying costs on {count(judges)} calibration inputs"):
        certificate = certify(model, judges, batches, ending.recipe.objective.alpha)
    budget = Budget(keep, judgement.figures["keep"], 0.0, float(policy.share.min()))
    stages.note(f"objective.keep={keep:g}: mean keep rate {budget.keep:.3f} at a price of {policy.price:.4g} nats")
    ending.laps.lap("check")
    return ending.end(model, batches, budget, judgement.figures, look, judgement.rates, plan, certificate)
