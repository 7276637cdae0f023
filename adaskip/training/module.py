"""`RouterTuner`: fine-tune the routers of a frozen model."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import lightning
import torch
from torch import Tensor
from torchmetrics import MeanMetric

from adaskip.backbone.weights import find_packed
from adaskip.batch import Batch, check_batch, exact_match, fingerprints
from adaskip.errors import ConfigError
from adaskip.plan import Routing
from adaskip.runtime.adapters import trained_adapters
from adaskip.runtime.attach import RoutedModel
from adaskip.survey.dense_costs import SkipCosts, price_dense
from adaskip.theory.costs import compare
from adaskip.theory.prices import Prices
from adaskip.training.gradient import check_strategy, draw_path
from adaskip.training.inputs import from_rank_zero
from adaskip.training.keep_rates import KeepByKind
from adaskip.training.objective import Objective, check_gradient, is_count, is_number
from adaskip.training.pricing import LIMIT, check_prices, from_state, price_objective, read_calibration, same, to_state
from adaskip.training.schedule import OneCycle, length
from adaskip.training.seeds import seed_at
from adaskip.training.sharding import ShardedBackbone, average_gradients, is_sharded, shard_layers
from adaskip.training.shares import share_out

OVERSHOOT = 10.0
"""Nats that a unit of keep above the target costs in ``val/objective``: more than any layer's skip saves in KL."""

_log = logging.getLogger(__name__)


