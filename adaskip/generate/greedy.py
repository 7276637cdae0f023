"""Rank tokens as greedy generation does: by the model's logits after its own logits processors."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from adaskip.errors import ConfigError

if TYPE_CHECKING:
    from adaskip.runtime.attach import RoutedModel


def greedy_options(max_new_tokens: int) -> dict[str, Any]:
    """Return the arguments of ``generate`` for a greedy answer."""
    return {"max_new_tokens": max_new_tokens, "do_sample": False, "num_beams": 1}


def greedy_processors(model: RoutedModel, inputs: dict[str, Any], max_new_tokens: int) -> LogitsProcessorList:
    """Return the very logits processors that ``generate`` would apply to these prompts.

    They come from the model's generation config. Most models have none; a repetition penalty, or suppressed or forced
    tokens, need some.

    Raises:
        ConfigError: the generation config asks for something else than greedy decoding, or for a processor that runs
            the model itself; one teacher-forced pass cannot tell what such a generation answers.
    """
    config = copy.deepcopy(model.backbone.generation_config)
    config.update(do_sample=False, num_beams=1)
    mode = config.get_generation_mode().value
    if mode != "greedy_search":
        raise ConfigError(
            f"generation config: expected greedy decoding, got {mode}; unset what asks for it "
            "(penalty_alpha, prompt_lookup_num_tokens, assistant_early_exit, dola_layers) in model.generation_config"
        )
    if config.guidance_scale not in (None, 1):
        raise ConfigError(
            f"generation config: guidance_scale={config.guidance_scale} runs the model twice a token, which one "
            "teacher-forced pass cannot follow; set model.generation_config.guidance_scale = None"
        )
    lists: list[LogitsProcessorList] = []
    # generate makes them from its config and the prompts: a decoding of our own is handed them, and decodes nothing

    def seize(backbone: Any, input_ids: Tensor, logits_processor: LogitsProcessorList, **options: Any) -> Tensor:
        lists.append(logits_processor)
        return input_ids

    with model.dense():
        model.backbone.generate(**inputs, **greedy_options(max_new_tokens), custom_generate=seize)  # type: ignore[operator]
    return lists[0]


def process(logits: Tensor, ids: Tensor, start: int, processors: LogitsProcessorList) -> Tensor:
    """Return teacher-forced logits as ``generate`` ranks them: processed where they predict ``start`` and later.

    An identity: a processor sees the tokens before the predicted one and that one's logits in float32, as in
    ``generate``. (b t v), (b t) -> (b t v).

    Args:
        logits: of one pass over prompts and answers.
        ids: the tokens of that pass; prompts are padded on the left, so all answers begin at ``start``.
        start: first column of the answers, at least 1.
        processors: from `greedy_processors`.
    """
    if not processors:
        return logits
    columns: list[Tensor] = []
    for t in range(start, ids.shape[1]):
        columns.append(processors(ids[:, :t], logits[:, t - 1].float()))  # type: ignore[arg-type]
    return torch.cat([logits[:, : start - 1].float(), torch.stack(columns, 1), logits[:, -1:].float()], 1)
