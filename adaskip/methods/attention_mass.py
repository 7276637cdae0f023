"""Leave vision tokens out of the layers in which the text attends to them least."""

from __future__ import annotations

from adaskip.methods.budget import prefix
from adaskip.methods.evidence import Evidence
from adaskip.methods.method import Method
from adaskip.survey.greedy import Path


def choose(evidence: Evidence, keep: float, seed: int) -> Path:
    """Return the layers of least attention mass of the text on vision, mean over inputs."""
    return prefix(evidence, evidence.geometry[2].argsort(stable=True).tolist(), keep)


METHOD = Method("attention_mass", "attention mass", "a rule of ours", choose, groups=("vision",), looks="states")
