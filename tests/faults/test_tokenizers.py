"""Tokenizers that lack what most have: an end token, padding, a mask; and texts that they make nothing of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, models, normalizers

import adaskip
from adaskip.errors import DataError
from adaskip.training.data import Collator, load_records, loader
from tests import toys
from tests.processors import tokenizer

RECORDS = [{"prompt": "w1 w2 w3", "answer": "w4"}, {"prompt": "w5", "answer": "w6 w7"}]


def test_no_end_token() -> None:
    """Without an end token an answer ends where it ends."""
    batch = Collator(tokenizer(eos_token=None))(RECORDS)
    ids = tokenizer().convert_tokens_to_ids
    assert [row[row >= 0].tolist() for row in batch.labels] == [ids(["w4"]), ids(["w6", "w7"])]


@pytest.mark.parametrize("missing", [
    ("pad_token",), ("pad_token", "eos_token"), ("pad_token", "eos_token", "bos_token"),
    ("pad_token", "eos_token", "bos_token", "unk_token"),
], ids=len)  # fmt: skip
def test_no_padding_token(missing: tuple[str, ...]) -> None:
    """Any token can pad, as the mask hides it: the loss is that of a tokenizer that has one."""
    model = adaskip.attach(toys.make("llama").model)
    found = []
    for words in (tokenizer(eos_token=None), tokenizer(**dict.fromkeys((*missing, "eos_token")))):
        batch = Collator(words)(RECORDS)
        logits = model(**batch.arguments()).logits
        found.append(logits[batch.inputs["attention_mask"].bool()])
    assert torch.allclose(*found, atol=1e-5)


def test_no_mask_unless_asked() -> None:
    """Some tokenizers return an attention mask only when told to."""
    words = tokenizer()
    words.model_input_names = ["input_ids"]
    assert Collator(words)(RECORDS).prompt_mask.sum(1).tolist() == [3, 1]


def write(folder: Path, *rows: dict[str, str]) -> list:
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_records(str(folder), "train", None, 0)


def ascii_only(words: Any) -> Any:
    words.backend_tokenizer.normalizer = normalizers.Replace(Regex("[^\\x00-\\x7f]"), "")
    return words


def test_an_answer_without_tokens(tmp_path: Path) -> None:
    """Characters that a tokenizer drops leave nothing; no supervised token would make the loss NaN."""
    words = ascii_only(tokenizer(eos_token=None))
    records = write(tmp_path, RECORDS[0], {"prompt": "w1", "answer": "\u4f60"}, {"prompt": "w1", "answer": "\u597d"})
    with pytest.raises(DataError) as caught:
        loader(records, Collator(words), 2)
    assert "train.jsonl, line 2: the tokenizer makes no tokens of the answer '\u4f60'" in str(caught.value)
    assert "line 3" in str(caught.value)
    with pytest.raises(DataError, match="line 2: the tokenizer makes no tokens of the answer"):
        Collator(words)(records[:2])
    assert len(list(loader(records, Collator(words, answers=False), 2))) == 2  # nobody asks for answers here


def test_a_prompt_without_tokens(tmp_path: Path) -> None:
    """A row of padding alone has no path; its record is named."""
    words = ascii_only(tokenizer())
    records = write(tmp_path, RECORDS[0], {"prompt": "\u4f60", "answer": "w1"})
    with pytest.raises(DataError, match=r"train\.jsonl, line 2: the tokenizer makes no tokens of the prompt"):
        Collator(words)(records)


def test_records_built_by_hand_are_named_by_their_prompts() -> None:
    """A plain dict has no file and line; the error quotes its prompt."""
    with pytest.raises(DataError, match="the record with prompt 'w1 w1': answer is 7; expected text"):
        Collator(tokenizer())([{"prompt": "w1 w1", "answer": 7}])


def test_a_word_that_a_tokenizer_refuses(tmp_path: Path) -> None:
    """A vocabulary of words without an unknown one raises a bare Exception at any other; the record is named."""
    words = tokenizer()
    words.backend_tokenizer.model = models.WordLevel(words.get_vocab(), unk_token="none such")
    records = write(tmp_path, RECORDS[0], {"prompt": "w1", "answer": "zebra"}, {"prompt": "zebra", "answer": "w1"})
    with pytest.raises(DataError, match="line 2: the tokenizer does not take the answer 'zebra'"):
        loader(records, Collator(words), 1)
    with pytest.raises(DataError, match="line 3: the processor does not take it"):
        Collator(words, answers=False)(records)
