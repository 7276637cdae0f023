"""SLEB with exact costs: one layer after another, always the one that costs least beside those that are gone."""

from __future__ import annotations

from adaskip.errors import ConfigError
from adaskip.methods.evidence import Evidence
from adaskip.methods.method import Method
from adaskip.survey.greedy import Path, greedy_paths


def choose(evidence: Evidence, keep: float, seed: int) -> Path:
    """Return the first of the nested plans that holds the budget; every remaining layer is tried at every step."""
    if evidence.holds((), keep):
        return ()
    found = greedy_paths(
        evidence.costs,
        evidence.everyone,
        evidence.single,
        evidence.layers,
        evidence.layers,
        lambda path: evidence.holds(path, keep),
        evidence.saves,
    )
    path = found[-1][0]
    if not evidence.holds(path, keep):
        raise ConfigError(f"keep={keep:g}: expected at least {evidence.keeps(path):.3f}, with every layer left out")
    return path


METHOD = Method(
    "greedy",
    "greedy by exact KL (SLEB)",
    "arXiv 2402.09025",
    choose,
    looks="costs",
    ours="the cost is the KL from the dense model, not the perplexity of a text",
)
