"""Read the options of ``generate`` for many prompts that are decoded in groups, and refuse those for one batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig, PreTrainedModel

from adaskip.errors import ConfigError, DataError
from adaskip.runtime.arguments import read_option

_REFUSED = ("past_key_values", "streamer", "return_dict_in_generate", "custom_generate", "routing")
"""Arguments that speak of one batch, and of a cache or an output of its own."""

_BY_ROW = ("logits_processor", "stopping_criteria")
"""Arguments whose code is told the rows of a batch, which here are not the prompts."""

SINGLE = (
    "assistant_model",
    "prompt_lookup_num_tokens",
    "assistant_early_exit",
    "use_mtp",
    "penalty_alpha",
    "dola_layers",
    "constraints",
    "force_words_ids",
)
"""Options, in a generation config too, of other ways to generate than token by token along one path."""

_WHOLE: dict[str, Any] = {
    "min_length": 0,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "bad_words_ids": None,
    "sequence_bias": None,
    "forced_bos_token_id": None,
    "watermarking_config": None,
    "prefix_allowed_tokens_fn": None,
}
"""Options that read or count a whole row, padding included; each with the value that turns it off."""


@dataclass(frozen=True)
class Decoding:
    """Say how the answers are generated.

    Attributes:
        options: what ``generate`` is given for each group.
        whole: whether an option reads whole rows, so that a group must not be padded.
        max_length: tokens of prompt and answer together, where that is the limit.
        max_new_tokens: tokens of an answer, where they are the limit.
        ends: tokens that end an answer.
        allowed: ``prefix_allowed_tokens_fn``, which is called with the number of a prompt.
    """

    options: dict[str, Any]
    whole: bool
    max_length: int | None
    max_new_tokens: int
    ends: tuple[int, ...]
    allowed: Callable[..., Any] | None

    def limit(self, length: int) -> int:
        """Return how many tokens the answer to a prompt of this length may have."""
        return self.max_new_tokens if self.max_length is None else self.max_length - length

    def check_room(self, number: int, length: int) -> None:
        """Refuse a prompt whose answer could not begin.

        Raises:
            DataError: it is as long as ``max_length`` or longer.
        """
        if self.limit(length) < 1:
            raise DataError(
                f"generate_many: item {number}: a prompt of {length} tokens leaves no room for an answer in "
                f"max_length={self.max_length}; pass max_new_tokens"
            )


def read_options(backbone: PreTrainedModel, options: Mapping[str, Any]) -> Decoding:
    """Read what the options say, and where they say nothing the given generation config or the model's own.

    Raises:
        ConfigError: an option that does not go with many prompts.
    """
    faults = [name for name in _REFUSED if options.get(name) is not None]
    faults += [name for name in SINGLE if read_option(backbone, options, name)]
    if read_option(backbone, options, "guidance_scale", 1) != 1:
        faults.append("guidance_scale")
    if faults:
        raise ConfigError(f"generate_many: {', '.join(faults)} does not go with many prompts; call generate")
    if by_row := [name for name in _BY_ROW if options.get(name)]:
        raise ConfigError(
            f"generate_many: {', '.join(by_row)} would be told rows of a group, which are not the prompts in their "
            "order; call generate, or use an option of transformers such as stop_strings or prefix_allowed_tokens_fn"
        )
    for name in ("num_beams", "num_return_sequences"):
        if read_option(backbone, options, name, 1) > 1:
            raise ConfigError(f"generate_many: {name} asks for several rows a prompt; call generate")
    if options.get("use_cache") is False:
        raise ConfigError(
            "generate_many: use_cache=False: answers go on from the cache of their prompt's prefill; leave it out, or "
            "call generate"
        )
    if (kind := read_option(backbone, options, "cache_implementation")) is not None:
        raise ConfigError(
            f"generate_many: cache_implementation={kind!r}: prompts bring their own cache; leave it out, or set "
            "model.generation_config.cache_implementation = None"
        )
    max_new_tokens, max_length = read_option(backbone, options, "max_new_tokens"), _max_length(backbone, options)
    ends = read_option(backbone, options, "eos_token_id")
    allowed = options.get("prefix_allowed_tokens_fn")
    own = {name: value for name, value in options.items() if name != "prefix_allowed_tokens_fn"}
    by_length = max_new_tokens is None and max_length is not None
    return Decoding(
        # a configuration may say otherwise for single prompts, and must not reach these groups
        options=own | {"use_cache": True, "return_dict_in_generate": False},
        whole=by_length or any(read_option(backbone, options, name, rest) != rest for name, rest in _WHOLE.items()),
        max_length=max_length if by_length else None,
        max_new_tokens=20 if max_new_tokens is None else max_new_tokens,
        ends=tuple(ends) if isinstance(ends, list | tuple) else () if ends is None else (int(ends),),
        allowed=allowed,
    )


def _max_length(backbone: PreTrainedModel, options: Mapping[str, Any]) -> int | None:
    """Return the limit that somebody has set; a configuration's default is none."""
    default = GenerationConfig().max_length
    configs = (options.get("generation_config"), backbone.generation_config)
    values = [value for config in configs if (value := getattr(config, "max_length", None)) != default]
    return next((value for value in (options.get("max_length"), *values) if value is not None), None)
