"""The edges of tokenized prompts: one beginning-of-sequence token, whoever put it there, and no end token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class Refusal(Exception):
    """Say that a processor or tokenizer raised an error; the text is that error's."""


def call_processor(processor: Any, *args: Any, **options: Any) -> Any:
    """Call a processor or tokenizer, and turn whatever it raises into a `Refusal`.

    Raises:
        Refusal: for whatever it raises; tokenizers written in Rust know only Exception.
    """
    try:
        return processor(*args, **options)
    except Exception as error:
        raise Refusal((str(error).strip() or type(error).__name__).split("\n")[0]) from error


@dataclass(frozen=True)
class PromptEdges:
    """Hold what a tokenizer puts around a text: ids, and the text they stand for."""

    begin: tuple[int, ...] = ()
    end: tuple[int, ...] = ()
    begin_text: str = ""
    end_text: str = ""
    picture: int | None = None  # the token that pictures become

    def clean(self, prompt: str) -> str:
        """Return a prompt without spaces and line ends before the beginning-of-sequence token that it brings itself."""
        bare = prompt.lstrip()
        return bare if self.begin_text and bare.startswith(self.begin_text) else prompt

    def put_first(self, text: str, prompt: str) -> str:
        """Return a prompt with a text in front, but behind its own beginning."""
        prompt = self.clean(prompt)
        beginning = self.begin_text if prompt.startswith(self.begin_text) else ""
        return f"{beginning}{text} {prompt.removeprefix(beginning)}"

    def trim(self, inputs: dict[str, Any], prompts: Sequence[str], pad: int) -> None:
        """Leave one beginning and no added end in left-padded ``inputs``, in place.

            pad pad <s> <s> [INST] w1 </s>        pad pad pad <s> [INST] w1
            pad pad pad <s> w2     w3 </s>   ->   pad pad pad <s> w2     w3

        The first row's prompt came from a chat template with its own <s>; the tokenizer put another before it.
        """
        if self._has_added_end(inputs, prompts):
            for name in per_token(inputs):
                inputs[name] = inputs[name][:, : -len(self.end)]
        extra = self._repeated_begin(inputs)
        if extra.any():
            _close_up(inputs, extra, pad)

    def _has_added_end(self, inputs: dict[str, Any], prompts: Sequence[str]) -> bool:
        """Return whether every row ends with the tokenizer's end, and with one more than its prompt's own text has."""
        if not self.end:
            return False
        rows = inputs["input_ids"].tolist()
        ends = [[*self.end] * (1 + prompt.rstrip().endswith(self.end_text)) for prompt in prompts]
        return all(row[-len(end) :] == end for row, end in zip(rows, ends, strict=True))

    def _repeated_begin(self, inputs: dict[str, Any]) -> Tensor:
        """Return bool (b t): beginnings that another beginning follows, at once or behind pictures.

        The first token need not be a beginning: a processor may put pictures before it. Where a processor writes a
        beginning behind the pictures, its tokenizer has written another one before them.
        """
        mask, size, begin = inputs["attention_mask"].bool(), len(self.begin), [*self.begin]
        extra = torch.zeros_like(mask)
        for index, row in enumerate(inputs["input_ids"].tolist() if begin else ()):
            first = int(mask[index].int().argmax())  # what pads may be the same token
            place = next((i for i in range(first, len(row) - size + 1) if row[i : i + size] == begin), None)
            while place is not None:
                after = place + size
                while after < len(row) and row[after] == self.picture:
                    after += 1
                follows = row[after : after + size] == begin
                extra[index, place : place + size] = follows
                place = after if follows else None
        return extra


def edges(tokenizer: Any) -> PromptEdges:
    """Find what a tokenizer puts around every text, by comparing a text with and without it."""
    special = set(tokenizer.all_special_ids)
    begin: list[int] = []
    end: list[int] = []
    for text in tokenizer.convert_ids_to_tokens([i for i in range(min(len(tokenizer), 512)) if i not in special]):
        try:
            bare, whole = (
                [*call_processor(tokenizer, text, add_special_tokens=special)["input_ids"]] for special in (False, True)
            )
        except Refusal:  # a piece of a word, which this tokenizer does not take as a text of its own
            continue
        places = [i for i in range(len(whole) - len(bare) + 1) if whole[i : i + len(bare)] == bare] if bare else []
        if places:
            begin, end = whole[: places[0]], whole[places[0] + len(bare) :]
            break
    if not begin and tokenizer.bos_token_id is not None:
        begin = [tokenizer.bos_token_id]  # not added by the tokenizer, but maybe by the processor or a template
    begin_text, end_text = ("".join(map(str, tokenizer.convert_ids_to_tokens(ids))) for ids in (begin, end))
    return PromptEdges(tuple(begin), tuple(end), begin_text, end_text)


def per_token(inputs: dict[str, Any]) -> list[str]:
    """List the inputs that have a value for every token: (b t), or a mask (b t ...)."""
    shape = inputs["input_ids"].shape
    return [
        name
        for name, value in inputs.items()
        if isinstance(value, Tensor)
        and (value.shape == shape or (value.ndim > 2 and "mask" in name and value.shape[:2] == shape))
    ]


def _close_up(inputs: dict[str, Any], extra: Tensor, pad: int) -> None:
    """Take tokens out of rows: the others move right, and columns that then hold nothing but padding are cut off."""
    order = (~extra).int().argsort(dim=1, stable=True)  # what goes comes first, the rest keeps its order
    padding = extra.gather(1, order)
    mask = inputs["attention_mask"].gather(1, order).masked_fill(padding, 0)
    start = int(mask.any(0).int().argmax())
    for name in per_token(inputs):
        value = inputs[name]
        index = order.reshape(*order.shape, *[1] * (value.ndim - 2)).expand_as(value)
        inputs[name] = value.gather(1, index)[:, start:]
    inputs["attention_mask"] = mask[:, start:]
    inputs["input_ids"] = inputs["input_ids"].masked_fill(padding[:, start:], pad)
