"""`RouterTuner`: fine-tune the routers of a frozen model."""

from __future__ import annotations

from typing import Any

import lightning
import torch
from torch import Tensor
from torchmetrics import MeanMetric

from adaskip.plan import Routing
from adaskip.runtime.attach import RoutedModel
from adaskip.theory import bounds
from adaskip.theory.measures import relative_change
from adaskip.theory.prices import DRAWS, first_order
from adaskip.theory.profile import Prices, compare, exact_match
from adaskip.training.data import Batch, answer_positions
from adaskip.training.metrics import KeepByKind
from adaskip.training.objective import Objective


class RouterTuner(lightning.LightningModule):
    """Train the routers so that the routed model predicts like the dense one at a fraction of its compute.

        loss = E KL(p_dense || p_routed) + task_weight * CE + bound_weight * E[B] + budget

    The budget is an augmented Lagrangian on the expected keep rate; its multiplier is a buffer, so it resumes. Random
    draws are a pure function of (seed, step): a resumed run repeats an uninterrupted one.

    Args:
        model: what `attach` returned.
        objective: weights and the target.
        prices: calibrated constants of the redundancy bound, of the objective's price; None leaves B out.
        learning_rate: peak of a one-cycle schedule.
        steps: length of the schedule.
        temperature: of the gates' slope.
        kinds: labels that keep rates are reported by, for instance kinds of question.
        seed: of the gates' exploration noise.
    """

    multiplier: Tensor

    def __init__(
        self,
        model: RoutedModel,
        objective: Objective,
        prices: Prices | None = None,
        *,
        learning_rate: float = 1e-3,
        steps: int = 1000,
        temperature: float = 1.0,
        kinds: tuple[str, ...] = (),
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.strict_loading = False  # checkpoints hold no frozen weights
        self.model, self.objective, self.prices = model, objective, prices
        self.learning_rate, self.steps, self.temperature, self.seed = learning_rate, steps, temperature, seed
        self.register_buffer("multiplier", torch.zeros((), dtype=torch.float64))
        self.val_kl, self.val_keep, self.val_accuracy = MeanMetric(), MeanMetric(), MeanMetric()
        self.keep_by_kind = KeepByKind(len(model.described.layers), kinds)

    # -- training ----------------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One batch of prompts with answers."""
        dense, costs = self._dense(batch)
        with self.model.explore(self._noise(), self.temperature):
            out = self.model(**batch["inputs"], prompt_mask=batch["prompt_mask"])
        routing, share = self._soft_keep()
        where = answer_positions(batch["labels"])
        weight = (where / where.sum(1, keepdim=True) / len(where))[where]  # every input counts the same
        log_p, log_q = (x[:, :-1][where].float().log_softmax(-1) for x in (dense, out.logits))
        kl = weight @ (log_p.exp() * (log_p - log_q)).sum(-1)
        task = weight @ torch.nn.functional.nll_loss(log_q, batch["labels"][:, 1:][where], reduction="none")
        bound = self._bound(routing, costs)
        goal = self.objective
        gap = share - self.target()
        budget = self.multiplier.float() * gap + goal.budget_weight * gap.clamp(min=0) ** 2
        loss = kl + goal.task_weight * task + goal.bound_weight * bound + budget
        self._raise_multiplier(gap.detach())
        parts = {"loss": loss, "kl": kl, "task": task, "bound": bound, "budget": budget}
        self.log_dict({f"train/{k}": v.detach() for k, v in parts.items()})
        self.log_dict(
            {"router/keep_soft": share.detach(), "router/target": self.target(), "router/multiplier": self.multiplier}
        )
        self.log_dict({f"router/keep/layer_{i:02d}": row.float().mean() for i, row in enumerate(routing.share)})
        return loss

    def target(self) -> float:
        """The keep rate asked for at this step: it falls from 1 to the objective's over the warm-up."""
        ramp = min(1.0, self.global_step / max(1.0, self.objective.warmup * self.steps))
        return 1.0 + ramp * (self.objective.keep - 1.0)

    def _noise(self, stream: int = 0) -> torch.Generator:
        """A source of draws that is a pure function of (seed, step, rank, stream)."""
        step = (self.seed * 1_000_003 + self.global_step) * 4096
        return torch.Generator().manual_seed(step + self.global_rank + 2048 * stream)

    @torch.no_grad()
    def _dense(self, batch: Batch) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """The dense model's logits, and the s and u (b l) that each layer's skip is predicted to cost."""
        rho: list[Tensor] = []

        def watch(index: int, before: Tensor, after: Tensor) -> None:
            rho.append(relative_change(before, after, self.model.group_mask()))

        prices = self.prices if self.objective.bound_weight else None
        if prices is not None and self.objective.price == "fisher":
            logits, slopes = first_order(self.model, batch, DRAWS, self._noise(1))
            return logits, prices.first_order_costs(slopes)
        with self.model.dense(), self.model.observe(watch):
            logits = self.model(**batch["inputs"], prompt_mask=batch["prompt_mask"], use_cache=False).logits
        return logits, None if prices is None else prices.costs(torch.stack(rho, 1))

    def _soft_keep(self) -> tuple[Routing, Tensor]:
        """The routing with its gates, and the batch's mean keep rate with the gates' gradient."""
        routing = self.model.runtime.routing
        assert routing is not None
        assert routing.gates is not None
        gates = routing.gates
        run, left = (flops.to(gates) for flops in self.model.flops())
        return routing, ((left + gates * (run - left)).sum(0) / run.sum(0)).mean()

    def _bound(self, routing: Routing, costs: tuple[Tensor, Tensor] | None) -> Tensor:
        assert routing.gates is not None
        if costs is None or self.prices is None:
            return routing.gates.new_zeros(())
        s, u = costs
        peaks = u if self.objective.bound == "two-point" else None
        return bounds.redundancy_bound(routing.gates.T, s, peaks, self.prices.correlation).mean()

    def _raise_multiplier(self, gap: Tensor) -> None:
        gap = self.trainer.strategy.reduce(gap, reduce_op="mean") if self.trainer.world_size > 1 else gap
        self.multiplier.add_(self.objective.budget_rate * gap.double()).clamp_(min=0)

    # -- validation --------------------------------------------------------------------------------------------------

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Real skipping on validation data: KL to the dense model, exact-match accuracy, keep rate."""
        with self.model.dense():
            dense = self.model(**batch["inputs"], prompt_mask=batch["prompt_mask"], use_cache=False).logits
        routed = self.model(**batch["inputs"], prompt_mask=batch["prompt_mask"], use_cache=False).logits
        self.val_kl.update(compare(dense, routed, batch["labels"])["kl"])
        self.val_accuracy.update(exact_match(routed, batch["labels"]).float())
        routing = self.model.routing
        self.val_keep.update(routing.keep_rate)
        self.keep_by_kind.update(routing.share, batch["kind"])
        self.log_dict(
            {"val/kl": self.val_kl, "val/accuracy": self.val_accuracy, "val/keep": self.val_keep}, prog_bar=True
        )

    def on_validation_epoch_start(self) -> None:
        """Keep rates are those of the coming pass alone."""
        self.keep_by_kind.reset()

    # -- Lightning's bookkeeping -------------------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        """AdamW on the routers, one-cycle."""
        assert self.model.routers is not None
        optimizer = torch.optim.AdamW(self.model.routers.parameters(), lr=self.learning_rate, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=self.learning_rate, total_steps=self.steps, pct_start=0.1, anneal_strategy="cos"
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Routers and multiplier only; the frozen backbone is not the checkpoint's business."""
        full = super().state_dict(*args, **kwargs)
        return {name: value for name, value in full.items() if not name.startswith("model.backbone.")}
