"""ShortV: freeze vision tokens in the layers that contribute least, by the exact KL of freezing one alone."""

from __future__ import annotations

from adaskip.methods.budget import prefix
from adaskip.methods.evidence import Evidence
from adaskip.methods.method import Method
from adaskip.survey.greedy import Path


def choose(evidence: Evidence, keep: float, seed: int) -> Path:
    """Return the layers of least exact cost alone, mean over inputs."""
    return prefix(evidence, evidence.single.argsort(stable=True).tolist(), keep)


METHOD = Method(
    "shortv",
    "exact cost of each layer alone (ShortV)",
    "arXiv 2504.00502",
    choose,
    kv="kept",
    looks="costs",
    ours="for group all the same rule on whole layers",
)
