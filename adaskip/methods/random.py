"""Leave out layers that are drawn: what a method has to beat before anything else."""

from __future__ import annotations

import torch

from adaskip.methods.budget import prefix
from adaskip.methods.evidence import Evidence
from adaskip.methods.method import Method
from adaskip.survey.greedy import Path


def draw(layers: int, seed: int) -> list[int]:
    """Return all layers in an order that is drawn; plans of one seed are nested."""
    return torch.randperm(layers, generator=torch.Generator().manual_seed(seed)).tolist()


def choose(evidence: Evidence, keep: float, seed: int) -> Path:
    """Return drawn layers."""
    return prefix(evidence, draw(evidence.layers, seed), keep)


METHOD = Method("random", "drawn layers", "a control", choose, draws=True)
