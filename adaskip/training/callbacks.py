"""Watch the theory's conditions while the routers train."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import lightning
import torch
from torch import Tensor

from adaskip.errors import ConfigError, DataError, did_you_mean
from adaskip.routers.gates import hard
from adaskip.runtime.attach import RoutedModel
from adaskip.theory.bounds import redundancy_bound
from adaskip.theory.conditions import Findings, Joint, SkipFinding, judge, judge_joint, judge_skips
from adaskip.theory.profile import LayerMeasures, Prices, calibrate_prices, compare_predicted, measure, predicted
from adaskip.training.data import Batch
from adaskip.training.tracking import CONDITIONS, Board

OnViolation = Literal["warn", "hold", "stop"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Look:
    """What one check of the conditions found."""

    step: int
    group: str
    tolerance: float
    findings: Findings
    joint: Joint
    skips: dict[int, SkipFinding]  # of each layer that the routers leave out, on the inputs for which they do
    held: tuple[int, ...] = ()  # layers that were forced to keep when looking

    @property
    def violations(self) -> dict[int, SkipFinding]:
        """The layers whose skips clearly cost more than they may; one that is held makes none."""
        costly = {layer: found for layer, found in self.skips.items() if found.verdict == "inadmissible"}
        return {layer: found for layer, found in costly.items() if layer not in self.held}

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; a line of ``conditions.jsonl``."""
        return {
            "step": self.step,
            "group": self.group,
            "tolerance": self.tolerance,
            "findings": [row.to_dict() for row in self.findings.rows],
            "layers": {str(layer): verdict for layer, verdict in self.findings.layers.items()},
            "rank_correlation": self.findings.rank_correlation,
            "joint": self.joint.to_dict(),
            "skips": [found.to_dict() for found in self.skips.values()],
            "held": list(self.held),
        }


class DenseLogits:
    """The dense logits at the predicted tokens of batches that are looked at again and again.

    The backbone is frozen, so each batch's are computed once and kept on its device, as long as they fit in ``limit``
    bytes; what does not fit is computed at every look.

    Args:
        limit: bytes to keep at most; 2**28 hold 128 answers of 7 tokens at a vocabulary of 150,000 in bfloat16.
    """

    def __init__(self, limit: int = 2**28) -> None:
        self.limit = limit
        self._kept: dict[int, Tensor] = {}

    @torch.no_grad()
    def __call__(self, model: RoutedModel, index: int, batch: Batch) -> Tensor:
        """(k v) of the batch with this index; see `predicted`."""
        if index in self._kept:
            return self._kept[index]
        with model.dense():
            logits = model(**batch["inputs"], prompt_mask=batch["prompt_mask"], use_cache=False).logits
        found = predicted(logits, batch["labels"])
        if found.nbytes + sum(x.nbytes for x in self._kept.values()) <= self.limit:
            self._kept[index] = found
        return found


@torch.no_grad()
def joint_cost(
    model: RoutedModel, batches: Iterable[Batch], rho: Tensor, prices: Prices, dense: DenseLogits | None = None
) -> dict[str, Tensor]:
    """What the routers' real decisions cost each input: exact ``kl`` (n), predicted ``bound`` (n), and ``keep`` (l n).

    ``wanted`` (l n) is what the routers would do if no layer were held. Under scope token an input keeps a layer if
    most of its tokens do (a heuristic), and its bound takes the share of them that skip.

    Args:
        model: with frozen or current routers.
        batches: prompts with answers.
        rho: (n l) relative change of every layer in the dense pass, for the same inputs in the same order.
        prices: calibrated constants.
        dense: the memory of the same batches; None: they are looked at once.
    """
    dense = dense or DenseLogits(limit=0)
    kl, keep, wanted = [], [], []
    for index, batch in enumerate(batches):
        before, labels = dense(model, index, batch), batch["labels"]
        routed = model(**batch["inputs"], prompt_mask=batch["prompt_mask"], use_cache=False).logits
        kl.append(compare_predicted(before, predicted(routed, labels), labels)["kl"].cpu())
        routing = model.routing
        keep.append(routing.share.cpu())
        decided = routing.keep if routing.logits is None else hard(routing.logits, model.config.threshold)
        wanted.append(routing.per_row(decided).cpu() > 0.5)
    s, u = prices.costs(rho)
    kept = torch.cat(keep, 1)
    bound = redundancy_bound(kept.T, s, u, prices.correlation)
    decisions = {"keep": kept > 0.5, "share": kept, "wanted": torch.cat(wanted, 1)}
    return {"kl": torch.cat(kl), "bound": bound, **decisions}


