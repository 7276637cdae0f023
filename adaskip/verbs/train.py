"""`adaskip train`: one recipe, from its data to trained routers in a complete run folder."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
from torch.utils.data import DataLoader

from adaskip.batch import Batch, count
from adaskip.errors import CheckpointError
from adaskip.ranks import closes_its_group, is_first_process, is_lost_process, says_when_lost
from adaskip.recipe import Recipe, load
from adaskip.runfiles import CONDITIONS, RECIPE
from adaskip.runtime.adapters import adapt
from adaskip.runtime.attach import RoutedModel, attach
from adaskip.sections import Overrides
from adaskip.smoke.rehearsal import rehearse
from adaskip.stages import SILENT, Stages
from adaskip.survey.calibration import price_layers
from adaskip.survey.greedy import Path as Plan
from adaskip.survey.skips import measure_skips
from adaskip.survey.standardise import standardise
from adaskip.theory.prices import Prices
from adaskip.theory.tables import LayerMeasures
from adaskip.training.bad_records import BadRecords
from adaskip.training.callbacks import ConditionCheck
from adaskip.training.checkpoints import RoundsBySteps
from adaskip.training.data import SPLITS, Collator, Record, SharedBatches, loader, training_loader
from adaskip.training.fit_run import fit_in_folder
from adaskip.training.module import RouterTuner
from adaskip.training.objective import Objective
from adaskip.training.steps import StepCount
from adaskip.training.tracking import Board, Laps, truncate_lines
from adaskip.verbs.amounts import enough_to_train, fitted
from adaskip.verbs.bank import bank_model, finish_bank
from adaskip.verbs.budget import lightest
from adaskip.verbs.choice import choose_and_finish
from adaskip.verbs.data_used import DataUsed
from adaskip.verbs.finish import Ending, TrainResult, finish
from adaskip.verbs.run import load_model, load_processor
from adaskip.verbs.splits import has_test, records
from adaskip.verbs.start import check_start, has_progress, opened
from adaskip.verbs.static import prepare
from adaskip.verbs.token_plan import finish_tokens, plan_tokens
from adaskip.verbs.trainer import checkpoint_layers, make_trainer, own_device

_FULL = (errno.ENOSPC, errno.EDQUOT)


def train(
    recipe: Recipe | str | Path,
    overrides: Overrides = (),
    *,
    resume: bool = False,
    smoke: bool = False,
    stages: Stages = SILENT,
) -> TrainResult:
    """Train the routers of a recipe and leave a complete run folder.

    Seeds the global random generators, as Lightning's ``seed_everything`` does.

    Args:
        recipe: a name that `adaskip ls` shows, a YAML file, or what `adaskip.recipe.load` returned.
        overrides: ``["objective.keep=0.5"]`` or ``{"objective.keep": 0.5}``.
        resume: go on from the run folder's last checkpoint; the result equals that of an uninterrupted run.
        smoke: rehearse the recipe instead, in seconds and without a network: see `adaskip.smoke.rehearsal.rehearse`.
        stages: hears what is under way.

    Returns:
        ``ok`` is False where the compute budget was missed, or where training stopped at violated conditions.

    Raises:
        AdaSkipError: the recipe, the data, the backbone or the run folder does not fit, or the disk is full; nothing is
            overwritten.

    Example:
        ``adaskip.train("digits-vlm", {"objective.keep": 0.5, "output": "runs/half"}).budget.keep``
    """
    laps, recipe = Laps(), load(recipe, overrides)
    if smoke:
        recipe = rehearse(recipe, resume, stages)
    folder = Path(recipe.output)
    check_start(recipe, folder, resume)
    lightning.seed_everything(recipe.seed, verbose=False)
    collate = Collator(load_processor(recipe))
    bad = BadRecords(recipe.data.bad_limit)
    with stages(f"reading {recipe.data.source}"):
        splits = {split: records(recipe, split, bad) for split in SPLITS if split != "test" or has_test(recipe)}
    bad.stop(recipe.data.source)
    for chosen in splits.values():  # before the model is loaded and measured, which may take minutes
        collate.check(chosen)
    enough_to_train(recipe, len(splits["validation"]), len(splits["calibration"]))
    data = DataUsed.of(splits, bad)
    if resume and has_progress(folder):
        data.check_same(folder)
    for line in data.told():
        stages.note(line)
    with stages(f"loading {recipe.backbone.path}"):
        model = attach(load_model(recipe), recipe.router, seed=recipe.seed)
        if recipe.lora is not None:
            adapt(model, recipe.lora, recipe.seed)
        if recipe.trainer.gradient_checkpointing:
            checkpoint_layers(model)
    with opened(recipe, folder, resume) as (checkpoint, step):
        data.store(folder)
        if resume:
            stages.note(f"{folder}: going on from step {step}")
        lost = (
            f"{folder}: another process of this run has ended, see what it says above; "
            f"go on with: adaskip train {folder / RECIPE} --resume"
        )
        try:
            with says_when_lost(lost), closes_its_group():
                return _Training(recipe, folder, model, collate, splits, laps, stages).run(checkpoint, step)
        except RuntimeError as error:
            if not is_lost_process(error):
                raise
            raise CheckpointError(lost) from error
        except OSError as error:
            if error.errno not in _FULL:
                raise
            raise CheckpointError(
                f"{folder}: {error.strerror}; make room, and go on with: adaskip train {folder / RECIPE} --resume"
            ) from error


@dataclass(frozen=True)
class _Training:
    """Price, fit, train and finish in a folder that is this run's alone."""

    recipe: Recipe
    folder: Path
    model: RoutedModel
    collate: Collator
    splits: dict[str, list[Record]]
    laps: Laps
    stages: Stages

    def run(self, checkpoint: Path | None, step: int) -> TrainResult:
        """Train from a checkpoint, or from the start, to the end.

        Raises:
            CheckpointError: training was stopped from outside; says what to type to go on.
        """
        recipe = self.recipe
        looked_at = self._batches("validation", recipe.conditions.examples)
        measured, prices = _price(
            self.model, looked_at, self._batches("calibration", fitted(recipe)), recipe, self.stages
        )
        start = prepare(recipe, self.model, measured, looked_at, self._batches("validation", None), self.stages)
        if recipe.router.features == "standardised" and recipe.method in ("end-to-end", "from-bounds"):
            inputs = self._batches("calibration", fitted(recipe))
            standardise(self.model, [batch.to(self.model.spec.device) for batch in inputs])
        conditions = ConditionCheck(
            recipe.conditions.every,
            tolerance=recipe.conditions.nats,
            level=recipe.conditions.level,
            on_violation=recipe.conditions.on_violation,
            batches=[batch.to(self.model.spec.device) for batch in looked_at],
            measured=measured,
            folder=self.folder,
        )
        if is_first_process():
            truncate_lines(self.folder / CONDITIONS, step)
        if recipe.method == "path-bank":
            return self._find_bank(conditions, prices, start.plan)
        if recipe.method == "token-plan":
            return self._plan_tokens(conditions, prices, start.plan)
        if recipe.chooses:
            return self._choose(conditions, prices, start.plan)
        tuner = self._tuner(prices, start.objective)
        size, every = recipe.trainer.batch_size, recipe.trainer.checkpoint_every
        batches = training_loader(
            self.splits["train"], self.collate, size, every * size, recipe.seed, recipe.trainer.workers,
            recipe.data.group_by_length,
        )  # fmt: skip
        trainer = make_trainer(
            recipe, self.folder, step, [conditions, RoundsBySteps(batches, every, step)], self.stages is SILENT
        )
        shared = SharedBatches(self.splits["validation"], self.collate, size)
        validation: DataLoader[Any] = DataLoader(shared, batch_size=None)
        self.laps.lap("price")
        if recipe.method == "from-bounds" and checkpoint is None:
            self._fit_from_bounds(tuner, trainer)
        if recipe.trainer.steps:
            self._train(trainer, tuner, batches, validation, checkpoint)
        if conditions.stopped:
            Board(trainer.loggers).finish(self.stages)
            return TrainResult(self.folder, trainer.global_step, conditions.stopped)
        if trainer.interrupted or trainer.global_step < recipe.trainer.steps:
            raise CheckpointError(
                f"{self.folder}: training stopped at step {trainer.global_step} of {recipe.trainer.steps}; "
                f"go on with: adaskip train {self.folder / RECIPE} --resume"
            )
        ending = self._ending(trainer, prices, conditions)
        return finish(ending, tuner, validation, self._batches("validation", None), start.plan)

    def _find_bank(self, conditions: ConditionCheck, prices: Prices, plan: Plan | None) -> TrainResult:
        trainer = make_trainer(self.recipe, self.folder, 0, [])
        self.laps.lap("price")
        model = bank_model(self.recipe, self.folder, self.model, self.splits["train"], self.collate, self.stages)
        self.laps.lap("bank")
        return finish_bank(self._ending(trainer, prices, conditions), model, self._batches("validation", None), plan)

    def _plan_tokens(self, conditions: ConditionCheck, prices: Prices, plan: Plan | None) -> TrainResult:
        trainer = make_trainer(self.recipe, self.folder, 0, [])
        self.laps.lap("price")
        plans = plan_tokens(self.recipe, self.folder, self.model, self.splits["train"], self.collate, self.stages)
        self.laps.lap("plan")
        ending = self._ending(trainer, prices, conditions)
        return finish_tokens(ending, self.model, plans, self._batches("validation", None), plan)

    def _choose(self, conditions: ConditionCheck, prices: Prices, plan: Plan | None) -> TrainResult:
        trainer = make_trainer(self.recipe, self.folder, 0, [])
        self.laps.lap("price")
        ending = self._ending(trainer, prices, conditions)
        records, validation = self.splits["train"], self._batches("validation", None)
        return choose_and_finish(ending, self.model, records, self.collate, validation, plan)

    def _ending(self, trainer: lightning.Trainer, prices: Prices, conditions: ConditionCheck) -> Ending:
        calibration = self._batches("calibration", fitted(self.recipe))
        inputs, processor = self.splits["validation"], self.collate.processor
        return Ending(self.recipe, trainer, prices, conditions, calibration, self.laps, self.stages, inputs, processor)

    def _batches(self, split: str, limit: int | None) -> list[Batch]:
        return [*loader(self.splits[split][:limit], self.collate, self.recipe.trainer.batch_size)]

    def _tuner(self, prices: Prices, objective: Objective) -> RouterTuner:
        recipe = self.recipe
        kinds = {str(record["kind"]) for record in self.splits["validation"] if record.get("kind") not in (None, "")}
        return RouterTuner(
            self.model,
            objective,
            prices,
            learning_rate=recipe.trainer.learning_rate,
            steps=recipe.trainer.steps or None,  # 0: nothing is tuned after a fit from bounds
            temperature=recipe.trainer.temperature,
            last_temperature=recipe.trainer.last_temperature,
            kinds=sorted(kinds),
            seed=recipe.seed,
        )

    def _fit_from_bounds(self, tuner: RouterTuner, trainer: lightning.Trainer) -> None:
        recipe, inputs = self.recipe, self.splits["train"]
        with self.stages(f"fitting the routers from bounds, {recipe.fit.rounds} rounds"):
            state, rounds = fit_in_folder(
                self.model, recipe.objective, recipe.fit, inputs, self.collate, self.folder, recipe.seed,
                self.stages.note,
            )  # fmt: skip
        tuner.multiplier.fill_(state.multiplier)
        for logger in trainer.loggers:
            logger.log_metrics({f"fit/{name}": value for name, value in rounds[-1].items()}, step=0)
        self.laps.lap("fit")

    def _train(
        self,
        trainer: lightning.Trainer,
        tuner: RouterTuner,
        batches: DataLoader[Any],
        validation: DataLoader[Any],
        checkpoint: Path | None,
    ) -> None:
        """Train; Ctrl-C stays one, where Lightning would make an ordinary exit of it.

        Raises:
            KeyboardInterrupt: with what to type to go on.
        """
        steps, callbacks = self.recipe.trainer.steps, trainer.callbacks  # type: ignore[attr-defined]
        with self.stages(f"training for {steps} steps", steps) as advance:
            callbacks.append(StepCount(advance))
            try:
                trainer.fit(tuner, batches, validation, ckpt_path=checkpoint, weights_only=True if checkpoint else None)
            except SystemExit as stop:
                if not trainer.interrupted:
                    raise
                raise KeyboardInterrupt(
                    f"interrupted at step {trainer.global_step} of {trainer.max_steps}; "
                    f"go on with: adaskip train {self.folder / RECIPE} --resume"
                ) from stop
        self.laps.lap("train")


def _price(
    model: RoutedModel, check: list[Batch], calibration: list[Batch], recipe: Recipe, stages: Stages
) -> tuple[LayerMeasures, Prices]:
    """Measure what each layer is worth on validation inputs; calibrate the bound's constants on others."""
    if (own := own_device(recipe)) is not None:
        model.to(own)
    device = model.spec.device
    vision, layers = model.runtime.hides_vision, len(model.spec.layers)
    check = [batch.to(device) for batch in check]
    if not (least := lightest(model, check, recipe.objective.keep)).met:
        stages.note(f"{least.sentence}; training goes on all the same")
    with stages(f"measuring {layers} layers on {count(check)} validation inputs", count(check)) as advance:
        measured = measure_skips(model, check, attention=vision, progress=advance)
    with stages(f"pricing {layers} layers on {count(calibration)} calibration inputs"):
        return measured, price_layers(
            model,
            [batch.to(device) for batch in calibration],
            measured.mass.mean(0),
            recipe.objective.alpha,
            recipe.objective.price,
            recipe.seed,
        )
