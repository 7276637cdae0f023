"""Lossless decoding of SmolLM2-135M-Instruct: 500 prompts of ten kinds, in batches, each to its own end."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from adaskip.backbone.load import load_backbone, load_processor
from adaskip.plan import SkipPlan
from adaskip.runtime.attach import attach
from adaskip.training.data import Collator, load_records

ROOT = Path(__file__).parents[2]
MODEL, DATA = ROOT / "models/smollm2", ROOT / "data/smollm2"
PROMPTS, ROWS, NEW = 500, 10, 24


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not (MODEL / "config.json").is_file() or not DATA.is_dir(), reason="made by `make smollm2`")
def test_greedy_tokens_are_the_dense_models() -> None:
    """In float32, every token of all of them; it fails where a refused token is kept or a row's end is missed."""
    base = load_backbone(str(MODEL), dtype=torch.float32)
    model, collate = attach(base, SkipPlan.static([4, 5, 17])), Collator(load_processor(str(MODEL)), answers=False)
    records = load_records(str(DATA), "train", PROMPTS, 0)
    assert len(records) == PROMPTS
    accepted = tried = ended = 0
    for begin in range(0, PROMPTS, ROWS):
        inputs = collate(records[begin : begin + ROWS]).inputs
        options = {"max_new_tokens": NEW, "do_sample": False}
        with model.dense():
            expected = model.generate(**inputs, **options)
        assert torch.equal(model.generate(**inputs, **options, lossless=3), expected), begin
        accepted, tried = accepted + model.lossless.accepted, tried + model.lossless.tried
        ended += int((expected[:, -1] == base.generation_config.pad_token_id).sum())
    assert 0 < accepted < tried
    assert ended > 0
