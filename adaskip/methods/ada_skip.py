"""AdaSkip: leave out the attentions and MLPs that turn a token's state least, each ranked by itself.

Published is a ranking of sublayers, attention and MLP apart, by the cosine similarity of what enters each and what
leaves it, on calibration inputs for prefill, and anew from the first generated tokens for decoding. Here one ranking,
of the prompt's tokens, serves both: a plan is the same for every input. What a skipped sublayer would have added is not
made up for by a factor on the states.
"""

from __future__ import annotations

from adaskip.methods.budget import prefix
from adaskip.methods.evidence import Evidence
from adaskip.methods.method import Method
from adaskip.survey.greedy import Path


def choose(evidence: Evidence, keep: float, seed: int) -> Path:
    """Return the fewest halves of layers, those of the least turn first, that hold the budget."""
    return prefix(evidence, evidence.turns.argsort(stable=True).tolist(), keep)


METHOD = Method(
    "ada_skip",
    "sublayers by similarity (AdaSkip)",
    "arXiv 2501.02336",
    choose,
    unit="sublayers",
    looks="states",
    ours="one ranking by the prompt's tokens, for generated ones too, where published ranks anew while decoding; no "
    "factor makes up for what is left out",
)
