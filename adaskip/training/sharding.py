"""A frozen backbone whose layers are shared out over processes (FSDP2), while routers and adapters are whole on each.

    process 0   routers  | layer 0 a | layer 1 a | ...      before a layer runs, its parts are gathered, and let go
    process 1   routers  | layer 0 b | layer 1 b | ...      after it; every process calls every layer in every pass

What is trained is small and stays as it is: checkpoints and routers are those of any other strategy.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.optim import Optimizer

from adaskip.runtime.attach import RoutedModel
from adaskip.runtime.fingerprint import fingerprint


class ShardedBackbone(ModelParallelStrategy):
    """Train routers on a backbone of which every process holds a part: ``Trainer(strategy=ShardedBackbone())``.

    Validation reads batches as training does, so every process needs as many of them. ``objective.gradient: flips``
    needs the whole model in each.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(save_distributed_checkpoint=False, tensor_parallel_size=1, **options)

    def setup_environment(self) -> None:
        """Share the backbone out over all processes there are."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Return that the optimiser is restored as on one device: what it steps is whole."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return what is trained; the parent would gather the backbone."""
        return Strategy.lightning_module_state_dict(self)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Take what is trained."""
        Strategy.load_model_state_dict(self, checkpoint, strict)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the optimiser's state."""
        return Strategy.optimizer_state(self, optimizer)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Take the optimisers' states."""
        Strategy.load_optimizer_state_dict(self, checkpoint)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write one file."""
        Strategy.save_checkpoint(self, checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read one file."""
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only)


def shard_layers(model: RoutedModel, mesh: DeviceMesh) -> None:
    """Keep this process's part of each decoder layer, and let go of the rest, once; adapters stay whole."""
    if is_sharded(model):
        return
    model.whole = fingerprint(model.spec)  # by which saved routers know the backbone; nobody can read it off a part
    own = set() if model.adapters is None else {*model.adapters.parameters()}
    for layer in model.spec.layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=own)


def is_sharded(model: RoutedModel) -> bool:
    """Return whether no process holds the whole backbone."""
    return any(isinstance(layer, FSDPModule) for layer in cast(Iterable[nn.Module], model.spec.layers))


def average_gradients(weights: Iterable[nn.Parameter], strategy: Strategy) -> None:
    """Average over processes the gradients of what each has whole, which FSDP2 leaves alone."""
    weights = [weight for weight in weights if weight.requires_grad]
    own = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in weights]
    mean = strategy.reduce(torch.cat([part.flatten().float() for part in own]), reduce_op="mean")
    for weight, part in zip(weights, mean.split([part.numel() for part in own]), strict=True):
        if weight.grad is not None or part.any():  # the same on every process, whether it had a gradient or not
            weight.grad = part.view_as(weight).to(weight.dtype)
