"""A user's own language model and data, as small as they can be, and settings of a short run on them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests import toys

SHORT = [
    "trainer.steps=4",
    "trainer.batch_size=8",
    "trainer.checkpoint_every=2",
    "trainer.validate_every=2",
    "trainer.progress=false",
    "conditions.every=2",
    "conditions.examples=8",
    "tracking.wandb=disabled",
    "static.width=0",  # the routers of so short a run beat no plan
    "backbone.dtype=float32",
]


@pytest.fixture
def language_model(tmp_path: Path) -> Path:
    """A tiny Llama with its tokenizer, in a folder."""
    torch.manual_seed(0)
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(90))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(tmp_path / "llama")
    toys.llama().save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Three splits of JSON lines; there is no calibration file."""
    folder = tmp_path / "data"
    folder.mkdir()
    for split, count in (("train", 40), ("validation", 32), ("test", 8)):
        rows = [
            {"prompt": f"w{i % 7} w{i % 5} w{i % 3}", "answer": f"w{i % 7}", "kind": f"k{i % 2}"} for i in range(count)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
