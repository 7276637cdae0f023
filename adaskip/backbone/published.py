"""Configurations of backbones, read without a network where the package knows their published sizes."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import yaml
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from adaskip import sources
from adaskip.errors import CheckpointError

_FILE = Path(__file__).with_name("published.yaml")


@cache
def published() -> dict[str, dict[str, Any]]:
    """Read what the package knows of models of the Hub: by id their ``parameters``, in millions, and ``config``."""
    values: dict[str, dict[str, Any]] = yaml.safe_load(_FILE.read_text(encoding="utf-8"))
    return values


def read_config(name: str, **options: Any) -> PreTrainedConfig:
    """Return the configuration of a backbone: of a folder, as published, or else from the Hugging Face Hub.

    Args:
        name: a shipped name, a folder or a Hugging Face id.
        **options: of ``from_pretrained``: trust_remote_code, revision.

    Raises:
        CheckpointError: it cannot be read; says why.
    """
    if sources.is_shipped(name):
        return _load(str(sources.shipped_model(name)), {})
    if name in published() and not Path(name).is_dir():
        values = dict(published()[name]["config"])
        kind: Any = CONFIG_MAPPING[values.pop("model_type")]
        config: PreTrainedConfig = kind(**values)
        return config
    return _load(name, options)


def _load(path: str, options: dict[str, Any]) -> PreTrainedConfig:
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(path, **options)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"backbone {path!r}: its configuration cannot be read ({reason}); expected a folder that save_pretrained "
            f"wrote, a Hugging Face id that can be reached, or one of {', '.join(published())}"
        ) from error
    return config
