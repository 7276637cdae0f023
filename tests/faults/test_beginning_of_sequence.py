"""Prompts that a chat template rendered begin with <s> already; a tokenizer that adds one must not make it two."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import pre_tokenizers

from adaskip.training.data import Collator
from adaskip.training.prompts import edges
from tests.processors import picture_processor, tokenizer


def rows(collate: Collator, *prompts: str, image: bool = False, answer: str = "w9") -> list[list[str]]:
    """The tokens of each row of a batch, without padding."""
    picture = {"image": Image.new("RGB", (16, 16))} if image else {}
    batch = collate([{"prompt": prompt, "answer": answer, **picture} for prompt in prompts])
    ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"].bool()
    shapes = {value.shape for value in batch.inputs.values() if value.ndim == 2}
    assert shapes == {ids.shape} == {batch.prompt_mask.shape} if collate.answers else True
    assert mask.any(0).all()  # no column of padding alone
    return [collate.tokenizer.convert_ids_to_tokens(row[real]) for row, real in zip(ids, mask, strict=True)]


@pytest.mark.parametrize("begin", ["<s>", "[gMASK] <sop>"])
def test_one_beginning_whoever_puts_it(begin: str) -> None:
    """Rendered and plain prompts in one batch: each row begins once, as the tokenizer begins texts."""
    words = tokenizer(begin)
    words.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "removed")  # line ends are tokens, as in most
    collate = Collator(words, answers=False)
    own = begin.replace(" ", "")
    found = rows(collate, f"{own}w1 w2", "w3", f"{own}w4", f"{own}{own}w5", f"\n {own}w6")
    expected = [[*begin.split(), *words] for words in (["w1", "w2"], ["w3"], ["w4"], ["w5"], ["w6"])]
    assert found == expected


def test_a_rendered_prompt_equals_the_tokenizers_own_way() -> None:
    """The ids are those of `add_special_tokens=False` on rendered text, and its own ids on plain text."""
    words = tokenizer("<s>")
    collate = Collator(words, answers=False)
    for text, options in (("<s>w1 <s> w2", {"add_special_tokens": False}), ("w1 w2", {})):
        assert collate([{"prompt": text}]).inputs["input_ids"][0].tolist() == words(text, **options)["input_ids"]


def test_a_tokenizer_that_adds_nothing_keeps_the_prompts_own() -> None:
    assert rows(Collator(tokenizer(), answers=False), "<s>w1", "w2") == [["<s>", "w1"], ["w2"]]


@pytest.mark.parametrize("begin", ["<s>", ""])
def test_through_a_picture_processor(begin: str) -> None:
    """A processor hands the prompt on to its tokenizer, which adds <s> to the one that the template wrote."""
    found = rows(Collator(picture_processor(begin)), "<s><image> w1", image=True)
    assert found == [["<s>", *["<image>"] * 4, "w1", "w9", "</s>"]]


def test_behind_pictures_that_a_processor_puts_first() -> None:
    """Some processors write pictures, then <s>, then the prompt, which may begin with <s> itself."""
    collate = Collator(tokenizer(), answers=False)
    assert rows(collate, "<image> <image> <s> <s> w1", "w2") == [["<image>", "<image>", "<s>", "w1"], ["w2"]]


@pytest.mark.parametrize("make", [tokenizer, picture_processor])
def test_no_end_between_prompt_and_answer(make: Any) -> None:
    """A tokenizer that ends every text would teach the model that prompts end before they are answered."""
    image = make is picture_processor
    collate = Collator(make("<s>", "</s>"))
    head = ["<image>"] * 4 if image else []
    text = "<image> " if image else ""
    assert rows(collate, f"{text}w1", f"<s>{text}w2 w3", image=image) == [
        ["<s>", *head, "w1", "w9", "</s>"],
        ["<s>", *head, "w2", "w3", "w9", "</s>"],
    ]


def test_an_end_that_the_prompt_itself_holds_stays() -> None:
    """A turn before the last ends with </s>; only what the tokenizer added goes."""
    assert rows(Collator(tokenizer("<s>", "</s>")), "w1 </s>", "w2") == [
        ["<s>", "w1", "</s>", "w9", "</s>"],
        ["<s>", "w2", "w9", "</s>"],
    ]
    assert rows(Collator(tokenizer("<s>")), "w1 </s>") == [["<s>", "w1", "</s>", "w9", "</s>"]]


def test_an_answer_that_ends_itself_ends_once() -> None:
    """Answers rendered by a chat template bring their end token along."""
    assert rows(Collator(tokenizer("<s>")), "w1", answer="w9 </s>") == [["<s>", "w1", "w9", "</s>"]]


def test_the_batch_equals_one_of_plain_prompts() -> None:
    """Taking a token out leaves masks, labels and ids exactly as if it had never been there."""
    collate = Collator(tokenizer("<s>"))
    texts = ["w1 w2 w3", "w4", "w5 w6"]
    batches = [
        collate([{"prompt": begin + text, "answer": "w9"} for begin, text in zip(begins, texts, strict=True)])
        for begins in (["", "", ""], ["<s>", "", "<s>"], ["<s>", "<s>", "<s>"])
    ]
    for batch in batches[1:]:
        for name in ("labels", "prompt_mask"):
            assert torch.equal(getattr(batch, name), getattr(batches[0], name))
        assert all(torch.equal(value, batches[0].inputs[name]) for name, value in batch.inputs.items())


def test_placeholders_go_behind_the_prompts_own_beginning() -> None:
    """`generate` puts a left-out placeholder into the prompt; in front of <s> the model would begin twice."""
    collate = Collator(picture_processor("<s>"))
    two = {"image": [Image.new("RGB", (16, 16))] * 2}
    assert collate.placed({"prompt": "<s>w1", **two})["prompt"] == "<s><image> <image> w1"
    assert collate.placed({"prompt": "w1", **two})["prompt"] == "<image> <image> w1"
    assert collate.placed({"prompt": "<image> w1 <image>", **two})["prompt"] == "<image> w1 <image>"
    assert collate.placed({"prompt": "w1"})["prompt"] == "w1"


def test_behind_a_beginning_that_the_tokenizer_adds() -> None:
    """A processor that writes <s> behind the pictures, of a tokenizer that writes one before them."""
    collate = Collator(picture_processor("<s>"))
    assert rows(collate, "<image> <s> w1", image=True) == [[*["<image>"] * 4, "<s>", "w1", "w9", "</s>"]]


def test_the_edges_of_a_tokenizer() -> None:
    """What a tokenizer puts around texts is found by asking it, whatever it is."""
    ids = tokenizer().convert_tokens_to_ids
    found = edges(tokenizer("[gMASK] <sop>", "</s>"))
    assert (found.begin, found.end) == (tuple(ids(["[gMASK]", "<sop>"])), tuple(ids(["</s>"])))
    assert edges(tokenizer(bos_token=None)).begin == ()


def test_an_answer_to_a_processor_that_takes_suffixes() -> None:
    """Its model reads tokens of type 0 both ways; answers of that type would see their own next tokens."""
    processor = picture_processor()
    process = type(processor).__call__

    class Prefixed(type(processor)):  # type: ignore[misc]
        def __call__(self, suffix: Any = None, **options: Any) -> Any:
            found = process(self, **options)
            found["token_type_ids"] = torch.zeros_like(found["input_ids"])
            found["labels"] = found["input_ids"]
            return found

    processor.__class__ = Prefixed
    batch = Collator(processor)([{"prompt": "w1 w2", "answer": "w3"}])
    assert batch.inputs["token_type_ids"].tolist() == [[0, 0, 1, 1]]
    assert "labels" not in batch.inputs
