"""What is measured: one model three times on the same weights, with inputs; here a stored one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from adaskip.backbone.inspect import BackboneSpec, inspect_backbone, twin
from adaskip.demo.backbone import EMBEDDED
from adaskip.errors import CheckpointError, ConfigError
from adaskip.policies.learned.config import RouterConfig
from adaskip.runtime.attach import RoutedModel, attach


@dataclass(frozen=True)
class Subject:
    """A model three times on the same weights, and inputs for it.

    ``spec`` stays untouched: dense runs, and what is cut out of it for ideal ones; ``routed`` carries routers.
    """

    name: str
    spec: BackboneSpec
    routed: RoutedModel
    batch: Callable[[int], dict[str, Tensor]]  # so many rows of model inputs
    trained: bool = False  # whether the routers were trained, so that their own decisions mean something


def stored_subject(target: str, device: torch.device, seed: int) -> Subject:
    """``digits-vlm`` with untrained routers, or the folder of a run with its own; inputs are its test questions.

    Raises:
        CheckpointError: there is no such run.
    """
    from adaskip.training.data import Collator, load_records

    if target == EMBEDDED:
        from adaskip.demo.backbone import load

        model, processor = load()
        spec = inspect_backbone(nn.Module.to(model.requires_grad_(False), device))
        routed, trained = attach(twin(spec), RouterConfig()), False
        records = load_records(EMBEDDED, "test", 512, seed)
    else:
        from adaskip.verbs.run import open_run
        from adaskip.verbs.train import records as split

        if not Path(target).is_dir():
            raise CheckpointError(
                f"{target}: expected {EMBEDDED} or the folder of a run; for a random model type --backbone {target}"
            )
        run = open_run(Path(target))
        processor, trained = run.processor, True
        policy = run.model.policy
        spec = inspect_backbone(nn.Module.to(run.model.detach().requires_grad_(False), device))
        routed = attach(twin(spec), type(policy).from_dict(policy.to_dict()))
        routed.policy.load_state_dict(policy.state_dict())
        routed.set_threshold(policy.threshold)
        routed.hold(policy.held)
        records = split(run.recipe, "test")
    collate = Collator(processor, answers=False)

    def batch(rows: int) -> dict[str, Tensor]:
        if rows > len(records):
            raise ConfigError(f"--batch {rows}: expected at most {len(records)}, so many test questions there are")
        return {name: value.to(device) for name, value in collate(records[:rows]).inputs.items()}

    return Subject(target, spec, routed, batch, trained)
