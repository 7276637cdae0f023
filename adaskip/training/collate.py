"""Batches made of records by any Hugging Face processor; records that a processor cannot take are found early."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from adaskip.batch import IGNORED, Batch
from adaskip.errors import DataError
from adaskip.lines import listed
from adaskip.training.chat import Chat
from adaskip.training.pictures import open_image, pictures_of
from adaskip.training.placeholders import Placeholders
from adaskip.training.prompts import Refusal, call_processor, edges, per_token
from adaskip.training.records import Record, where

_CHUNK = 1024  # answers tokenized at once


class Collator:
    """Make one left-padded batch of records.

    Args:
        processor: a processor (pictures and text) or a tokenizer (text only).
        answers: append the answers, for training and teacher forcing; without, the batch is a bare prompt.

    The `Batch` has labels, -100 everywhere but on the answers. Of a bare prompt no token is scored. Of a conversation
    (`messages`) the prompt ends where the assistant's first turn begins; all of his turns have labels, and what others
    say between them has none.

    A prompt may bring its own beginning-of-sequence token, as chat templates render it; it stays the only one. An end
    token that a tokenizer puts behind every text does not come between a prompt and its answer.
    """

    def __init__(self, processor: Any, answers: bool = True) -> None:
        self.processor = processor
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.answers = answers
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = _padding(self.tokenizer)
        self.edges = edges(self.tokenizer)
        self.placeholders: Placeholders | None = None
        if self.processor is not self.tokenizer:
            self.placeholders = Placeholders(processor, self.process)
            self.edges = replace(self.edges, picture=self.placeholders.token_id)
        # a processor that takes a suffix marks it by token type 1: its model reads the prompt both ways, an answer not
        takes_suffix = "suffix" in inspect.signature(type(processor).__call__).parameters
        self.answer_values = {"token_type_ids": 1} if takes_suffix else {}
        self.chat = Chat(processor, self.placeholders.token if self.placeholders else None)
        self._special = {*self.tokenizer.all_special_ids, *getattr(self.tokenizer, "added_tokens_decoder", {})}

    def __call__(self, records: Sequence[Record]) -> Batch:
        """Return the batch of these records.

        Raises:
            DataError: a picture cannot be read, or the processor does not take these records; says which.
        """
        records = self.rendered(records)
        if wrong := [r for r in records if not isinstance(r.get("prompt"), str)]:
            raise DataError(_told(self._prompt_faults(wrong), "a batch"))
        inputs = self._inputs(records)
        inputs.pop("labels", None)  # some processors make labels of the prompt; ours stand in the batch
        self.edges.trim(inputs, [r["prompt"] for r in records], self.tokenizer.pad_token_id)
        prompt = inputs["attention_mask"].bool()
        if empty := [where(r) for r, row in zip(records, prompt, strict=True) if not row.any()]:
            raise DataError(f"{empty[0]}: the tokenizer makes no tokens of the prompt")
        batch = Batch(
            inputs,
            torch.full_like(prompt, IGNORED, dtype=torch.long),
            prompt,
            [r.get("kind", "") for r in records],
            [r.get("answer", "") for r in records],
            self.answer_values,
        )
        if not self.answers:
            return batch
        if faults := [*self._answer_faults(records)]:
            raise DataError(_told(faults, "a batch"))
        tokens, scored = zip(*map(self.continued, records), strict=True)
        return append_answers(batch, tokens, self.tokenizer.pad_token_id, scored)

    def check(self, records: Sequence[Record]) -> None:
        """Look for records that this collator could not take, before any shuffled batch meets one.

        Raises:
            DataError: lists them, with file and line: pictures for a tokenizer, more or fewer pictures than
                placeholders in the prompt, an answer without tokens.
        """
        if faults := [*self.faults(records)]:
            raise DataError(_told(faults, "the data do not fit the backbone's processor"))

    def faults(self, records: Sequence[Record]) -> Iterator[tuple[Record, str]]:
        """Yield the records that this collator could not take, and why; see `check`."""
        rendered = []
        if any("messages" in record for record in records):
            self.chat.check()
        for record in records:
            try:
                rendered += self.rendered([record])
            except DataError as error:
                yield record, str(error).removeprefix(f"{where(record)}: ")
        yield from self._prompt_faults(rendered)
        if self.answers:
            yield from self._answer_faults(rendered)

    def placed(self, record: Record) -> Record:
        """Return a record with a placeholder for each picture, where its prompt leaves them out and must not."""
        pictures, places = len(pictures_of(record)), self.placeholders
        if places is None or places.token is None or not pictures or places.token in record["prompt"]:
            return record
        if places.fault(record["prompt"], pictures) is None:  # the processor puts the pictures in by itself
            return record
        result = copy(record)  # which keeps its file and line
        result["prompt"] = self.edges.put_first(" ".join([places.token] * pictures), record["prompt"])
        return result

    def rendered(self, records: Sequence[Record]) -> list[Record]:
        """Return records with a prompt each: conversations are written as the model reads them.

        Raises:
            DataError: the model has no chat template, or it refuses one; see `Chat.rendered`.
        """
        return [self.chat.rendered(r, self.answers) if "messages" in r and "prompt" not in r else r for r in records]

    # -- prompts and pictures ----------------------------------------------------------------------------------------

    def _inputs(self, records: Sequence[Record]) -> dict[str, Any]:
        """Return what the processor makes of prompts and pictures."""
        pictures = [_opened(record) for record in records]
        pictured = sum(map(bool, pictures))
        if self.placeholders is None and pictured:
            raise DataError(_told(self._prompt_faults(records), "a batch"))
        try:
            return self.process([r["prompt"] for r in records], pictures if pictured else None)
        except Refusal as error:
            raise DataError(self._blamed(records, pictures) or _together(records, pictured, error)) from error

    def process(self, prompts: list[str], pictures: list[list[Image.Image]] | None) -> dict[str, Any]:
        """Return what the processor makes of prompts, left-padded, and of their pictures.

        Raises:
            Refusal: it does not take them.
        """
        options: dict[str, Any] = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
        options |= {} if pictures is None else {"images": pictures}
        prompts = [self.edges.clean(prompt) for prompt in prompts]
        inputs = call_processor(self.processor, text=prompts, **options)
        if "attention_mask" not in inputs:  # some tokenizers give one only when asked
            inputs = call_processor(self.processor, text=prompts, return_attention_mask=True, **options)
        return dict(inputs)

    def _blamed(self, records: Sequence[Record], pictures: list[list[Image.Image]]) -> str | None:
        """Find the record that a processor refuses, by giving it one after the other."""
        for record, images in zip(records, pictures, strict=True):
            try:
                self.process([record["prompt"]], [images] if images else None)
            except Refusal as error:
                return f"{where(record)}: the processor does not take it ({error})"
        return None

    def _prompt_faults(self, records: Sequence[Record]) -> Iterator[tuple[Record, str]]:
        """Yield the prompts that are no text, or have more or fewer placeholders than pictures."""
        for record in records:
            prompt = record.get("prompt")
            if not isinstance(prompt, str):
                yield record, f"prompt is {prompt!r}; expected text"
                continue
            try:
                pictures = len(pictures_of(record))
            except DataError as error:
                yield record, str(error)
                continue
            if self.placeholders is not None and (fault := self.placeholders.fault(prompt, pictures)):
                yield record, fault
            if self.placeholders is None and pictures:
                yield record, "has an image, but the backbone's tokenizer takes text only; use a vision-language model"

    # -- answers -----------------------------------------------------------------------------------------------------

    def continued(self, record: Record) -> tuple[Tensor, Tensor]:
        """Return what follows a prompt, long (n), and which of it is the assistant's, bool (n); an end token is last.

        A chat template may have written an end token of its own, which then stays the only one.
        """
        turns = record.get("turns", [(record.get("answer", ""), True)])
        parts = self._bare_ids([text for text, _ in turns])
        ids = [i for part in parts for i in part]
        scored = [own for part, (_, own) in zip(parts, turns, strict=True) for _ in part]
        end = self.tokenizer.eos_token_id
        ended = ids[-1:] == [end] or ("turns" in record and ids[-1] in self._special)
        if end is not None and not ended:
            ids, scored = [*ids, end], [*scored, True]
        return torch.tensor(ids), torch.tensor(scored)

    def _bare_ids(self, texts: list[str]) -> list[list[int]]:
        ids: list[list[int]] = call_processor(self.tokenizer, texts, add_special_tokens=False)["input_ids"]
        return ids

    def _answer_faults(self, records: Sequence[Record]) -> Iterator[tuple[Record, str]]:
        for start in range(0, len(records), _CHUNK):
            part = records[start : start + _CHUNK]
            texts: list[Any] = [r.get("answer") for r in part]
            if wrong := [r for r, text in zip(part, texts, strict=True) if not isinstance(text, str)]:
                yield from ((r, f"answer is {r.get('answer')!r}; expected text") for r in wrong)
                continue
            try:
                tokens = self._bare_ids(texts)
            except Refusal:  # of one among a thousand answers: ask for each alone, to name it
                yield from self._refused_answers(part)
                continue
            for record, ids in zip(part, tokens, strict=True):
                if not ids:
                    yield record, f"the tokenizer makes no tokens of the answer {record['answer']!r}"

    def _refused_answers(self, records: Sequence[Record]) -> Iterator[tuple[Record, str]]:
        for record in records:
            try:
                self._bare_ids([record["answer"]])
            except Refusal as error:
                yield record, f"the tokenizer does not take the answer {record['answer']!r} ({error})"


def append_answers(batch: Batch, answers: Sequence[Tensor], pad: int, scored: Sequence[Tensor] | None = None) -> Batch:
    """Put answers, long (n) each, behind the prompts of a batch, with their labels; ``pad`` fills the shorter rows.

    Other inputs with a value for every token get 0 for the answers, or the value that ``answer_values`` gives. What
    ``scored``, bool (n) each, leaves out gets no label: what others say between two turns of the assistant.

        input_ids   pad w1 w2 | a1 end pad        labels   -100 -100 -100 | a1 end -100
                    w3  w4 w5 | a2 a3  end                 -100 -100 -100 | a2 a3  end
    """
    inputs = dict(batch.inputs)
    shape = inputs["input_ids"].shape
    labels = torch.nn.utils.rnn.pad_sequence([*answers], batch_first=True, padding_value=IGNORED)
    real = labels != IGNORED
    added = {"input_ids": torch.where(real, labels, pad), "attention_mask": real.long()}
    for name in per_token(inputs):
        value = inputs[name]
        if value.ndim > 2:  # what a token may look at, pictures for instance: an answer sees what its prompt's end sees
            more = value[:, -1:].expand(-1, labels.shape[1], *value.shape[2:])
        else:
            more = added.get(name, torch.full_like(labels, batch.answer_values.get(name, 0))).to(value)
        inputs[name] = torch.cat([value, more], 1)
    if scored is not None:
        own = torch.nn.utils.rnn.pad_sequence([*scored], batch_first=True)
        labels = labels.masked_fill(~own.to(labels.device), IGNORED)
    labels = torch.cat([torch.full(shape, IGNORED, device=labels.device), labels], 1)
    prompt_mask = torch.nn.functional.pad(batch.prompt_mask, (0, labels.shape[1] - shape[1]))
    return replace(batch, inputs=inputs, labels=labels, prompt_mask=prompt_mask)


def _told(faults: Iterable[tuple[Record, str]], what: str) -> str:
    return listed((f"{where(record)}: {text}" for record, text in faults), what)


def _opened(record: Record) -> list[Image.Image]:
    try:
        return [open_image(picture) for picture in pictures_of(record)]
    except DataError as error:
        raise DataError(f"{where(record)}: {error}") from error


def _together(records: Sequence[Record], pictured: int, error: Exception) -> str:
    """Explain why a processor refuses a batch although it takes each of its records alone."""
    if pictured in (0, len(records)):
        return f"the processor does not take these {len(records)} records in one batch ({error})"
    return (
        f"{pictured} of {len(records)} records have an image, and the processor takes no such batch ({error}); "
        "expected all or none in one batch: DataLoader(records, batch_sampler=adaskip.RoundBatches(records, "
        "batch_size), collate_fn=collator)"
    )


def _padding(tokenizer: Any) -> str:
    """Choose a token to pad with; the mask hides it, so any will do."""
    for name in ("eos_token", "unk_token", "bos_token"):
        if (token := getattr(tokenizer, name, None)) is not None:
            return str(token)
    return str(tokenizer.convert_ids_to_tokens(0))