class RouterTuner(lightning.LightningModule):
    """Train the routers so that the routed model predicts like the dense one at a fraction of its compute.

    Adapters that the model has (`adaskip.adapt`) are trained along with them, in routed passes alone: the dense model
    stays what it is. They are left as they are where they ask for no gradient.

        loss = E KL(p_dense || p_routed) + task_weight * CE + bound_weight * E[B] + budget

    The budget is an augmented Lagrangian on the expected keep rate; its multiplier is a buffer, so it resumes, and it
    takes one step an optimiser step. Random draws are a pure function of (seed, step, micro-batch): a resumed run
    repeats an uninterrupted one. Routers and multiplier keep their precision whatever the trainer's is.

    Several processes that read a batch together have the losses and gradients of one that reads it alone, also where
    their shares differ, but for what each draws for itself: the labels of price ``fisher``, and adapters' dropout.

    The prices of B come from inputs that nothing else is fitted on or judged by. With ``calibration`` they are
    calibrated when a fit starts, for the objective's ``price`` and ``alpha``, on rank 0's inputs and equal on every
    rank; checkpoints hold them, and a resumed run goes on with those of its checkpoint.

    Validation logs ``val/kl``, ``val/accuracy``, ``val/keep`` and ``val/objective``, which is ``val/kl`` plus ten nats
    for every unit of keep above the target. Monitor the last one: while the target still falls nearly everything runs,
    so that ``val/kl`` alone is best at the start.

    Args:
        model: what `attach` returned.
        objective: weights and the target.
        prices: calibrated constants of the redundancy bound, of the objective's price.
        calibration: batches or a loader to calibrate them on instead; at most 256 inputs are read.
        learning_rate: peak of a one-cycle schedule.
        steps: length of the schedule in optimiser steps; None: as many as the trainer will run.
        temperature: of the gates, at the first step: of what is drawn and of the slope.
        last_temperature: at the last step; it falls geometrically in between. As it falls, what is drawn, and with it
            the budget, becomes what the routers decide. None: it stays.
        kinds: labels that keep rates are reported by, for instance kinds of question; all others count as ``other``.
        seed: of the gates' exploration noise and of what calibration draws.

    Raises:
        ConfigError: no routers to train, or a value outside its range. When a fit starts: the bound has a weight and
            nothing prices it, or nothing says how long training is.
        DataError: when a fit starts: too few calibration inputs.
    """

    multiplier: Tensor

    def __init__(
        self,
        model: RoutedModel,
        objective: Objective,
        prices: Prices | None = None,
        *,
        calibration: Iterable[Batch] | None = None,
        learning_rate: float = 1e-3,
        steps: int | None = None,
        temperature: float = 1.0,
        last_temperature: float | None = None,
        kinds: Iterable[Any] = (),
        seed: int = 0,
    ) -> None:
        super().__init__()
        last_temperature = temperature if last_temperature is None else last_temperature
        _check_arguments(model, objective, prices, calibration, learning_rate, steps, (temperature, last_temperature))
        check_gradient(objective, model.target.scope, bool(trained_adapters(model)))
        self.strict_loading = False  # checkpoints hold no frozen weights
        self.model, self.objective, self.prices, self.calibration = model, objective, prices, calibration
        self.learning_rate, self.steps, self.seed = learning_rate, steps, seed
        self.temperatures = temperature, last_temperature
        self.calibrated_on: frozenset[str] = frozenset()  # fingerprints of the inputs that the prices were fitted on
        self.register_buffer("multiplier", torch.tensor(objective.budget_start, dtype=torch.float64))
        self.val_kl, self.val_keep, self.val_accuracy = MeanMetric(), MeanMetric(), MeanMetric()
        self.test_kl, self.test_keep, self.test_accuracy = MeanMetric(), MeanMetric(), MeanMetric()
        self.keep_by_kind = KeepByKind(len(model.sites), [*kinds])
        self._names = [f"router/keep/layer_{model.sites.key(site)}" for site in range(len(model.sites))]
        self._length = steps or 1
        self._micro = 0  # micro-batches of this optimiser step before the present one
        self._gaps: list[Tensor] = []  # of the micro-batches since the last optimiser step
        self._inputs: list[Batch] | None = None  # to calibrate on, between setup and the start of a fit

    def configure_model(self) -> None:
        """Share the backbone's layers out over processes, where the strategy asks for it."""
        if isinstance(self.trainer.strategy, ShardedBackbone):
            assert self.device_mesh is not None
            shard_layers(self.model, self.device_mesh["data_parallel"])

    # -- prices ------------------------------------------------------------------------------------------------------

    def calibrate(self, batches: Iterable[Batch], limit: int = LIMIT) -> Prices:
        """Calibrate the prices of the objective now, on inputs that nothing else is fitted on or judged by.

        Args:
            batches: prompts with answers.
            limit: inputs to read at most.

        Raises:
            DataError: too few inputs for a finite constant at the objective's alpha.
        """
        inputs = read_calibration(self.model, batches, self.objective, limit)
        self.prices = price_objective(self.model, inputs, self.objective, self.seed)
        self.calibrated_on = frozenset(fingerprints(inputs))
        return self.prices

    def setup(self, stage: str) -> None:
        """Read and count the calibration inputs before anything runs; every rank gets those of rank 0."""
        if stage != "fit" or self.calibration is None or self.prices is not None:
            return
        source, model, goal = self.calibration, self.model, self.objective
        self._inputs = from_rank_zero(self.trainer, lambda: read_calibration(model, source, goal))
        self.calibrated_on = frozenset(fingerprints(self._inputs))

    def on_fit_start(self) -> None:
        """Price what a skip costs, unless prices are at hand, and check that the objective has what it needs."""
        check_strategy(self.objective, self.trainer)
        back = self.objective.gradient == "straight-through" or self.objective.price == "fisher"
        if back and find_packed(self.model.backbone) is not None:
            raise ConfigError(
                "RouterTuner: the backbone's weights are packed by dynamic quantisation, through which no gradient "
                "passes; train on the backbone as it was, then load the routers onto the packed one, or train with "
                "Objective(gradient='flips') and without price='fisher', which take none"
            )
        inputs, self._inputs = self._inputs, None
        self._gaps.clear()  # a fit before this one may have been interrupted between two steps
        if self.prices is None and inputs is not None:
            convert = self.trainer.precision_plugin.convert_input
            # every rank prices the same inputs: a sharded model needs all of them, and none waits for long
            self.prices = price_objective(self.model, map(convert, inputs), self.objective, self.seed)
        if self.trainer.world_size > 1:
            self.prices = self.trainer.strategy.broadcast(self.prices)
        check_prices(self.prices, self.objective, len(self.model.sites))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the prices and which inputs they were fitted on."""
        if self.prices is not None:
            checkpoint["adaskip"] = {"prices": to_state(self.prices), "calibrated_on": sorted(self.calibrated_on)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the prices of the checkpoint."""
        if (state := checkpoint.get("adaskip")) is None:
            return
        stored = from_state(state["prices"])
        if self.prices is not None and not same(self.prices, stored):
            _log.warning("the checkpoint's prices replace those that RouterTuner was given")
        self.prices, self.calibrated_on = stored, frozenset(state["calibrated_on"])

    # -- training ----------------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of one batch of prompts with answers."""
        check_batch(batch, "training")
        self._micro = batch_idx % self.trainer.accumulate_grad_batches
        share = share_out(self, batch)
        dense, costs = self._dense(batch)
        noise = self._noise() if share is None else share.noise(self._noise())
        with nullcontext() if self.model.adapters is None else self.model.adapters.dropping(self._seed(2)):
            kl, task = draw_path(self.model, batch, dense, self.objective, noise, self.temperature())
        routing, keep = self._soft_keep()
        bound, kept = self._bound(routing, costs), [*routing.share.float().mean(1)]
        if share is not None:
            kl, task, bound, keep, *kept = share.whole([kl, task, bound, keep, *kept])
        goal = self.objective
        gap = keep - self.target()
        budget = self.multiplier.float() * gap + goal.budget_weight * gap.clamp(min=0) ** 2
        loss = kl + goal.task_weight * task + goal.bound_weight * bound + budget
        self._gaps.append(gap.detach().clone())  # the graph shares the memory, and a reduction writes into it
        parts = {"loss": loss, "kl": kl, "task": task, "bound": bound, "budget": budget}
        self.log_dict({f"train/{k}": v.detach() for k, v in parts.items()})
        self.log_dict({"router/keep_soft": keep.detach(), "router/target": self.target()})
        self.log("router/temperature", self.temperature())
        self.log_dict(dict(zip(self._names, kept, strict=True)))
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Raise the budget's multiplier by the mean gap of this step's micro-batches, after every gradient is here."""
        if is_sharded(self.model):
            average_gradients([*self.model.policy.parameters(), *trained_adapters(self.model)], self.trainer.strategy)
        gap = torch.stack(self._gaps).mean()
        self._gaps.clear()
        self.multiplier.add_(self.objective.budget_rate * gap.double()).clamp_(min=0)
        self.log("router/multiplier", self.multiplier)

    def target(self) -> float:
        """Return the keep rate asked for at this step: it falls from 1 to the objective's over the warm-up."""
        over = self.objective.warmup * self._length
        ramp = min(1.0, self.global_step / max(1.0, over)) if over else 1.0
        return 1.0 + ramp * (self.objective.keep - 1.0)

    def temperature(self) -> float:
        """Return the temperature of the gates at this step."""
        first, last = self.temperatures
        return float(first * (last / first) ** min(1.0, self.global_step / self._length))

    def _noise(self, stream: int = 0) -> torch.Generator:
        """Make a source of draws that is a pure function of (seed, step, micro-batch, rank, stream).

        In stream 0, of which paths are drawn, all ranks have the same source, and each draws what falls to its rows.
        """
        return torch.Generator().manual_seed(self._seed(stream))

    def _seed(self, stream: int) -> int:
        return seed_at(self.seed, self.global_step, self._micro, self.global_rank if stream else 0, stream)

    def _dense(self, batch: Batch) -> tuple[Tensor, SkipCosts | None]:
        """Return the dense model's logits, and what each layer's skip is predicted to cost each input."""
        prices = self.prices if self.objective.bound_weight else None
        return price_dense(self.model, batch, prices, self.objective.price, self._noise(1))

    def _soft_keep(self) -> tuple[Routing, Tensor]:
        """Return the routing with its gates, and the batch's mean keep rate with the gates' gradient."""
        routing = self.model.runtime.routing
        assert routing is not None
        gates = routing.gates
        # a policy that changes what enters the first layer may learn that, and decide without a gradient
        if gates is None or not (gates.requires_grad or self.model.policy.enters):
            raise ConfigError(
                f"RouterTuner: {type(self.model.policy).__name__}.decide returned booleans, through which nothing can "
                "be learned; return float32 logits"
            )
        # a skip saves the difference only: kept keys and values, and tokens outside the group, still cost something
        run_flops, skip_flops = (flops.to(gates) for flops in self.model.flops())
        return routing, ((skip_flops + gates * (run_flops - skip_flops)).sum(0) / run_flops.sum(0)).mean()

    def _bound(self, routing: Routing, costs: SkipCosts | None) -> Tensor:
        assert routing.gates is not None
        if costs is None:
            return routing.gates.new_zeros(())
        return costs.bound(routing.gates.T, self.objective.bound).mean()

    # -- validation, test, prediction ----------------------------------------------------------------------------------

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Judge real skipping on validation data: KL to the dense model, exact-match accuracy, keep rate."""
        routing = self._judge(batch, "validation", self.val_kl, self.val_accuracy, self.val_keep)
        if batch.counted:
            self.keep_by_kind.update(routing.share, batch.kind)

    def on_validation_epoch_start(self) -> None:
        """Count the coming pass alone."""
        # those of `trainer.validate`, which runs in inference mode, may not be written to while fitting
        for metric in (self.val_kl, self.val_accuracy, self.val_keep, self.keep_by_kind):
            metric.reset()

    def on_validation_epoch_end(self) -> None:
        """Log the pass, several loaders as one, and the number that a checkpoint should be chosen by."""
        if self.val_keep.update_called:
            self.log_dict(
                {"val/kl": self.val_kl, "val/accuracy": self.val_accuracy, "val/keep": self.val_keep}, prog_bar=True
            )
            excess = (self.val_keep.compute() - self.objective.keep).clamp(min=0)
            self.log("val/objective", self.val_kl.compute() + OVERSHOOT * excess, sync_dist=self.trainer.world_size > 1)

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Judge real skipping on test data, by the same figures as in validation, under ``test/``."""
        self._judge(batch, "test", self.test_kl, self.test_accuracy, self.test_keep)

    def on_test_epoch_end(self) -> None:
        """Log the pass, several loaders as one."""
        if self.test_keep.update_called:
            self.log_dict({"test/kl": self.test_kl, "test/accuracy": self.test_accuracy, "test/keep": self.test_keep})

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """Route a batch, with or without answers: ``keep`` bool (s b ...), ``keep_rate`` (b), ``logits`` (b t v)."""
        check_batch(batch, "predict", answers=False)
        logits = self.model(**batch.arguments()).logits
        routing = self.model.routing
        return {"keep": routing.keep, "keep_rate": routing.keep_rate, "logits": logits}

    def _judge(self, batch: Batch, where: str, kl: MeanMetric, accuracy: MeanMetric, keep: MeanMetric) -> Routing:
        """Run a batch densely and routed, and count what comes of it."""
        check_batch(batch, where)
        with self.model.dense():
            dense = self.model(**batch.arguments()).logits
        routed = self.model(**batch.arguments()).logits
        routing = self.model.routing
        if not batch.counted:
            return routing
        kl.update(compare(dense, routed, batch.supervised)["kl"])
        accuracy.update(exact_match(routed, batch.labels).float())
        keep.update(routing.keep_rate)
        return routing

    # -- Lightning's bookkeeping -------------------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        """Make AdamW on the policy's parameters, and on adapters, with a one-cycle schedule."""
        self._length = length(self.trainer, self.steps, self.objective.warmup)
        parts = [{"params": [*self.model.policy.parameters()], "weight_decay": 0.01}]
        if adapted := trained_adapters(self.model):
            parts.append({"params": adapted, "weight_decay": 0.0})
        optimizer = torch.optim.AdamW(parts, lr=self.learning_rate)
        schedule = OneCycle(optimizer, self.learning_rate, self._length)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _apply(self, fn: Any, recurse: bool = True) -> RouterTuner:
        """Follow to another device and precision, but for the multiplier: its steps are too small for bfloat16."""
        exact = self.multiplier
        super()._apply(fn, recurse)
        self.multiplier = exact.to(self.multiplier.device)
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return routers, adapters and multiplier only: the frozen backbone does not belong into a checkpoint."""
        full = super().state_dict(*args, **kwargs)
        adapted = {} if self.model.adapters is None else self.model.adapters.state_dict()
        return {name: value for name, value in full.items() if not name.startswith("model.backbone.")} | adapted

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        """Take what `state_dict` gave.

        Raises:
            CheckpointError: its adapters are those of other modules or of another rank.
        """
        if self.model.adapters is not None:
            self.model.adapters.load_state_dict(state_dict)
        return super().load_state_dict(state_dict, *args, **kwargs)


def _check_arguments(
    model: Any, objective: Any, prices: Any, calibration: Any, learning_rate: Any, steps: Any, temperatures: Any
) -> None:
    if not isinstance(model, RoutedModel):
        raise ConfigError(f"RouterTuner: expected a RoutedModel, got {type(model).__name__}; call adaskip.attach first")
    if next(model.policy.parameters(), None) is None:
        raise ConfigError(
            f"RouterTuner: the model's policy ({type(model.policy).__name__}) has no parameters to train; attach with "
            "a RouterConfig, or a policy that has some and gives logits"
        )
    if prices is not None and calibration is not None:
        raise ConfigError("RouterTuner: expected prices or calibration, got both; calibration would replace the prices")
    ranges = {
        "prices": (prices is None or isinstance(prices, Prices), prices, "Prices; batches go into calibration="),
        "objective": (isinstance(objective, Objective), objective, "an Objective, as in adaskip.Objective(keep=0.6)"),
        "learning_rate": (is_number(learning_rate) and learning_rate > 0, learning_rate, "a number > 0"),
        "steps": (steps is None or is_count(steps), steps, "an integer >= 1, or None for as many as the trainer runs"),
    }
    for name, value in zip(("temperature", "last_temperature"), temperatures, strict=True):
        ranges[name] = is_number(value) and value > 0, value, "a number > 0"
    faults = [f"{name}: expected {span}, got {value!r}"[:200] for name, (ok, value, span) in ranges.items() if not ok]
    if faults:
        raise ConfigError("RouterTuner: " + "; ".join(faults))
