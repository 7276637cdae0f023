"""Answer a few validation inputs when training ends, for people to look at: dense, routed, and by which route."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from adaskip.runtime.attach import RoutedModel
from adaskip.training.data import Collator, Record
from adaskip.verbs.generate import texts
from adaskip.verbs.lengths import longest_answer

SHOWN = 4
"""Inputs, of different kinds where the data name kinds."""
LONGEST = 64
"""Tokens of an answer."""


@torch.no_grad()
def answer_some(model: RoutedModel, records: Sequence[Record], processor: Any) -> list[dict[str, Any]]:
    """Return a row for each of a few records: kind, prompt, expected, dense_answer, answer, keep, route.

    ``route`` has a character a layer, or half of one: ``#`` where it ran, ``.`` where it was left out.

    Raises:
        AdaSkipError: the policy, or the model, does not generate.
    """
    collate = Collator(processor, answers=False)
    chosen = collate.rendered(choose(records))
    options: dict[str, Any] = {"max_new_tokens": min(LONGEST, longest_answer(chosen, processor)), "do_sample": False}
    rows = []
    for record in chosen:
        inputs = collate([record]).to(model.spec.device).inputs
        width = inputs["input_ids"].shape[1]
        with model.dense():
            dense = model.generate(**inputs, **options)[:, width:]
        routed = model.generate(**inputs, **options)[:, width:]
        ran = model.routing.share[:, 0] > 0.5
        rows.append(
            {
                "kind": str(record.get("kind") or ""),
                "prompt": record["prompt"],
                "expected": record.get("answer") or "",
                "dense_answer": texts(processor, dense)[0],
                "answer": texts(processor, routed)[0],
                "keep": float(model.routing.keep_rate[0]),
                "route": "".join("#" if one else "." for one in ran.tolist()),
            }
        )
    return rows


def choose(records: Sequence[Record]) -> list[Record]:
    """Choose the first record of each kind, then the first of what is left.

    >>> [record["prompt"] for record in choose([{"prompt": p, "kind": k} for p, k in zip("abcde", "xxyxz")])]
    ['a', 'c', 'e', 'b']
    """
    first: dict[str, Record] = {}
    for record in records:
        first.setdefault(str(record.get("kind")), record)
    others = [record for record in records if record is not first[str(record.get("kind"))]]
    return [*first.values(), *others][:SHOWN]
