"""`adaskip profile` checks its sizes before it works: a bad one is refused in words, with what to type."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import adaskip
from adaskip.batch import Batch
from adaskip.errors import ConfigError, DataError
from adaskip.survey import sizes
from adaskip.verbs.profile import profile_model
from tests import toys


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "expected --batch-size of 1 to 256, as many as there are --examples, got 0"),
        ({"batch_size": 41, "examples": 40}, "expected --batch-size of 1 to 40, .* got 41"),
        ({"tangents": -1}, r"expected --tangents of 0 \(none\) or more inputs, got -1"),
        ({"oracle": -1}, "expected --oracle of 0 to 256, some of the --examples, got -1"),
        ({"oracle": 41, "examples": 40}, "expected --oracle of 0 to 40, .* got 41"),
        ({"keep": 1.0}, "expected --keep between 0 and 1, the share of the layers that stay, got 1"),
        ({"keep": math.nan}, "expected --keep between 0 and 1"),
        ({"tolerance": 0.0}, "expected --tolerance above 0, nats per predicted token, got 0"),
        ({"tolerance": math.inf}, "expected --tolerance above 0"),
    ],
)
def test_numbers_that_cannot_be_meant(
    settings: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Would catch: a model that is loaded and measured for an hour before a number is found to be wrong."""
    monkeypatch.setattr("adaskip.backbone.load.load_backbone", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(ConfigError, match=message):
        profile_model("digits-vlm", output=tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def rows(toy: toys.Toy, count: int = 40, longest: int = 9) -> list[Batch]:
    """Batches of eight rows; one row of the last batch is the longest, all others have five tokens."""
    found = []
    for start in range(0, count, 8):
        lengths = [5] * 7 + [longest if start + 8 == count else 5]
        inputs = toy.batch(lengths, seed=start)
        labels = torch.full_like(inputs["input_ids"], -100)
        labels[:, -1] = inputs["input_ids"][:, -1]
        found.append(Batch(inputs, labels, inputs["attention_mask"].bool() & (labels == -100)))
    return found


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring anything fails the test."""
    monkeypatch.setattr("adaskip.survey.profile.survey_layers", lambda *_, **__: pytest.fail("layers were measured"))


def test_a_row_longer_than_the_positions(unmeasured: None) -> None:
    """Would catch: an index error in the last of many batches, or figures of positions that mean nothing."""
    toy = toys.make("llama")
    toy.model.config.max_position_embeddings = 8
    message = r"1 of 40 rows, prompt and answer, are longer than the backbone's 8 positions, the longest has 9 tokens"
    with pytest.raises(DataError, match=message):
        adaskip.profile(toy.model, rows(toy))
    assert not hasattr(toy.model, "_adaskip"), "the model is handed back"
    with pytest.raises(pytest.fail.Exception, match="layers were measured"):
        adaskip.profile(toy.model, rows(toy, longest=8))


def test_a_batch_that_no_memory_holds(unmeasured: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch: a process that the system kills without a word, and advice that does not help."""
    toy = toys.make("llama")
    states, logits = 2 * 4 * 5 * 32 * 4, 6 * 8 * toys.VOCABULARY
    monkeypatch.setattr(sizes, "memory", lambda device: 3 * (states + logits) + 1)
    message = (
        r"a batch of 8 rows of 5 tokens, 8 of them scored, needs at least .* GB.*; expected --batch-size of at most 3"
    )
    with pytest.raises(DataError, match=message):
        adaskip.profile(toy.model, rows(toy, longest=5))
    monkeypatch.setattr(sizes, "memory", lambda device: 100)
    with pytest.raises(DataError, match="shorten the rows"):
        adaskip.profile(toy.model, rows(toy, longest=5))
    monkeypatch.setattr(sizes, "memory", lambda device: None)
    with pytest.raises(pytest.fail.Exception, match="layers were measured"):
        adaskip.profile(toy.model, rows(toy, longest=5))


def test_this_machine_says_its_memory() -> None:
    """Would catch: pages taken for bytes."""
    found = sizes.memory(torch.device("cpu"))
    assert found is None or found > 2**28
    assert sizes.memory(torch.device("meta")) is None
