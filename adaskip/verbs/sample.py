"""Answer a sample of inputs freely, token after token, and judge the answers by their words; the dense model too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from adaskip.batch import Batch
from adaskip.runtime.attach import RoutedModel
from adaskip.training.data import Collator, Record, in_order
from adaskip.verbs.generate import texts
from adaskip.verbs.lengths import longest_answer
from adaskip.verbs.wording import Content, edit_distances

Figures = dict[str, list[float | None]]
"""Numbers by name, one an input; None where an input has none."""


class Sample:
    """Hold prompts that every policy answers; the dense model answers them once.

    Args:
        records: prompts with the answers that are right, and what is there where they say so.
        processor: of the model.
        batch_size: prompts at once.
        device: where they are put.
    """

    def __init__(self, records: Sequence[Record], processor: Any, batch_size: int, device: torch.device) -> None:
        collate, chosen = Collator(processor, answers=False), in_order(records, batch_size) if records else []
        self.records = [records[row] for rows in chosen for row in rows]
        self.batches: list[Batch] = [collate([records[row] for row in rows]).to(device) for rows in chosen]
        self.processor, self.limit = processor, longest_answer(self.records, processor)
        self._content = Content(self.records)
        self._dense: list[str] | None = None

    @torch.no_grad()
    def __call__(self, model: RoutedModel) -> Figures:
        """Return what a routed model's answers are worth; nothing without prompts.

        ``exact`` is 1 where an answer is the data's own, ``same`` where it is the dense model's, ``edit_distance`` and
        ``hallucinated`` as in `adaskip.verbs.wording`; the dense model's figures begin with ``dense_``.
        """
        if not self.batches:
            return {}
        if self._dense is None:
            with model.dense():
                self._dense = self._answer(model)
        said = self._answer(model)
        same: list[float | None] = [float(a == b) for a, b in zip(said, self._dense, strict=True)]
        dense = {f"dense_{name}": values for name, values in self._judge(self._dense).items()}
        return self._judge(said) | {"same": same} | dense

    def _answer(self, model: RoutedModel) -> list[str]:
        answers: list[str] = []
        for batch in self.batches:
            ids = model.generate(**batch.inputs, max_new_tokens=self.limit, do_sample=False)
            answers += texts(self.processor, ids[:, batch.inputs["input_ids"].shape[1] :])
        return answers

    def _judge(self, said: Sequence[str]) -> Figures:
        wanted = [record["answer"].strip() for record in self.records]
        return {
            "exact": [float(a == b) for a, b in zip(said, wanted, strict=True)],
            "edit_distance": [*edit_distances(said, wanted)],
            "hallucinated": self._content.shares(said, self.records),
        }
