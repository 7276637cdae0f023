"""Sinks are found where they are, and said in words."""

from __future__ import annotations

import json

import pytest
import torch

import adaskip
from adaskip.batch import Batch
from adaskip.plan import SkipPlan
from adaskip.survey.layers import survey_layers
from adaskip.survey.record import record
from adaskip.theory.sinks import SINK, describe_sinks, norm_ratios
from adaskip.verbs.profile import summary
from tests import toys

FIRST, THIRD = 1, 3
"""Tokens whose embeddings are made long."""


def planted(group: str = "all", count: int = 40) -> tuple[toys.Toy, list[Batch]]:
    """A toy, and rows of several lengths whose first token is a sink; in every second row the third is one as well."""
    toy = toys.make("llama" if group == "all" else "llava")
    inputs = toy.batch([7, 4, 6, 5] * (count // 4), seed=1)
    starts = (inputs["attention_mask"] == 0).sum(1)
    if group == "all":
        with torch.no_grad():
            toy.model.get_input_embeddings().weight[[FIRST, THIRD]] *= 2000
        rows = torch.arange(count)
        inputs["input_ids"][rows, starts] = FIRST
        inputs["input_ids"][rows[::2], starts[::2] + 2] = THIRD
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -1] = inputs["input_ids"][:, -1]
    return toy, [Batch(inputs, labels, inputs["attention_mask"].bool() & (labels == -100))]


def test_sinks_are_found_at_their_positions_whatever_the_padding() -> None:
    """Would catch: positions of the padded batch, a median over padding, or the sinks of one batch alone."""
    toy, batches = planted()
    model = adaskip.attach(toy.model, SkipPlan())
    measured = survey_layers(model, batches * 2, tangents=0)
    assert measured.sinks.inputs == 80
    for layer in range(4):
        assert measured.sinks.at(layer) == [{"position": 0, "share": 1.0}, {"position": 2, "share": 0.5}]
    recorded = record(model, batches[0])
    valid = batches[0].inputs["attention_mask"].bool()
    for row in range(4):
        for layer in range(4):
            norms = recorded.states[layer + 1][row, valid[row]].norm(dim=-1).double()
            assert measured.first[row, layer] == pytest.approx(float(norms[0] / norms.median()), rel=1e-5)
            assert measured.longest[row, layer] == pytest.approx(float(norms.max() / norms.median()), rel=1e-5)


def test_a_profile_tells_of_them() -> None:
    """Would catch: a profile whose pooled measures are blind, without a word; or a table of layers that have none."""
    toy, batches = planted()
    found = json.loads(json.dumps(adaskip.profile(toy.model, batches, tangents=0).to_dict(), allow_nan=False))
    said = found["groups"]["all"]["sinks"]
    assert said.startswith("sinks after layers 0 to 3: a state up to ")
    assert "at position 0, 2; a norm or a mean over tokens (pooled" in said
    rows = list(summary(found))[2]
    assert [row["layer"] for row in rows] == [0, 1, 2, 3]
    assert rows[0]["sink_at_position"] == "0 (100%), 2 (50%)"
    assert rows[0]["longest_token"] >= rows[0]["first_token"] > SINK
    toy, batches = planted("vision")
    quiet = adaskip.profile(toy.model, batches, ("vision",), tangents=0).to_dict()
    assert quiet["groups"]["vision"]["sinks"].startswith("no sinks: no layer's longest state is 10 times")
    assert list(summary(quiet))[2] == []


def test_norms_count_the_masked_tokens_alone() -> None:
    """Would catch: padding in the median, and a row of zeros that ends in a NaN, which JSON cannot hold."""
    states = torch.tensor([[[3.0], [1.0], [2.0], [torch.nan]], [[0.0], [0.0], [0.0], [0.0]]])
    mask = torch.tensor([[True, True, True, False], [True, True, False, False]])
    assert norm_ratios(states, mask).tolist() == [[1.5, 0.5, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]]
    half = torch.full((1, 2, 4096), 2000.0, dtype=torch.float16)
    assert norm_ratios(half, torch.ones(1, 2).bool()).tolist() == [[1.0, 1.0]], "a norm that float16 cannot hold"


def test_the_sentence_names_runs_of_layers() -> None:
    said = describe_sinks([1, 50, 60, 2, 70], [[], [0], [0, 4], [], []])
    assert said.startswith("sinks after layers 1 to 2, 4: a state up to 70 times")
    assert "at position 0, 4;" in said
    assert "token's, at no fixed position; a norm" in describe_sinks([50.0], [[]])
