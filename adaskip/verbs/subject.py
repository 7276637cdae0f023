"""Open what a comparison is made on: a backbone without a policy, its processor, and the data that it is judged on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from adaskip import sources
from adaskip.backbone import load
from adaskip.backbone.inspect import count_positions
from adaskip.errors import ConfigError
from adaskip.plan import Group
from adaskip.recipe import BackboneSection, DataSection, Recipe
from adaskip.runfiles import RECIPE
from adaskip.training.data import Collator, Record
from adaskip.verbs.run import load_model, load_processor, read_recipe
from adaskip.verbs.splits import read_split


@dataclass(frozen=True)
class Subject:
    """Hold what is compared on: a backbone without a policy, records, and how they become batches."""

    recipe: Recipe | None
    model: str
    source: str
    group: Group
    processor: Any
    backbone: Any

    @property
    def backbone_section(self) -> BackboneSection:
        """Return how the backbone is loaded."""
        return BackboneSection(path=self.model) if self.recipe is None else self.recipe.backbone

    @property
    def data_section(self) -> DataSection:
        """Return how the records are read: as the run does, if they are its own."""
        if self.recipe is None:
            return DataSection(source=self.source)
        own = self.recipe.data.source == self.source
        return self.recipe.data if own else DataSection(source=self.source, columns=self.recipe.data.columns)

    def records(self, split: str, count: int) -> list[Record]:
        """Read the first records of a split."""
        positions = count_positions(self.backbone.config)
        return read_split(self.data_section, split, count, 0, lambda: (Collator(self.processor), positions))


def open_subject(target: str | Path, data: str | None, group: str | None) -> Subject:
    """Load the model that is compared on, and find its data.

    Args:
        target: a Hugging Face id, a folder, the name of what ships with the package, or the folder of a run.
        data: a folder of JSON lines, or a dataset id; None: the run's own, or what ships with the model.
        group: ``all`` or ``vision``; None: the run's, or ``all``.

    Raises:
        ConfigError: the run routes another group, or nothing names the data.
    """
    if (Path(target) / RECIPE).is_file():
        recipe = read_recipe(Path(target))
        own = recipe.router.group
        if group not in (None, own):
            raise ConfigError(f"compare: {target} routes group {own}; leave --group out, or name a model instead")
        source = data or recipe.data.source
        backbone = load_model(recipe)
        if torch.cuda.is_available() and not recipe.backbone.device_map:
            torch.nn.Module.cuda(backbone)
        return Subject(recipe, recipe.backbone.path, source, own, load_processor(recipe), backbone)
    name = str(target)
    if data is None and not sources.is_shipped(name):
        raise ConfigError(f"compare: {name} needs prompts with answers; name them: --data DIR (or a dataset id)")
    backbone = load.load_backbone(name)
    if torch.cuda.is_available():
        torch.nn.Module.cuda(backbone)
    return Subject(None, name, data or name, cast(Group, group or "all"), load.load_processor(name), backbone)
