"""Count the tokens that records become, without opening a picture: as many as a blank one of its size takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from PIL import Image

from adaskip.training.collate import Collator
from adaskip.training.pictures import picture_size, pictures_of
from adaskip.training.prompts import call_processor
from adaskip.training.records import Record

_CHUNK = 64  # prompts tokenized at once
Sizes = tuple[tuple[int, int], ...]


@dataclass
class TokenCounts:
    """Count tokens as a collator makes them; what pictures add is asked once for each of their sizes."""

    collate: Collator
    _added: dict[tuple[int, Sizes], int] = field(default_factory=dict)

    def __call__(self, records: Sequence[Record]) -> list[tuple[int, int]]:
        """Return for each record the tokens of its prompt, pictures included, and of all that follows it.

        Raises:
            Refusal: the processor does not take a prompt, or pictures of such a size.
        """
        prompts = self._texts([record["prompt"] for record in records])
        added = [self._of_pictures(record) for record in records]
        behind = [len(self.collate.continued(record)[0]) if record.get("answer") else 0 for record in records]
        return [(text + more, rest) for text, more, rest in zip(prompts, added, behind, strict=True)]

    def _texts(self, prompts: Sequence[str]) -> list[int]:
        """Count the tokens of texts alone, in which a picture is a token or none."""
        collate, lengths = self.collate, []
        for start in range(0, len(prompts), _CHUNK):
            part = [collate.edges.clean(prompt) for prompt in prompts[start : start + _CHUNK]]
            options = {"padding": True, "padding_side": "left", "return_tensors": "pt", "return_attention_mask": True}
            inputs = dict(call_processor(collate.tokenizer, part, **options))
            collate.edges.trim(inputs, part, collate.tokenizer.pad_token_id)
            lengths += inputs["attention_mask"].sum(1).tolist()
        return lengths

    def _of_pictures(self, record: Record) -> int:
        """Return how many more tokens a prompt has with its pictures than without."""
        if not (pictures := pictures_of(record)):
            return 0
        token = self.collate.placeholders.token if self.collate.placeholders else None
        sizes = tuple(picture_size(picture) for picture in pictures)
        places = record["prompt"].count(token) if token else 0
        if (places, sizes) not in self._added:
            asked = " ".join([token or ""] * places) or record["prompt"]
            blank = [Image.new("RGB", size) for size in sizes]
            whole = int(self.collate.process([asked], [blank])["attention_mask"].sum())
            self._added[places, sizes] = whole - self._texts([asked])[0]
        return self._added[places, sizes]
