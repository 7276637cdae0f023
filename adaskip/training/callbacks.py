"""Watch the theory's conditions while the routers train."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import lightning
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from adaskip.batch import Batch, count, take
from adaskip.errors import ConfigError, DataError, did_you_mean
from adaskip.runfiles import CONDITIONS, append_line
from adaskip.runtime.attach import RoutedModel
from adaskip.sites import Label
from adaskip.survey.dense_costs import SkipCosts, price_inputs
from adaskip.survey.skips import measure_skips
from adaskip.theory.conditions import Findings, judge, judge_joint, judge_skips
from adaskip.theory.gauge import Reading, judge_gauge
from adaskip.theory.prices import Prices
from adaskip.theory.tables import LayerMeasures
from adaskip.training.alarms import Alarm, describe, find_alarms
from adaskip.training.inputs import from_rank_zero
from adaskip.training.looks import DenseLogits, Look, describe_skip, joint_cost
from adaskip.training.module import RouterTuner
from adaskip.training.objective import is_count, is_number
from adaskip.training.pricing import check_prices, evaluating
from adaskip.training.schedule import planned_steps
from adaskip.training.split import Split, split_inputs
from adaskip.training.tracking import Board

OnViolation = Literal["warn", "hold", "stop"]

_log = logging.getLogger(__name__)


class ConditionCheck(lightning.Callback):
    """Check the theory's conditions every few steps; training is the same with it and without (but for hold and stop).

    The backbone is frozen, so what a single layer is worth to an input does not change while routers train: it is
    measured once, before the first step. Every look then judges what does change, the routers' own decisions: their
    joint cost against the calibrated bound, the share of them that lies on admissible layers, and each layer anew on
    those inputs for which the routers leave it out. A layer whose skips clearly cost more than they may violates the
    conditions; the intervals are corrected for all layers, notions and looks of the run. Alarms tell routers that have
    collapsed (`adaskip.training.alarms`), each once until it is over.

    What is judged was never fitted on: of the inputs, those that the tuner's prices were calibrated on are left out.
    Where the tuner has no prices (``Objective(bound_weight=0)`` and no ``calibration``), every second input calibrates
    prices for the looks alone, and only the others are judged. With several processes all look at the inputs of rank 0
    and act on what rank 0 finds.

    Args:
        every: optimiser steps between looks; 0: only at the end.
        examples: validation inputs to look at.
        tolerance: nats per predicted token that one skipped layer may cost.
        level: that all intervals hold at once.
        on_violation: ``warn`` says so in the log; ``hold`` makes the layer run for every input until the skips its
            router asks for are admissible (held layers are saved with the routers, and resume); ``stop`` ends training,
            with the reason in ``stopped``.
        batches: what to look at, all of a list or the first ``examples`` of a loader; default: the trainer's validation
            data.
        measured: quantities of the same batches, if they are at hand already.
        folder: where ``conditions.jsonl`` goes; None: only logged.

    Raises:
        ConfigError: a value outside its range. When a fit starts: another module than `RouterTuner`, or looks of which
            nothing says how many there will be.
        DataError: when a fit starts: too few inputs to judge; nothing has run yet.
    """

    def __init__(
        self,
        every: int = 200,
        *,
        examples: int = 128,
        tolerance: float = 0.05,
        level: float = 0.95,
        on_violation: OnViolation = "warn",
        batches: Iterable[Batch] | None = None,
        measured: LayerMeasures | None = None,
        folder: Path | None = None,
    ) -> None:
        if on_violation not in get_args(OnViolation):
            raise ConfigError(
                f"ConditionCheck: on_violation: expected {' | '.join(get_args(OnViolation))}, got {on_violation!r}; "
                + did_you_mean(str(on_violation), get_args(OnViolation))
            )
        ranges = {
            "every": (every == 0 or is_count(every), every, "an integer >= 0"),
            "examples": (is_count(examples), examples, "an integer >= 1"),
            "tolerance": (is_number(tolerance) and tolerance >= 0, tolerance, "nats >= 0"),
            "level": (is_number(level) and 0 < level < 1, level, "a share in (0, 1)"),
        }
        faults = [f"{name}: expected {span}, got {value!r}" for name, (ok, value, span) in ranges.items() if not ok]
        if faults:
            raise ConfigError("ConditionCheck: " + "; ".join(faults))
        self.every, self.examples, self.tolerance, self.level = every, examples, tolerance, level
        limit = None if isinstance(batches, list) else examples
        self.batches = None if batches is None else take(batches, limit, "ConditionCheck: batches")
        self.measured, self.folder = measured, None if folder is None else Path(folder)
        self.on_violation: OnViolation = on_violation
        self.looks = 1
        self.stopped: str | None = None
        self.look: Look | None = None
        self.findings: Findings | None = None
        self._from_trainer = batches is None  # then every fit reads the inputs anew
        self._split = Split()
        self._model: RoutedModel | None = None  # what ``measured`` speaks of
        self._prices: Prices | None = None
        self._costs: tuple[Prices, SkipCosts] | None = None  # of every input, and the prices that they follow from
        self._step = 0  # the global step when this micro-batch began
        self._warned: set[int] = set()
        self._alarmed: set[tuple[str, tuple[Label, ...]]] = set()
        self._held: frozenset[int] = frozenset()  # by this callback, beside those of the routers' configuration
        self._fixed: frozenset[int] = frozenset()
        self._dense = DenseLogits()

    # -- when a fit starts -------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Hold again what a resumed run held, also where its last step is done; count the inputs before any work."""
        tuner = _tuner(pl_module)
        self._fixed = frozenset(tuner.model.policy.held) - self._held
        if self._held:
            tuner.model.hold(tuner.model.sites.labels(self._fixed | self._held))
        self.look, self.stopped, self._warned, self._alarmed = None, None, set(), set()
        self.looks = self._count_looks(trainer)
        unpriced = tuner.prices is None and tuner.calibration is None
        if unpriced:
            check_prices(None, tuner.objective, len(tuner.model.sites))
        self.batches = self._inputs(trainer)
        self._split = split_inputs(tuner, self.batches, unpriced)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Measure the layers and judge each on its own."""
        tuner = _tuner(pl_module)
        convert = trainer.precision_plugin.convert_input
        assert self.batches is not None  # on_fit_start read them
        self.batches = [convert(batch).to(tuner.device) for batch in self.batches]
        self.findings = None
        if self._from_trainer or self._model not in (None, tuner.model):
            self.measured, self._dense, self._costs = None, DenseLogits(), None
        self._model = tuner.model
        with evaluating(tuner.model):
            self._prepare(tuner.model)
        prices = self._split.prices(tuner, self.measured) if tuner.prices is None else None
        self._prices = trainer.strategy.broadcast(prices) if prices is not None else tuner.prices

    def _count_looks(self, trainer: lightning.Trainer) -> int:
        """Count the looks that there will be; the intervals are made wider for as many."""
        if not self.every:
            return 1
        steps = planned_steps(trainer)
        if not math.isfinite(steps):
            raise ConfigError(
                "ConditionCheck: repeated looks need to know their number; give the trainer max_steps or max_epochs, "
                "or look at the end only: every=0"
            )
        return int(steps) // self.every + 1

    def _inputs(self, trainer: lightning.Trainer) -> list[Batch]:
        """Read the inputs of rank 0, on every rank."""
        if not self._from_trainer:
            batches = list(self.batches or [])
            if trainer.world_size == 1:
                return batches
            return from_rank_zero(trainer, lambda: [batch.to("cpu") for batch in batches])
        if not trainer.enable_validation:
            raise DataError(
                "ConditionCheck: the trainer has no validation data; pass val_dataloaders to fit, or batches="
            )
        trainer.fit_loop.epoch_loop.val_loop.setup_data()  # else it is set up when training begins
        loaders = trainer.val_dataloaders

        def read() -> list[Batch]:
            batches = CombinedLoader(loaders, "sequential")
            with isolate_rng():  # a loader draws its order from the generator that training draws from
                return take((batch for batch, _, _ in batches), self.examples, "ConditionCheck")

        return from_rank_zero(trainer, read)

    # -- looking -----------------------------------------------------------------------------------------------------

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Remember the step, because several micro-batches may make one."""
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look every ``every`` optimiser steps."""
        stepped = trainer.global_step != self._step
        if self.every and stepped and trainer.global_step % self.every == 0:
            self._look(trainer, _tuner(pl_module))

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Look once more, unless the last step has been looked at."""
        if self.look is None or self.look.step != trainer.global_step:
            self._look(trainer, _tuner(pl_module))

    def _look(self, trainer: lightning.Trainer, tuner: RouterTuner) -> None:
        assert self._prices is not None  # on_train_start made sure
        with evaluating(tuner.model):
            settled = tuner.target() <= tuner.objective.keep + 1e-9  # before that the budget is still on its way
            look = self.inspect(tuner.model, self._prices, trainer.global_step, settled)
        # processors of different make round differently; every rank has to act alike
        self.look = trainer.strategy.broadcast(look) if trainer.world_size > 1 else look
        self._act(trainer, tuner.model, self.look)
        joint = self.look.joint
        numbers = {
            "theory/joint_kl": joint.kl,
            "theory/joint_bound": joint.bound,
            "theory/kappa": joint.kappa,
            "theory/coverage": joint.coverage,
            "theory/spearman": joint.spearman,
            "theory/slack": joint.slack_median,
            "theory/admissible_skips": joint.admissible_skips,
            "theory/admissible_layers": sum(v == "admissible" for v in self.look.findings.layers.values()),
            "theory/violations": len(self.look.violations),
            "theory/held_layers": len(tuner.model.policy.held),
            "router/alarms": len(self.look.alarms),
        }
        if self.look.routers is not None:
            numbers |= {"router/logit_std": self.look.routers.logit_std, "router/paths": self.look.routers.paths}
        for logger in trainer.loggers:  # under the number that Lightning gives what it logs of this very step
            logger.log_metrics(numbers, step=max(0, trainer.global_step - 1))
        new = self._new_alarms(self.look)
        if not trainer.is_global_zero:
            return
        record, board = self.look.to_dict(), Board(trainer.loggers)
        board.conditions(record)
        for alarm in new:
            _log.warning("step %d: %s", self.look.step, alarm.sentence)
            board.alarm(alarm.name, f"step {self.look.step}: {alarm.sentence}")
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            append_line(self.folder / CONDITIONS, record)

    def inspect(self, model: RoutedModel, prices: Prices, step: int, settled: bool = True) -> Look:
        """Look once at a model's current decisions; ``settled``: the budget is asked for in full.

        Raises:
            ConfigError: there are no inputs to look at.
        """
        measured = self._split.judged(self._prepare(model))
        if self.findings is None:
            self.findings = judge(measured, prices, model.target.group, self.tolerance, self.level)
        costs = self._joint(model, prices)
        joint = judge_joint(
            costs["kl"],
            costs["bound"],
            costs["keep"],
            self.findings.layers,
            prices.alpha,
            tolerance=self.tolerance,
            level=self.level,
            share=costs["share"],
        )
        skips = judge_skips(
            measured, costs["requested"], prices, model.target.group, self.tolerance, self.level, self.looks
        )
        held, logits, sites = model.policy.held, costs.get("logits"), model.sites
        skips = {site: replace(skip, label=str(sites.label(site))) for site, skip in skips.items()}
        look = Look(step, model.target.group, self.tolerance, self.findings, joint, skips, held, unit=sites.unit)
        if model.gauge is not None:
            # two estimators whose errors have little in common: the mean of their logarithms
            both = (costs["told"] * costs["bound"]).sqrt()
            together = judge_joint(costs["kl"], both, costs["keep"], {}, prices.alpha)
            reading = judge_gauge(model.gauge, costs["told"], costs["kl"])
            look = replace(look, gauge=reading, together=Reading.of(together))
        if logits is None:  # a plan, or another policy that decides without any
            return look
        exact, threshold = measured.kl.T, model.policy.threshold
        alarms = find_alarms(logits, costs["keep"], exact, self.tolerance, held, threshold, settled, sites.label)
        return replace(look, routers=describe(logits, costs["keep"], held), alarms=alarms)

    def _prepare(self, model: RoutedModel) -> LayerMeasures:
        """Measure, once, what each layer is worth to each input."""
        if not self.batches:
            raise ConfigError("ConditionCheck: no inputs to look at; pass batches=, or train with validation data")
        if self.measured is None:
            self.measured = measure_skips(model, self.batches, attention=model.runtime.hides_vision)
        if len(self.measured) != count(self.batches):
            raise ConfigError(
                f"ConditionCheck: measured: expected one row for each of {count(self.batches)} inputs in batches, "
                f"got {len(self.measured)}; leave measured out to have it measured"
            )
        return self.measured

    def _joint(self, model: RoutedModel, prices: Prices) -> dict[str, Tensor]:
        assert self.batches is not None
        if self._costs is None or self._costs[0] is not prices:
            # the backbone is frozen: what skips are predicted to cost stays the same from look to look
            self._costs = prices, price_inputs(model, self.batches, prices)
        costs = joint_cost(model, self.batches, self._costs[1], self._dense)
        return {name: self._split.judged_columns(values) for name, values in costs.items()}

    # -- acting ------------------------------------------------------------------------------------------------------

    def _new_alarms(self, look: Look) -> list[Alarm]:
        """Return the alarms of a look that the one before did not raise."""
        known = self._alarmed
        self._alarmed = {(alarm.name, alarm.layers) for alarm in look.alarms}
        return [alarm for alarm in look.alarms if (alarm.name, alarm.layers) not in known]

    def _act(self, trainer: lightning.Trainer, model: RoutedModel, look: Look) -> None:
        """Warn of the layers whose skips clearly cost more than they may, hold them, or stop training."""
        violations, messages = look.violations, []
        if self.on_violation == "hold":
            # a held layer is free again only when its skips are admissible: undecided ones leave it as it is
            passed = {layer for layer, finding in look.skips.items() if finding.verdict == "admissible"}
            held = (self._held | set(violations)) - passed
            for layer in sorted(held ^ self._held):
                word = "held from now on" if layer in held else "free again"
                name = model.sites.label(layer)
                messages.append(f"step {look.step}: layer {name} is {word}; {describe_skip(look, layer)}")
            if held != self._held:
                model.hold(model.sites.labels(self._fixed | held))
            self._held = held
        elif violations and self.on_violation == "stop":
            self.stopped = (
                f"conditions violated at step {look.step}: "
                f"{'; '.join(describe_skip(look, layer) for layer in violations)}. "
                "Raise conditions.tolerance or objective.keep, or train with conditions.on_violation=hold"
            )
            messages.append(self.stopped)
            trainer.should_stop = True
        else:
            new = sorted(set(violations) - self._warned)
            messages += [f"step {look.step}: {describe_skip(look, layer)}" for layer in new]
            self._warned = set(violations)
        if not trainer.is_global_zero:
            return
        board = Board(trainer.loggers)
        for text in messages:
            _log.warning("%s", text)
            board.alarm("conditions", text)

    # -- resuming ----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return, for a run that resumes, the held layers and the number of looks that the intervals allow for."""
        return {"held": sorted(self._held), "looks": self.looks}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember the held layers until the model is at hand; a run whose last step is done does not train again."""
        self._held, self.looks = frozenset(state_dict["held"]), state_dict["looks"]


def _tuner(module: lightning.LightningModule) -> RouterTuner:
    if not isinstance(module, RouterTuner):
        raise ConfigError(f"ConditionCheck: expected to watch a RouterTuner, got {type(module).__name__}")
    return module
