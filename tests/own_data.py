"""A user's own language model and data, as small as they can be, and settings of a short run on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests import toys
from tests.processors import CHAT, picture_processor

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


@pytest.fixture
def vision_model(tmp_path: Path) -> Path:
    """A tiny Llava with its processor and a chat template, in a folder."""
    torch.manual_seed(0)
    processor = picture_processor("<s>")
    processor.chat_template = CHAT
    processor.save_pretrained(tmp_path / "llava")
    toys.llava().save_pretrained(tmp_path / "llava")
    return tmp_path / "llava"


def conversation(number: int, folder: Path) -> dict[str, Any]:
    """One line of a conversation: every second one with a picture of its own, every third with two answers."""
    words = [f"w{number % 7}", f"w{10 + number % 11}", f"w{30 + number % 13}"]
    parts: list[dict[str, Any]] = [{"type": "text", "text": " ".join(words)}]
    if number % 2:
        Image.new("RGB", (16, 16), (number, 255 - number, 9)).save(folder / f"{number}.png")
        parts.insert(0, {"type": "image", "image": f"{number}.png"})
    turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": words[0]}]
    if number % 3 == 0:
        turns += [{"role": "user", "content": "w50"}, {"role": "assistant", "content": f"{words[1]} {words[2]}"}]
    return {"messages": turns, "kind": f"k{number % 2}"}
