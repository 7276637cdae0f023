"""A batch of prompts, with or without answers: what the collator makes, and all that trains or measures reads."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor

from adaskip.errors import DataError

IGNORED = -100
"""The label of a token that nothing is scored by."""


@dataclass(eq=False)  # not frozen: Lightning's precision plugins set the fields of a copy
class Batch:
    """Hold b rows of t tokens: the model's own inputs, which of the tokens are scored, and what routers may read.

    Raises:
        DataError: a field is of another type or shape; lists all that are.

    >>> import torch
    >>> ids = torch.tensor([[11, 12, 21], [13, 14, 22]])  # the last token of each row is its answer
    >>> batch = Batch({"input_ids": ids}, ids.masked_fill(ids < 20, IGNORED), prompt_mask=ids < 20)
    >>> len(batch), batch.supervised.tolist()
    (2, [[False, True], [False, True]])
    """

    inputs: dict[str, Any]  # the model's own arguments: input_ids long (b t), attention_mask long (b t), pictures, ...
    labels: Tensor  # long (b t) the token itself where it is scored, else -100; of a bare prompt all -100
    prompt_mask: Tensor  # bool (b t) what routers may read: the real tokens before the answer
    kind: list[Any] = field(default_factory=list)  # (b) the user's own labels of the rows, text or numbers
    answer: list[str] = field(default_factory=list)  # (b) the answers as text
    answer_values: dict[str, int] = field(default_factory=dict)  # input -> its value on answers, where that is not 0
    counted: bool = True  # False: of rows that another process counts; read to keep in step with it

    def __post_init__(self) -> None:
        """Check what arrived; a row without a kind or an answer has an empty one."""
        if faults := [*self._faults()]:
            raise DataError(f"Batch: {'; '.join(faults)}; adaskip.Collator(processor) makes batches of records")
        self.inputs, self.prompt_mask = dict(self.inputs), self.prompt_mask.bool()
        self.kind, self.answer = (list(x) or [""] * len(self) for x in (self.kind, self.answer))

    def _faults(self) -> list[str]:
        faults: list[str] = []
        if not isinstance(self.inputs, Mapping):
            faults.append(f"inputs: expected the model's arguments by name, got a {type(self.inputs).__name__}")
        if not (isinstance(self.labels, Tensor) and self.labels.dim() == 2 and not self.labels.is_floating_point()):
            return [*faults, f"labels: expected a long tensor (rows, tokens), {IGNORED} where nothing is scored"]
        shape = self.labels.shape
        masks = {"prompt_mask": self.prompt_mask}
        if not faults and isinstance(ids := self.inputs.get("input_ids"), Tensor):
            masks["input_ids"] = ids
        for name, value in masks.items():
            actual = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            if actual != tuple(shape):
                faults.append(f"{name}: expected shape {tuple(shape)} like labels, got {actual}")
        for name, texts in (("kind", self.kind), ("answer", self.answer)):
            if len(texts) not in (0, shape[0]):
                faults.append(f"{name}: expected one for each of {shape[0]} rows, got {len(texts)}")
        return faults

    def __len__(self) -> int:
        """Count the rows."""
        return len(self.labels)

    @property
    def supervised(self) -> Tensor:
        """Return bool (b t-1): `find_supervised` of these labels."""
        return find_supervised(self.labels)

    def arguments(self) -> dict[str, Any]:
        """Return what the routed model takes to read whole rows: ``model(**batch.arguments())``."""
        return {**self.inputs, "prompt_mask": self.prompt_mask, "use_cache": False}

    def to(self, device: torch.device | str) -> Self:
        """Return the same batch with every tensor on a device; types stay. Lightning moves batches by this method."""
        # out of pinned memory the copy need not be waited for
        return self._map(lambda tensor: tensor.to(device, non_blocking=tensor.is_pinned()))

    def pin_memory(self) -> Self:
        """Return the same batch in pinned memory; called by ``DataLoader(pin_memory=True)``."""
        return self._map(Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Self:
        inputs = {name: _map_tensors(value, function) for name, value in self.inputs.items()}
        return replace(self, inputs=inputs, labels=function(self.labels), prompt_mask=function(self.prompt_mask))


def find_supervised(labels: Tensor) -> Tensor:
    """Return bool (b t-1): the positions whose next token is scored, from labels long (b t).

    >>> import torch
    >>> find_supervised(torch.tensor([[-100, -100, 7, 8]])).tolist()
    [[False, True, True]]
    """
    return labels[:, 1:] != IGNORED


def exact_match(logits: Tensor, labels: Tensor) -> Tensor:
    """Return bool (b): whether the argmax of logits (b t v) is right at every supervised position (teacher-forced)."""
    return ((logits[:, :-1].argmax(-1) == labels[:, 1:]) | ~find_supervised(labels)).all(1)


def check_batch(batch: Any, where: str, answers: bool = True) -> None:
    """Refuse what is no batch, or one of bare prompts where answers are needed.

    Raises:
        DataError: says what arrived, and what a collator has to return.
    """
    if not isinstance(batch, Batch):
        arrival = type(batch).__name__
        if isinstance(batch, Mapping):
            arrival += f" of {', '.join(map(str, batch)) or 'nothing'}"
        raise DataError(
            f"{where}: expected batches as adaskip.Collator(processor) makes them, got a {arrival}; pass "
            "collate_fn=adaskip.Collator(processor) to the loader, or let your own collator return "
            "adaskip.Batch(inputs, labels, prompt_mask)"
        )
    if answers and not batch.supervised.any():
        raise DataError(
            f"{where}: expected prompts with answers, got bare prompts: all labels are {IGNORED}; pass "
            "collate_fn=adaskip.Collator(processor), which puts the answers behind them"
        )


def take(batches: Iterable[Batch], limit: int | None, where: str) -> list[Batch]:
    """Take the first batches that hold ``limit`` inputs together, or all of them.

    Raises:
        DataError: an item is no batch.
    """
    if not isinstance(batches, Iterable) or isinstance(batches, Mapping | str | Tensor):
        hint = "; put it into a list" if isinstance(batches, Mapping | Batch) else ""
        raise DataError(f"{where}: expected a loader or a list of batches, got a {type(batches).__name__}{hint}")
    result: list[Batch] = []
    for batch in batches:
        check_batch(batch, where)
        result.append(batch)
        if limit is not None and count(result) >= limit:
            break
    return result


def count(batches: Iterable[Batch]) -> int:
    """Count the inputs that the batches hold."""
    return sum(map(len, batches))


def fingerprints(batches: Iterable[Batch]) -> list[str]:
    """Return one string an input, equal where tokens, labels and pictures are equal, whatever the padding.

    A value that a processor returns without an axis for rows (all patches of all pictures, say) can only be compared
    for the whole batch; one input in two such batches counts as two.
    """
    return [mark for batch in batches for mark in _rows(batch)]


def _rows(batch: Batch) -> Iterator[str]:
    shape = batch.labels.shape
    named = {name: x.cpu() for name, x in batch.inputs.items() if isinstance(x, Tensor)} | {
        "labels": batch.labels.cpu()
    }
    real = named.get("attention_mask", named["labels"] != IGNORED).bool()
    real = real if real.shape == shape else torch.ones(shape, dtype=torch.bool)
    for row in range(shape[0]):
        mark = hashlib.sha256()
        for name, value in sorted(named.items()):
            part = value[row] if value.dim() and len(value) == shape[0] else value
            part = part[real[row]] if value.shape == shape else part
            mark.update(f"{name} {tuple(part.shape)} ".encode())
            mark.update(part.contiguous().view(torch.uint8).numpy().tobytes() if part.dim() else str(part).encode())
        yield mark.hexdigest()[:24]


def _map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Apply a function to every tensor of a value; some processors return lists of tensors, one a picture."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {name: _map_tensors(part, function) for name, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_map_tensors(part, function) for part in value)
    return value
