"""Leave out the layers whose update is shortest beside their result (rho)."""

from __future__ import annotations

from adaskip.methods.budget import prefix
from adaskip.methods.evidence import Evidence
from adaskip.methods.method import Method
from adaskip.survey.greedy import Path


def choose(evidence: Evidence, keep: float, seed: int) -> Path:
    """Return the layers of least rho, mean over inputs."""
    return prefix(evidence, evidence.geometry[1].argsort(stable=True).tolist(), keep)


METHOD = Method("relative_change", "relative change (rho)", "a rule of ours", choose, looks="states")
