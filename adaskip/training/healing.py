"""`AdapterTuner`: train the adapters of a model whose policy is settled, on the path that the policy takes."""

from __future__ import annotations

from typing import Any

import lightning
import torch
from torch import Tensor
from torchmetrics import MeanMetric

from adaskip.batch import Batch, check_batch
from adaskip.errors import ConfigError
from adaskip.runtime.attach import RoutedModel
from adaskip.survey.record import record
from adaskip.training.gradient import answer_costs
from adaskip.training.objective import is_count, is_number
from adaskip.training.schedule import OneCycle, length
from adaskip.training.seeds import seed_at


class AdapterTuner(lightning.LightningModule):
    """Train adapters so that the routed model predicts like the dense one; the policy stays as it is.

        loss = KL(p_dense || p_routed) + task_weight * CE

    Layers are really skipped while training too, so a step costs as much less as the policy saves. Validation logs
    ``val/kl``, ``val/agreement`` (predicted tokens whose argmax is the dense model's) and ``val/keep``.

    Args:
        model: attached, with any policy, and with adapters (`adaskip.adapt`).
        learning_rate: peak of a one-cycle schedule.
        steps: length of the schedule in optimiser steps; None: as many as the trainer will run.
        task_weight: weight of the cross-entropy with the data's own answers.
        seed: of the adapters' dropout.

    Raises:
        ConfigError: the model has no adapters, or a value outside its range.
    """

    def __init__(
        self,
        model: RoutedModel,
        *,
        learning_rate: float = 1e-3,
        steps: int | None = None,
        task_weight: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not isinstance(model, RoutedModel) or model.adapters is None:
            raise ConfigError("AdapterTuner: expected a RoutedModel with adapters; call adaskip.adapt(model) first")
        ranges = {
            "learning_rate": (is_number(learning_rate) and learning_rate > 0, learning_rate, "a number > 0"),
            "steps": (steps is None or is_count(steps), steps, "an integer >= 1, or None"),
            "task_weight": (is_number(task_weight) and task_weight >= 0, task_weight, "a number >= 0"),
        }
        faults = [f"{name}: expected {span}, got {value!r}" for name, (ok, value, span) in ranges.items() if not ok]
        if faults:
            raise ConfigError("AdapterTuner: " + "; ".join(faults))
        self.strict_loading = False  # checkpoints hold no frozen weights
        self.model, self.adapters = model, model.adapters
        self.learning_rate, self.steps, self.task_weight, self.seed = learning_rate, steps, task_weight, seed
        self.val_kl, self.val_agreement, self.val_keep = MeanMetric(), MeanMetric(), MeanMetric()

    def train(self, mode: bool = True) -> AdapterTuner:
        """Set the mode of what is no model; the policy decides as it does in use."""
        super().train(mode)
        self.model.train(False)
        return self

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of one batch of prompts with answers."""
        check_batch(batch, "training")
        with torch.no_grad(), self.model.dense():
            dense = self.model(**batch.arguments()).logits
        with self.adapters.dropping(seed_at(self.seed, self.global_step)):
            routed = self.model(**batch.arguments()).logits
        kl, task = answer_costs(dense, routed, batch)
        loss = kl + self.task_weight * task
        self.log_dict({"train/loss": loss.detach(), "train/kl": kl.detach(), "train/task": task.detach()})
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Judge the routed model beside the dense one."""
        check_batch(batch, "validation")
        dense = record(self.model, batch, states=False)
        routed = record(self.model, batch, routed=True, states=False)
        self.val_keep.update(self.model.routing.keep_rate)
        self.val_kl.update(dense.compare(routed.logits)["kl"])
        self.val_agreement.update((routed.logits.argmax(-1) == dense.logits.argmax(-1)).float())

    def on_validation_epoch_end(self) -> None:
        """Log the pass."""
        self.log_dict({"val/kl": self.val_kl, "val/agreement": self.val_agreement, "val/keep": self.val_keep})

    def configure_optimizers(self) -> Any:
        """Make AdamW on the adapters, with a one-cycle schedule."""
        steps = length(self.trainer, self.steps, 0.0)
        optimizer = torch.optim.AdamW(self.adapters.parameters(), lr=self.learning_rate, weight_decay=0.0)
        schedule = OneCycle(optimizer, self.learning_rate, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return the adapters only."""
        return self.adapters.state_dict()

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        """Take adapters that `state_dict` gave.

        Raises:
            CheckpointError: of other modules or of another rank.
        """
        self.adapters.load_state_dict(state_dict)
        return torch.nn.modules.module._IncompatibleKeys([], [])
