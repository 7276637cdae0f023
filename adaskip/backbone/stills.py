"""Processors of pictures without their parts for videos, which cannot be made where torchvision is missing."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

from transformers.models.auto import processing_auto

_VIDEO, _CONFIG = "video_processor", "processor_config.json"
_PROCESSORS: Any = processing_auto  # a module that names no type


def processor_class(model_type: str) -> type[Any] | None:
    """Return the class of an architecture's processor, without its part for videos if it has one.

    None: the architecture has no processor, or it cannot do without a package that is not installed.
    """
    name = _PROCESSORS.PROCESSOR_MAPPING_NAMES.get(model_type)
    kind: type[Any] | None = _PROCESSORS.processor_class_from_name(name) if name else None
    try:
        getattr(kind, "get_attributes", None)
    except ImportError:  # a placeholder, which says what is missing whatever it is asked
        return None
    videos = inspect.signature(kind).parameters.get(_VIDEO) if kind else None
    return _of_stills(kind) if videos is not None and videos.default is None else kind


def stills(model_type: str) -> type[Any] | None:
    """Return the class that takes pictures alone, of an architecture whose own takes videos too; else None."""
    kind = processor_class(model_type)
    return kind if kind is not None and issubclass(kind, Stills) else None


def is_without_videos(folder: Path) -> bool:
    """Return whether a processor without its part for videos was saved in a folder."""
    if not (file := folder / _CONFIG).is_file():
        return False
    parts = json.loads(file.read_text(encoding="utf-8"))
    return "image_processor" in parts and _VIDEO not in parts


class Stills:
    """Mark a processor class that was made to do without its part for videos."""


def _of_stills(kind: Any) -> type[Any]:
    """Derive a class that loads, saves and reads pictures as the given one does."""

    class Derived(kind, Stills):  # type: ignore[misc]
        @classmethod
        def get_attributes(cls) -> list[str]:
            return [name for name in super().get_attributes() if name != _VIDEO]

    Derived.__name__ = Derived.__qualname__ = kind.__name__  # by which a saved one is found again
    return Derived
