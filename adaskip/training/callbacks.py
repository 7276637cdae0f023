"""Watch the theory's conditions while the routers train."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor

from adaskip.errors import DataError
from adaskip.runtime.attach import RoutedModel
from adaskip.theory.bounds import redundancy_bound
from adaskip.theory.conditions import Findings, Joint, judge, judge_joint
from adaskip.theory.profile import LayerMeasures, Prices, calibrate_prices, compare, measure
from adaskip.training.data import Batch
from adaskip.training.tracking import CONDITIONS, Board


@dataclass(frozen=True)
class Look:
    """What one check of the conditions found."""

    step: int
    group: str
    tolerance: float
    findings: Findings
    joint: Joint

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
        }


@torch.no_grad()
def joint_cost(model: RoutedModel, batches: Iterable[Batch], rho: Tensor, prices: Prices) -> dict[str, Tensor]:
    """What the routers' real decisions cost each input: exact ``kl`` (n), predicted ``bound`` (n), and ``keep`` (l n).

    Args:
        model: with frozen or current routers.
        batches: prompts with answers.
        rho: (n l) relative change of every layer in the dense pass, for the same inputs in the same order.
        prices: calibrated constants.
    """
    kl, keep = [], []
    for batch in batches:
        with model.dense():
            dense = model(**batch["inputs"], prompt_mask=batch["prompt_mask"], use_cache=False).logits
        routed = model(**batch["inputs"], prompt_mask=batch["prompt_mask"], use_cache=False).logits
        kl.append(compare(dense, routed, batch["labels"])["kl"].cpu())
        keep.append(model.routing.keep.cpu())
    s, u = prices.costs(rho)
    kept = torch.cat(keep, 1)
    return {"kl": torch.cat(kl), "bound": redundancy_bound(kept.T.float(), s, u), "keep": kept}


class ConditionCheck(lightning.Callback):
    """Check the theory's conditions every few steps.

    The backbone is frozen, so what a single layer is worth to an input does not change while routers train: it is
    measured once, before the first step. Every look then judges what does change, the routers' own decisions: their
    joint cost against the calibrated bound, and the share of them that lies on admissible layers.

    Args:
        every: steps between looks; 0: only at the end.
        examples: validation inputs to look at.
        tolerance: nats per predicted token that one skipped layer may cost.
        level: that all intervals hold at once.
        batches: what to look at; default: the trainer's validation data.
        measured: quantities of the same batches, if they are at hand already.
        folder: where ``conditions.jsonl`` goes; None: only logged.
    """

    def __init__(
        self,
        every: int = 200,
        *,
        examples: int = 128,
        tolerance: float = 0.05,
        level: float = 0.95,
        batches: list[Batch] | None = None,
        measured: LayerMeasures | None = None,
        folder: Path | None = None,
    ) -> None:
        self.every, self.examples, self.tolerance, self.level = every, examples, tolerance, level
        self.batches, self.measured, self.folder = batches, measured, folder
        self.look: Look | None = None
        self.findings: Findings | None = None

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Measure the layers and judge each on its own."""
        tuner: Any = pl_module
        if self.batches is None:
            self.batches = self._validation(trainer)
        self.batches = [to_device(batch, tuner.device) for batch in self.batches]
        model: RoutedModel = tuner.model
        vision = model.runtime.group == "vision"
        if self.measured is None:
            self.measured = measure(model, self.batches, attention=vision)
        if tuner.prices is None:
            tuner.prices = calibrate_prices(self.measured, self.measured.mass.mean(0), alpha=0.1)
        self.findings = self._judge_layers(model, tuner.prices)

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
        joint = self.look.joint
        numbers = {
            "theory/joint_kl": joint.kl,
            "theory/joint_bound": joint.bound,
            "theory/kappa": joint.kappa,
            "theory/coverage": joint.coverage,
            "theory/admissible_skips": joint.admissible_skips,
            "theory/admissible_layers": sum(v == "admissible" for v in self.look.findings.layers.values()),
        }
        for logger in trainer.loggers:
            logger.log_metrics(numbers, step=trainer.global_step)
        record = self.look.to_dict()
        Board(trainer.loggers).conditions(record)
        if self.folder is not None and trainer.is_global_zero:
            with (self.folder / CONDITIONS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")

    def _judge_layers(self, model: RoutedModel, prices: Prices) -> Findings:
        assert self.measured is not None
        return judge(self.measured, prices, model.runtime.group, self.tolerance, self.level)

    def inspect(self, model: RoutedModel, prices: Prices, step: int) -> Look:
        """One look at a model's current decisions."""
        assert self.measured is not None
        assert self.batches is not None
        if self.findings is None:
            self.findings = self._judge_layers(model, prices)
        found = joint_cost(model, self.batches, self.measured.rho, prices)
        joint = judge_joint(found["kl"], found["bound"], found["keep"], self.findings.layers, prices.alpha)
        return Look(step, model.runtime.group, self.tolerance, self.findings, joint)

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


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The same batch with every tensor on a device."""
    moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    return moved | {"inputs": {k: v.to(device) for k, v in batch["inputs"].items()}}
