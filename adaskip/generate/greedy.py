"""What greedy generation ranks tokens by: the model's logits after its own logits processors."""

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
    """Arguments of ``generate`` for a greedy answer."""
    return {"max_new_tokens": max_new_tokens, "do_sample": False, "num_beams": 1}


def greedy_processors(model: RoutedModel, inputs: dict[str, Any], max_new_tokens: int) -> LogitsProcessorList:
    """The very logits processors that ``generate`` would apply to these prompts, from the model's generation config.

    Empty for most models; a repetition penalty, suppressed or forced tokens and the like make it longer.

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
    found: list[LogitsProcessorList] = []

    def seize(backbone: Any, input_ids: Tensor, logits_processor: LogitsProcessorList, **options: Any) -> Tensor:
        found.append(logits_processor)
        return input_ids

    with model.dense():
        model.backbone.generate(**inputs, **greedy_options(max_new_tokens), custom_generate=seize)  # type: ignore[operator]
    return found[0]


def process(logits: Tensor, ids: Tensor, start: int, processors: LogitsProcessorList) -> Tensor:
    """Teacher-forced logits as ``generate`` would have ranked them: processed where they predict ``start`` and later.

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
    ranked: list[Tensor] = []
    for t in range(start, ids.shape[1]):
        ranked.append(processors(ids[:, :t], logits[:, t - 1].float()))  # type: ignore[arg-type]
    return torch.cat([logits[:, : start - 1].float(), torch.stack(ranked, 1), logits[:, -1:].float()], 1)
