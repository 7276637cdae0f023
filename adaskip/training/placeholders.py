"""A check that a prompt has as many placeholders as pictures, by asking the processor with blank pictures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from PIL import Image

from adaskip.training.prompts import Refusal

Process = Callable[[list[str], list[list[Image.Image]] | None], dict[str, Any]]


class Placeholders:
    """Find out how a processor wants pictures placed in a prompt.

    Most replace a placeholder for each picture; some put the pictures in themselves, and may or may not take
    placeholders as well. So for each pair of numbers (placeholders, pictures) the processor is asked once, and must put
    as many picture tokens as it does where pictures are placed right.

    Args:
        processor: of pictures and text.
        process: calls it with prompts and their pictures; raises Refusal.
    """

    def __init__(self, processor: Any, process: Process) -> None:
        token = getattr(processor, "image_token", None)
        self.token = None if token is None else str(token)  # some keep it as an AddedToken
        self.process = process
        ids = getattr(processor, "image_token_id", None)
        if self.token is not None and ids is None:
            ids = processor.tokenizer.convert_tokens_to_ids(self.token)
        self.token_id = ids
        self._known: dict[tuple[int, int], str | None] = {}

    def fault(self, prompt: str, pictures: int) -> str | None:
        """Return what is wrong with a prompt for so many pictures; None if nothing is."""
        if self.token is None:  # no placeholder is known, so there is nothing to count
            return None
        places = prompt.count(self.token)
        if (places, pictures) not in self._known:
            self._known[places, pictures] = self._fault(prompt, self.token, places, pictures)
        return self._known[places, pictures]

    def _fault(self, prompt: str, token: str, places: int, pictures: int) -> str | None:
        numbers = f"{places} {token} in the prompt and {_count(pictures)}"
        bare = prompt.replace(token, "").strip() or token  # an empty text is nothing to ask with
        # without placeholders: the picture tokens that the processor puts in by itself, or why it refuses
        by_itself = self._placed(bare, pictures)
        tokens = self._placed(prompt, pictures)
        if isinstance(tokens, str):
            if places != pictures:
                return f"{numbers}; expected as many of the one as of the other (the processor: {tokens})"
            return None if pictures else f"the processor takes no prompt without a picture ({tokens})"
        if pictures and isinstance(by_itself, int) and by_itself:
            if tokens == by_itself:
                return None
            return f"{numbers}; the processor puts pictures in by itself, so leave {token} out"
        expected = self._placed(f"{token * pictures} {bare}", pictures)
        if isinstance(expected, str) or tokens == expected:
            return None
        return f"{numbers}; expected as many of the one as of the other"

    def _placed(self, prompt: str, pictures: int) -> int | str:
        """Count the picture tokens that the processor puts into a prompt, or return why it refuses."""
        blank = [[Image.new("RGB", (64, 64), "white")] * pictures] if pictures else None
        try:
            return int((self.process([prompt], blank)["input_ids"] == self.token_id).sum())
        except Refusal as error:
            return str(error)


def _count(pictures: int) -> str:
    return {0: "no picture", 1: "1 picture"}.get(pictures, f"{pictures} pictures")
