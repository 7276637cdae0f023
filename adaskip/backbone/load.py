"""Load backbones and their processors by Hugging Face id, by folder or by the name of what ships with the package."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.utils.import_utils import is_torchvision_available

from adaskip import sources
from adaskip.backbone.inspect import count_positions
from adaskip.backbone.stills import is_without_videos, stills
from adaskip.errors import CheckpointError

_log = logging.getLogger(__name__)


def load_backbone(name: str, **options: Any) -> PreTrainedModel:
    """Load a language or image-text-to-text model.

    Args:
        name: a shipped name, a folder or a Hugging Face id.
        **options: of ``from_pretrained``: dtype, device_map, attn_implementation, trust_remote_code, revision ...

    Raises:
        CheckpointError: it cannot be read; says why.
    """
    path = _located(name)
    try:
        remote = {key: options[key] for key in ("trust_remote_code", "revision") if key in options}
        config = AutoConfig.from_pretrained(path, **remote)
        auto = AutoModelForImageTextToText if type(config) in AutoModelForImageTextToText._model_mapping else None
        return (auto or AutoModelForCausalLM).from_pretrained(path, **options)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(
            f"backbone {name!r}: cannot be loaded ({_reason(error)}); expected a Hugging Face id, a folder that "
            f"save_pretrained wrote, or {sources.shipped_names()}"
        ) from error


def load_processor(name: str, *, trust_remote_code: bool = False, revision: str | None = None) -> Any:
    """Load a backbone's processor, or its tokenizer where it has no pictures.

    Without torchvision, which only videos need in most architectures, the processor takes pictures alone.

    Raises:
        CheckpointError: the folder or repository holds neither.
    """
    path = _located(name)
    options = {"trust_remote_code": trust_remote_code, "revision": revision}
    try:
        return (_stills(path, options) or AutoProcessor).from_pretrained(path, **options)
    except (OSError, ValueError, ImportError) as missing:
        if isinstance(missing, ImportError):
            _log.warning("%s: text only, its processor of pictures cannot be loaded: %s", name, _reason(missing))
        try:
            return AutoTokenizer.from_pretrained(path, **options)
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"backbone {name!r}: no processor and no tokenizer can be loaded ({_reason(error)}); expected a "
                "Hugging Face id, or a folder where they stand beside the model: processor.save_pretrained(folder)"
            ) from error


def read_positions(name: str, *, trust_remote_code: bool = False, revision: str | None = None) -> int | None:
    """Return how many positions a backbone has, read from its configuration alone; None where that states none.

    Raises:
        CheckpointError: the configuration cannot be read.
    """
    try:
        return count_positions(
            AutoConfig.from_pretrained(_located(name), trust_remote_code=trust_remote_code, revision=revision)
        )
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"backbone {name!r}: its configuration cannot be read ({_reason(error)})") from error


def _stills(path: str | Path, options: dict[str, Any]) -> type[Any] | None:
    """Return a class for pictures alone where the one that would be loaded has a part for videos that it cannot get."""
    if is_torchvision_available() and not is_without_videos(Path(path)):
        return None
    try:
        config = AutoConfig.from_pretrained(path, **options)
    except (OSError, ValueError, KeyError):  # a folder that holds a processor and nothing else
        return None
    return stills(config.model_type)


def _located(name: str) -> str | Path:
    if sources.is_shipped(name):
        return sources.shipped_model(name)
    if name.startswith((".", "/", "~")) and not Path(name).is_dir():
        raise CheckpointError(
            f"backbone {name!r}: no such folder; expected a Hugging Face id, a folder that save_pretrained wrote, or "
            f"{sources.shipped_names()}"
        )
    return name


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
