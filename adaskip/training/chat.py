"""Conversations as a model reads them: written by its own chat template, and which of that the assistant says."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any

from adaskip.errors import DataError
from adaskip.training.messages import Message, first_answer, read_messages, text_of
from adaskip.training.pictures import pictures_of
from adaskip.training.prompts import Refusal, call_processor
from adaskip.training.records import Record, where

Turn = tuple[str, bool]
"""A piece of what follows a prompt, and whether the assistant says it."""


class Chat:
    """Write conversations by the chat template of a processor, or else of its tokenizer.

    Args:
        processor: a processor or a tokenizer.
        placeholder: what stands for a picture, where the tokenizer's template writes text alone.
    """

    def __init__(self, processor: Any, placeholder: str | None = None) -> None:
        tokenizer = getattr(processor, "tokenizer", processor)
        self.writer = next((x for x in (processor, tokenizer) if getattr(x, "chat_template", None)), None)
        self.takes_parts = self.writer is not tokenizer  # a tokenizer's template expects text, a processor's its parts
        self.placeholder = placeholder
        self.name = getattr(tokenizer, "name_or_path", "") or "its tokenizer"

    def check(self) -> None:
        """Refuse a model without a chat template.

        Raises:
            DataError: says what to do.
        """
        if self.writer is None:
            raise DataError(
                f"messages are written by the model's chat template, and {self.name} has none; put "
                "chat_template.jinja of its instruction-tuned kin beside it, or give prompt and answer instead"
            )

    def rendered(self, record: Record, answers: bool = True) -> Record:
        """Return the record of a conversation with its ``prompt``, its first ``answer``, and all ``turns`` behind it.

            prompt  <s>[user] w1 [assistant]     up to the assistant's first turn
            turns   w2 </s>                      his
                    [user] w3 [assistant]        not his: read, and never scored
                    w4 </s>                      his

        Args:
            record: with ``messages``, as a file or a program gives them.
            answers: whether a turn of the assistant is needed.

        Raises:
            DataError: the messages are none, the model has no chat template, or it refuses them.
        """
        messages, pictures, faults = read_messages(record["messages"], pictures_of(record), answers)
        if faults:
            raise DataError(f"{where(record)}: messages{faults[0]}")
        self.check()
        try:
            prompt, turns = self._pieces(messages)
        except Refusal as error:
            raise DataError(f"{where(record)}: the chat template does not take the messages ({error})") from error
        result = copy(record)  # which keeps its file and line
        for name in ("messages", "image", "images"):
            result.pop(name, None)
        result["prompt"] = prompt
        if turns:
            result |= {"answer": text_of(messages[first_answer(messages)]).strip(), "turns": turns}
        if pictures:
            result["image"] = pictures
        return result

    def _pieces(self, messages: Sequence[Message]) -> tuple[str, list[Turn]]:
        """Cut the whole text where the assistant begins and ends to speak, as the template itself writes beginnings."""
        whole, place = self._write(messages, False), 0
        answered = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if not answered:
            return self._write(messages, True), []
        pieces: list[Turn] = []
        for index in answered:
            begin = self._begin(whole, messages[:index])
            end = self._end(whole, begin, messages[: index + 1])
            pieces += [(whole[place:begin], False), (whole[begin:end], True)]
            place = end
        return pieces[0][0], [piece for piece in pieces[1:] if piece[0]]

    def _begin(self, whole: str, before: Sequence[Message]) -> int:
        asked = self._write(before, True)
        if not whole.startswith(asked):
            raise Refusal(
                "what it writes before an answer is not what it asks for one with, so no prompt would lead there; "
                "give prompt and answer instead"
            )
        return len(asked)

    def _end(self, whole: str, begin: int, said: Sequence[Message]) -> int:
        """Return where a turn ends: behind its end token, and before the line end that some templates put there."""
        alone, words = self._write(said, False), text_of(said[-1]).strip()
        if whole.startswith(alone):
            return max(begin, len(alone.rstrip()))
        # a template may write the last turn otherwise, such as with empty thoughts before it
        close = alone[alone.rfind(words) + len(words) :].rstrip()
        place = whole.find(words, begin)
        if place < 0 or not whole.startswith(close, place + len(words)):
            raise Refusal("it does not show an answer as it was written; give prompt and answer instead")
        return place + len(words) + len(close)

    def _write(self, messages: Sequence[Message], ask: bool) -> str:
        turns = [*messages] if self.takes_parts else [self._plain(message) for message in messages]
        write = getattr(self.writer, "apply_chat_template")  # noqa: B009
        return str(call_processor(write, turns, tokenize=False, add_generation_prompt=ask))

    def _plain(self, message: Message) -> Message:
        shown = [self.placeholder or "" for part in message["content"] if part["type"] == "image"]
        return {"role": message["role"], "content": "\n".join([*shown, text_of(message)])}
