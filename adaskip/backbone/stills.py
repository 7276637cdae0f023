"""Processors of pictures on a machine without torchvision, which their parts for videos cannot be made without."""

from __future__ import annotations

import inspect
from typing import Any

from transformers.models.auto import processing_auto
from transformers.utils.import_utils import is_torchvision_available

_VIDEO = "video_processor"
_PROCESSORS: Any = processing_auto  # a module that names no type


def processor_class(model_type: str) -> type[Any] | None:
    """Return the class of an architecture's processor; without torchvision one that takes pictures alone.

    None: the architecture has no processor, or it cannot do without a package that is not installed.
    """
    name = _PROCESSORS.PROCESSOR_MAPPING_NAMES.get(model_type)
    kind: type[Any] | None = _PROCESSORS.processor_class_from_name(name) if name else None
    if kind is None or is_torchvision_available():
        return kind
    try:
        getattr(kind, "get_attributes", None)
    except ImportError:  # a placeholder, which says what is missing whatever it is asked
        return None
    videos = inspect.signature(kind).parameters.get(_VIDEO)
    if videos is None:
        return kind
    return _of_stills(kind) if videos.default is None else None


def stills(model_type: str) -> type[Any] | None:
    """Return the class that takes pictures alone, where the architecture's own needs torchvision and there is none."""
    kind = processor_class(model_type)
    return kind if kind is not None and issubclass(kind, Stills) else None


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