class ConditionCheck(lightning.Callback):
    """Check the theory's conditions every few steps.

    The backbone is frozen, so what a single layer is worth to an input does not change while routers train: it is
    measured once, before the first step. Every look then judges what does change, the routers' own decisions: their
    joint cost against the calibrated bound, the share of them that lies on admissible layers, and each layer anew on
    those inputs for which the routers leave it out. A layer whose skips clearly cost more than they may violates the
    conditions; the intervals are corrected for all layers, notions and looks of the run.

    Args:
        every: steps between looks; 0: only at the end.
        examples: validation inputs to look at.
        tolerance: nats per predicted token that one skipped layer may cost.
        level: that all intervals hold at once.
        on_violation: ``warn`` says so in the log; ``hold`` makes the layer run for every input until the skips its
            router asks for are admissible (held layers are saved with the routers, and resume); ``stop`` ends training,
            with the reason in ``stopped``.
        batches: what to look at; default: the trainer's validation data.
        measured: quantities of the same batches, if they are at hand already.
        folder: where ``conditions.jsonl`` goes; None: only logged.

    Raises:
        ConfigError: another ``on_violation``.
    """

    def __init__(
        self,
        every: int = 200,
        *,
        examples: int = 128,
        tolerance: float = 0.05,
        level: float = 0.95,
        on_violation: OnViolation = "warn",
        batches: list[Batch] | None = None,
        measured: LayerMeasures | None = None,
        folder: Path | None = None,
    ) -> None:
        if on_violation not in get_args(OnViolation):
            raise ConfigError(
                f"ConditionCheck: on_violation: expected {' | '.join(get_args(OnViolation))}, got {on_violation!r}; "
                + did_you_mean(str(on_violation), get_args(OnViolation))
            )
        self.every, self.examples, self.tolerance, self.level = every, examples, tolerance, level
        self.batches, self.measured, self.folder = batches, measured, folder
        self.on_violation: OnViolation = on_violation
        self.looks = 1
        self.stopped: str | None = None
        self.look: Look | None = None
        self._warned: set[int] = set()
        self._held: frozenset[int] = frozenset()  # by this callback, beside those of the routers' configuration
        self._fixed: frozenset[int] = frozenset()
        self._dense = DenseLogits()
        self.findings: Findings | None = None

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Hold again what a resumed run held; also where its last step is done, so that training does not start."""
        tuner: Any = pl_module
        self._fixed = frozenset(tuner.model.config.held) - self._held
        if self._held:
            tuner.model.hold(self._fixed | self._held)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Measure the layers and judge each on its own."""
        tuner: Any = pl_module
        if self.batches is None:
            self.batches = self._validation(trainer)
        self.batches = [to_device(batch, tuner.device) for batch in self.batches]
        model: RoutedModel = tuner.model
        vision = model.runtime.hides_vision
        if self.measured is None:
            self.measured = measure(model, self.batches, attention=vision)
        if tuner.prices is None:
            tuner.prices = calibrate_prices(self.measured, self.measured.mass.mean(0), alpha=0.1)
        self.findings = self._judge_layers(model, tuner.prices)
        steps = trainer.max_steps if trainer.max_steps > 0 else trainer.estimated_stepping_batches
        if self.every and steps == float("inf"):
            raise ConfigError(
                "ConditionCheck: repeated looks need to know their number; give the trainer max_steps or max_epochs"
            )
        self.looks = int(steps) // self.every + 1 if self.every else 1

    def state_dict(self) -> dict[str, Any]:
        """The layers that are held and the looks that intervals allow for, for a run that resumes."""
        return {"held": sorted(self._held), "looks": self.looks}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember the held layers until the model is at hand; a run that had its last step does not start again."""
        self._held, self.looks = frozenset(state_dict["held"]), state_dict["looks"]

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look every ``every`` steps."""
        if self.every and trainer.global_step % self.every == 0:
            self._look(trainer, pl_module)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Look once more unless the last step was one."""
        if self.look is None or self.look.step != trainer.global_step:
            self._look(trainer, pl_module)

    def _look(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        tuner: Any = pl_module
        training = tuner.training
        tuner.eval()
        self.look = self.inspect(tuner.model, tuner.prices, trainer.global_step)
        tuner.train(training)
        self._act(trainer, tuner.model)
        joint = self.look.joint
        numbers = {
            "theory/joint_kl": joint.kl,
            "theory/joint_bound": joint.bound,
            "theory/kappa": joint.kappa,
            "theory/coverage": joint.coverage,
            "theory/admissible_skips": joint.admissible_skips,
            "theory/admissible_layers": sum(v == "admissible" for v in self.look.findings.layers.values()),
            "theory/violations": len(self.look.violations),
            "theory/held_layers": len(tuner.model.config.held),
        }
        for logger in trainer.loggers:
            logger.log_metrics(numbers, step=trainer.global_step)
        record = self.look.to_dict()
        Board(trainer.loggers).conditions(record)
        if self.folder is not None and trainer.is_global_zero:
            with (self.folder / CONDITIONS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")

    def _act(self, trainer: lightning.Trainer, model: RoutedModel) -> None:
        """Warn of, hold or stop at the layers whose skips clearly cost more than they may."""
        look = self.look
        assert look is not None
        violations = look.violations
        if self.on_violation == "hold":
            passed = {layer for layer, found in look.skips.items() if found.verdict == "admissible"}
            held = (self._held | set(violations)) - passed
            held = trainer.strategy.broadcast(held)  # ranks may have looked at other inputs
            for layer in sorted(held ^ self._held):
                word = "held from now on" if layer in held else "free again"
                _log.warning("step %d: layer %d is %s; %s", look.step, layer, word, _say(look, layer))
            if held != self._held:
                model.hold(self._fixed | held)
            self._held = held
        elif violations and self.on_violation == "stop":
            self.stopped = (
                f"conditions violated at step {look.step}: {'; '.join(_say(look, layer) for layer in violations)}. "
                "Raise conditions.tolerance or objective.keep, or train with conditions.on_violation=hold"
            )
            _log.warning("%s", self.stopped)
            trainer.should_stop = True
        else:
            for layer in set(violations) - self._warned:
                _log.warning("step %d: %s", look.step, _say(look, layer))
            self._warned = set(violations)

    def _judge_layers(self, model: RoutedModel, prices: Prices) -> Findings:
        assert self.measured is not None
        return judge(self.measured, prices, model.runtime.group, self.tolerance, self.level)

    def inspect(self, model: RoutedModel, prices: Prices, step: int) -> Look:
        """One look at a model's current decisions."""
        assert self.measured is not None
        assert self.batches is not None
        if self.findings is None:
            self.findings = self._judge_layers(model, prices)
        found = joint_cost(model, self.batches, self.measured.rho, prices, self._dense)
        joint = judge_joint(
            found["kl"],
            found["bound"],
            found["keep"],
            self.findings.layers,
            prices.alpha,
            tolerance=self.tolerance,
            level=self.level,
            share=found["share"],
        )
        skips = judge_skips(
            self.measured, found["wanted"], prices, model.runtime.group, self.tolerance, self.level, self.looks
        )
        return Look(step, model.runtime.group, self.tolerance, self.findings, joint, skips, model.config.held)

    def _validation(self, trainer: lightning.Trainer) -> list[Batch]:
        loaders = trainer.val_dataloaders
        if loaders is None:
            raise DataError(
                "ConditionCheck: the trainer has no validation data; pass val_dataloaders to fit, or batches="
            )
        batches: list[Batch] = []
        for batch in loaders:
            batches.append(batch)
            if sum(len(b["labels"]) for b in batches) >= self.examples:
                break
        return batches


def _say(look: Look, layer: int) -> str:
    """One sentence on what the routers' skips of a layer cost."""
    found = look.skips.get(layer)
    if found is None:
        return f"the routers no longer ask to skip layer {layer}"
    cost = next(row for row in found.rows if row.notion == "functional")
    return (
        f"layer {layer} is skipped for {found.n} of {look.joint.n} inputs at {cost.estimate:.3g} nats "
        f"[{cost.low:.3g}, {cost.high:.3g}] a token, {look.tolerance:.3g} tolerated"
    )


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The same batch with every tensor on a device."""
    moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    return moved | {"inputs": {k: v.to(device) for k, v in batch["inputs"].items()}}
