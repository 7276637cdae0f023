"""ShortGPT: leave out the layers of least block influence, those that turn a token's state least."""

from __future__ import annotations

from adaskip.methods.budget import prefix
from adaskip.methods.evidence import Evidence
from adaskip.methods.method import Method
from adaskip.survey.greedy import Path


def choose(evidence: Evidence, keep: float, seed: int) -> Path:
    """Return the layers of least 1 - cos between a token's states before and after, mean over tokens and inputs."""
    return prefix(evidence, evidence.geometry[0].argsort(stable=True).tolist(), keep)


METHOD = Method("block_influence", "block influence (ShortGPT)", "arXiv 2403.03853", choose, looks="states")
