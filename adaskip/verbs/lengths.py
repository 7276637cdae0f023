"""How long an answer may become, and whether one was cut."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from adaskip.backbone.inspect import count_positions
from adaskip.errors import ConfigError
from adaskip.runtime.attach import RoutedModel
from adaskip.stages import Stages
from adaskip.training.data import Record

UNKNOWN = 64
"""Tokens where there is no data to read a length from."""


def longest_answer(records: Sequence[Record], processor: Any) -> int:
    """Count the tokens of the longest answer of some records, its end token included; at least 1."""
    tokenizer = getattr(processor, "tokenizer", processor)
    texts = list({record["answer"] for record in records})
    if not texts:
        return 1
    return max(len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]) + 1


def check_room(model: RoutedModel, max_new_tokens: int | None, prompts: Iterable[Tensor]) -> None:
    """Refuse an answer length that somebody asks for and the backbone's positions do not hold behind every prompt.

    Args:
        model: routed.
        max_new_tokens: what is asked for; None: nothing is, and the prompts are not read.
        prompts: their token ids, (b t) each.

    Raises:
        ConfigError: says how much room there is.
    """
    positions = count_positions(model.backbone.config)
    if max_new_tokens is None or positions is None:
        return
    longest = max((ids.shape[1] for ids in prompts), default=0)
    if (room := positions - longest) < max_new_tokens:
        raise ConfigError(
            f"--max-new-tokens {max_new_tokens}: the backbone has {positions} positions for prompt and answer, and the "
            f"longest prompt takes {longest}; "
            + (f"expected at most {room}" if room > 0 else "no answer has room behind it, shorten the prompt")
        )


def tell_if_endless(model: RoutedModel, max_new_tokens: int, stages: Stages) -> None:
    """Say how long every answer becomes where no end token can end one before."""
    if model.backbone.generation_config.eos_token_id is None:
        stages.note(
            f"the backbone's generation config names no end token (eos_token_id): {max_new_tokens} tokens are written "
            "for every prompt; another number: --max-new-tokens N"
        )


def end_tokens(model: RoutedModel, like: Tensor) -> Tensor:
    """Return the token ids that end an answer, as ``like``; none for a model that never ends one."""
    ends = model.backbone.generation_config.eos_token_id
    return torch.as_tensor([] if ends is None else ends, device=like.device, dtype=like.dtype).reshape(-1)


def reached_limit(model: RoutedModel, generated: Tensor, max_new_tokens: int) -> Tensor:
    """Return bool (b): the answer, long (b t), ran into the limit before its end token; False where there is none."""
    ends = end_tokens(model, generated)
    if not len(ends) or generated.shape[1] < max_new_tokens:
        return torch.zeros(len(generated), dtype=torch.bool)
    return ~torch.isin(generated, ends).any(1).cpu()


def warn_of_cuts(counts: dict[str, int], total: int, max_new_tokens: int) -> list[str]:
    """Write sentences on answers that were cut, by whose they are; none where nothing was."""
    return [
        f"{count} of {total} {whose} answers were cut at {max_new_tokens} tokens; give them room: --max-new-tokens "
        f"{4 * max_new_tokens}"
        for whose, count in counts.items()
        if count
    ]
