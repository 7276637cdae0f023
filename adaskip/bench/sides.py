"""One way of running a batch: the dense model, the routed one, or one with layers cut out; and its two phases."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adaskip.backbone.inspect import twin
from adaskip.bench.subject import Subject
from adaskip.errors import AdaSkipError
from adaskip.runtime.timing import timed


@dataclass
class Side:
    """Run one model on one prompt: read the prompt into a cache, and write tokens from there.

    ``share``: how much of its seconds counts, where the models of several paths run the whole batch each.
    """

    model: Any
    inputs: dict[str, Tensor]
    new: int
    share: float = 1.0
    cache: Any = None
    logits: Tensor | None = None  # (b v) at the last prompt token; None for a model without a head

    def prefill(self) -> Any:
        """Read the prompt into a new cache."""
        out = self.model(**self.inputs, use_cache=True, **self._last_only())
        logits = getattr(out, "logits", None)
        return out.past_key_values, None if logits is None else logits[:, -1]

    def settle(self) -> None:
        """Prefill and keep the cache, for `decode`."""
        self.cache, self.logits = self.prefill()
        if hasattr(self.cache, "activate_past_recording"):  # without it a sliding window cannot be taken back
            self.cache.activate_past_recording()

    def decode(self) -> Tensor | None:
        """Write ``new`` tokens after the prompt, and return the last one's logits (b v) if the model has a head.

        The greedy choice is computed, as it is a part of the work, but the token fed is always the prompt's last: all
        sides then do the same work. Where prompts are padded, a token's position is the number of real ones before it;
        that a picture's tokens may share positions is ignored.
        """
        mask, rows = self.inputs["attention_mask"], len(self.inputs["input_ids"])
        padded = not bool(mask.all())
        token = self.inputs["input_ids"][:, -1:]
        for _ in range(self.new):
            mask = torch.cat([mask, mask.new_ones(rows, 1)], 1)
            padding = {}
            if padded:
                padding["attention_mask"] = mask
                if self._takes("position_ids"):
                    padding["position_ids"] = mask.sum(1, keepdim=True) - 1
            out = self.model(input_ids=token, past_key_values=self.cache, use_cache=True, **padding)
            if self.logits is not None:
                out.logits[:, -1:].argmax(-1)
        return None if self.logits is None else out.logits[:, -1]

    def prefill_seconds(self) -> float:
        """Take the seconds of one prefill, times the share."""
        return timed(self.prefill)[1] * self.share

    def decode_seconds(self) -> float:
        """Take the seconds of writing one token, times the share; then cut the cache back to the prompt, untimed."""
        seconds = timed(self.decode)[1]
        self.cache.crop(-self.new)
        return seconds / self.new * self.share

    def _last_only(self) -> dict[str, Any]:
        """Ask, as ``generate`` does, for logits of the last token only, where the model has the option."""
        return {"logits_to_keep": 1} if self._takes("logits_to_keep") else {}

    def _takes(self, name: str) -> bool:
        backbone = getattr(self.model, "backbone", self.model)
        return name in inspect.signature(type(backbone).forward).parameters


@dataclass(frozen=True)
class Sides:
    """Add up several sides that together do the work of one batch."""

    parts: tuple[Side, ...]

    def prefill_seconds(self) -> float:
        """Sum the seconds of the parts."""
        return sum(part.prefill_seconds() for part in self.parts)

    def decode_seconds(self) -> float:
        """Sum the seconds of the parts."""
        return sum(part.decode_seconds() for part in self.parts)

    def settle(self) -> None:
        """Prefill them all."""
        for part in self.parts:
            part.settle()


def ideal(subject: Subject, inputs: dict[str, Tensor], keep: Tensor, new: int) -> Sides:
    """Build what the decisions would cost at best: for every number of kept layers, a model with only that many.

    Each model runs the whole batch, and its seconds count by its share of the rows (layers are assumed to cost the
    same). For group ``vision`` the layers that vision skips form a second model, run on the text tokens alone and
    without a head.

    Raises:
        AdaSkipError: a row leaves out every layer, so that nothing remains to be run.
    """
    counts = keep.sum(0)
    vision = subject.routed.runtime.group == "vision"
    parts = []
    for count in sorted(set(counts.tolist())):
        rows = counts == count
        row = keep[:, int(rows.nonzero()[0])]
        share = float(rows.double().mean())
        if count:
            parts.append(Side(twin(subject.spec, row.nonzero().flatten().tolist()), inputs, new, share))
        if vision and count < len(row):
            model = twin(subject.spec, (~row).nonzero().flatten().tolist())
            parts.append(Side(model.base_model, _text_only(subject, inputs), new, share))
    if not parts:
        raise AdaSkipError("bench: the policy leaves out every layer of every row; there is nothing to cut out")
    return Sides(tuple(parts))


def _text_only(subject: Subject, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take the text tokens of every row, with padding on the left where rows differ."""
    tokens = subject.routed.read_tokens(inputs)
    assert tokens.vision is not None
    text = tokens.valid & ~tokens.vision
    width = int(text.sum(1).max())
    order = text.int().argsort(dim=1, stable=True)[:, -width:]
    mask = text.gather(1, order)
    text_inputs = {
        "input_ids": inputs["input_ids"].gather(1, order),
        "attention_mask": mask.to(inputs["attention_mask"]),
    }
    if "mm_token_type_ids" in inputs:
        text_inputs["mm_token_type_ids"] = torch.zeros_like(text_inputs["input_ids"])
    return text_inputs
