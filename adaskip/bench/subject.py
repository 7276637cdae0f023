"""What is measured: one model three times on the same weights, with inputs; here a stored one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from adaskip import sources
from adaskip.backbone import load
from adaskip.backbone.inspect import BackboneSpec, inspect_backbone, twin
from adaskip.errors import CheckpointError, ConfigError
from adaskip.policies.learned.config import RouterConfig
from adaskip.runtime.attach import RoutedModel, attach
from adaskip.training.data import Collator, load_records
from adaskip.verbs import splits
from adaskip.verbs.run import Run


@dataclass(frozen=True)
class Subject:
    """Hold a model three times on the same weights, and inputs for it.

    ``spec`` stays untouched: dense runs, and what is cut out of it for ideal ones; ``routed`` carries a policy.
    """

    name: str
    spec: BackboneSpec
    routed: RoutedModel
    batch: Callable[[int], dict[str, Tensor]]  # so many rows of model inputs
    trained: bool = False  # whether the policy comes from a run, so that its own decisions mean something


def stored_subject(target: str, device: torch.device, seed: int) -> Subject:
    """Load ``digits-vlm`` with untrained routers, or a run's folder with its policy; inputs are its test questions.

    Raises:
        CheckpointError: there is no such run.
    """
    if sources.is_shipped(target):
        model, processor = load.load_backbone(target), load.load_processor(target)
        spec = inspect_backbone(nn.Module.to(model.requires_grad_(False), device))
        routed, trained = attach(twin(spec), RouterConfig()), False
        records = load_records(target, "test", 512, seed)
    else:
        if not Path(target).is_dir():
            raise CheckpointError(
                f"{target}: expected {sources.shipped_names()} or the folder of a run; for a random model type "
                f"--backbone {target}"
            )
        run = Run.open(target)
        processor, trained = run.processor, True
        policy = run.model.policy
        spec = inspect_backbone(nn.Module.to(run.model.detach().requires_grad_(False), device))
        routed = attach(twin(spec), type(policy).from_dict(policy.to_dict()))
        routed.policy.load_state_dict(policy.state_dict())
        routed.set_threshold(policy.threshold)
        routed.hold(routed.sites.labels(policy.held))
        records = splits.records(run.recipe, "test")
    collate = Collator(processor, answers=False)

    def batch(rows: int) -> dict[str, Tensor]:
        if rows > len(records):
            raise ConfigError(f"--batch {rows}: expected at most {len(records)}, so many test questions there are")
        return {name: value.to(device) for name, value in collate(records[:rows]).inputs.items()}

    return Subject(target, spec, routed, batch, trained)
