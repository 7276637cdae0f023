"""The arguments of a call of a Hugging Face model: put under their names, and refused where routing cannot follow."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from adaskip.batch import Batch
from adaskip.errors import ConfigError, DataError


def name_arguments(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], call: str
) -> dict[str, Any]:
    """Return all arguments of a call of a model's ``forward`` or ``generate``, by name.

    Args:
        function: the method of the model's class.
        args: what was passed by position.
        kwargs: what was passed by name.
        call: how the user spells the call; for errors.

    Raises:
        DataError: a whole batch or a text where a tensor belongs, an argument given twice, or too many.
    """
    if args:
        names = _positions(function)
        if isinstance(args[0], Mapping | Batch):
            inputs = "inputs" if isinstance(args[0], Mapping) else "batch.inputs"
            raise DataError(f"{call}: expected a tensor first, got {_kind(args[0])}; write {call}(**{inputs})")
        if len(args) > len(names):
            raise DataError(f"{call}: expected at most {len(names)} positional arguments, got {len(args)}")
        if repeats := [name for name in names[: len(args)] if name in kwargs]:
            raise DataError(f"{call}: {', '.join(repeats)} given twice, by position and by name")
        kwargs = dict(zip(names, args, strict=False)) | kwargs
    for name in ("input_ids", "inputs"):
        if (value := kwargs.get(name)) is not None and not isinstance(value, Tensor):
            raise DataError(
                f"{call}: {name}: expected token ids in a tensor of shape (batch, tokens), got {_kind(value)}; "
                f"write {call}(**tokenizer(text, return_tensors='pt'))"
            )
    return kwargs


def check_options(backbone: PreTrainedModel, options: Mapping[str, Any]) -> None:
    """Refuse what one ``generate`` of a routed model cannot do, wherever it is asked for.

    Args:
        backbone: the routed Hugging Face object.
        options: what ``generate`` was given, by name.

    Raises:
        ConfigError: an option under which routers would see a part of the prompt, or another one beside it.
    """
    if read_option(backbone, options, "prefill_chunk_size"):
        raise ConfigError("generate: prefill_chunk_size shows the routers only the first chunk; leave it out")
    kind = read_option(backbone, options, "cache_implementation")
    if kind not in (None, "dynamic", "hybrid"):  # hybrid: an old name of what transformers does unasked
        raise ConfigError(
            f"generate: cache_implementation={kind!r} cannot hold skipped layers; leave it out, or set "
            "model.generation_config.cache_implementation = None"
        )
    if read_option(backbone, options, "guidance_scale", 1) != 1:
        raise ConfigError(
            "generate: guidance_scale runs a second prompt of another length, which the routers would take for the "
            "first; leave it out, or call generate inside model.dense()"
        )


def read_option(backbone: PreTrainedModel, options: Mapping[str, Any], name: str, default: Any = None) -> Any:
    """Return an option of ``generate``: from the call, else from the generation config it passes, else the model's."""
    configs = (options.get("generation_config"), backbone.generation_config)
    values = (options.get(name), *(getattr(config, name, None) for config in configs))
    return next((value for value in values if value is not None), default)


@cache
def _positions(function: Callable[..., Any]) -> tuple[str, ...]:
    """Return the names that arguments get by position, without ``self``."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(name for name, one in inspect.signature(function).parameters.items() if one.kind in kinds)[1:]


def _kind(value: Any) -> str:
    """Return the name of a value's type with its article, for errors."""
    kind = type(value).__name__
    return f"{'an' if kind[0] in 'aeiouAEIOU' else 'a'} {kind}"
