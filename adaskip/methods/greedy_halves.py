"""Greedy by exact costs over halves of layers: always the attention or the MLP that costs least beside what is gone."""

from __future__ import annotations

from dataclasses import replace

from adaskip.methods.greedy import METHOD as GREEDY

METHOD = replace(
    GREEDY,
    name="greedy_halves",
    title="greedy by exact KL over halves of layers",
    source="after arXiv 2402.09025",
    unit="sublayers",
    ours="the cost is the KL from the dense model, and half a layer goes at a time where published are whole ones",
)
