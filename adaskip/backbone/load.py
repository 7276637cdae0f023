"""Backbones and their processors by Hugging Face id or folder."""

from __future__ import annotations

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

from adaskip.demo.backbone import EMBEDDED, FOLDER
from adaskip.errors import CheckpointError


def load_backbone(name: str, **options: Any) -> PreTrainedModel:
    """Load a language or image-text-to-text model by Hugging Face id or folder; ``digits-vlm`` is the embedded one.

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
            "save_pretrained wrote, or digits-vlm"
        ) from error


def load_processor(name: str, *, trust_remote_code: bool = False, revision: str | None = None) -> Any:
    """A backbone's processor, or its tokenizer where it has no pictures.

    Raises:
        CheckpointError: the folder or repository holds neither.
    """
    path = _located(name)
    options = {"trust_remote_code": trust_remote_code, "revision": revision}
    try:
        return AutoProcessor.from_pretrained(path, **options)
    except (OSError, ValueError):
        try:
            return AutoTokenizer.from_pretrained(path, **options)
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"backbone {name!r}: no processor and no tokenizer can be loaded ({_reason(error)}); expected a "
                "Hugging Face id, or a folder where they stand beside the model: processor.save_pretrained(folder)"
            ) from error


def _located(name: str) -> str | Path:
    if name == EMBEDDED:
        return FOLDER
    if name.startswith((".", "/", "~")) and not Path(name).is_dir():
        raise CheckpointError(
            f"backbone {name!r}: no such folder; expected a Hugging Face id, a folder that save_pretrained wrote, or "
            f"{EMBEDDED}"
        )
    return name


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
