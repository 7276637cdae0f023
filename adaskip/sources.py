"""Turn the name of a model or of data into the thing itself; the one module that knows what ships with the package.

A model is a shipped one (``digits-vlm``), a folder that ``save_pretrained`` wrote, or a Hugging Face id. Transformers
is imported when something is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaskip.demo.backbone import EMBEDDED, FOLDER
from adaskip.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Shipped:
    """A model and its data that come with the package under one name."""

    folder: Path  # of the model and its processor, as `save_pretrained` writes them
    data: str  # module with `records(split, limit, seed)`, which draws them, and their `KINDS`


_SHIPPED = {EMBEDDED: Shipped(FOLDER, "adaskip.demo.digits")}


def is_shipped(name: str) -> bool:
    """Return whether a name is that of a model and data in the package.

    >>> is_shipped("digits-vlm"), is_shipped("Qwen/Qwen2.5-VL-7B-Instruct")
    (True, False)
    """
    return name in _SHIPPED


def shipped_names() -> str:
    """Return the names of what ships with the package, for an error or a help text."""
    return ", ".join(_SHIPPED)


def shipped_records(name: str, split: str, limit: int | None, seed: int) -> list[dict[str, Any]]:
    """Draw records of shipped data: as many as asked for, the same for the same arguments."""
    records: list[dict[str, Any]] = import_module(_SHIPPED[name].data).records(split, limit, seed)
    return records


def shipped_kinds(name: str) -> tuple[str, ...]:
    """Return the kinds of input that shipped data holds, each equally often."""
    kinds: tuple[str, ...] = import_module(_SHIPPED[name].data).KINDS
    return kinds


def model_name(path: str) -> str:
    """Return the name by which a loaded model is found again, also from another working directory."""
    for name, shipped in _SHIPPED.items():
        if path and Path(path) == shipped.folder:
            return name
    return str(Path(path).resolve()) if path and Path(path).is_dir() else path


def load_model(name: str, **options: Any) -> PreTrainedModel:
    """Load a language or image-text-to-text model.

    Args:
        name: a shipped name, a folder or a Hugging Face id.
        **options: of ``from_pretrained``: dtype, device_map, attn_implementation, trust_remote_code, revision ...

    Raises:
        CheckpointError: it cannot be read; says why.
    """
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    path = _located(name)
    try:
        remote = {key: options[key] for key in ("trust_remote_code", "revision") if key in options}
        config = AutoConfig.from_pretrained(path, **remote)
        auto = AutoModelForImageTextToText if type(config) in AutoModelForImageTextToText._model_mapping else None
        return (auto or AutoModelForCausalLM).from_pretrained(path, **options)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(
            f"backbone {name!r}: cannot be loaded ({_reason(error)}); expected a Hugging Face id, a folder that "
            f"save_pretrained wrote, or {shipped_names()}"
        ) from error


def load_processor(name: str, *, trust_remote_code: bool = False, revision: str | None = None) -> Any:
    """Load a model's processor, or its tokenizer where it has no pictures.

    Raises:
        CheckpointError: the folder or repository holds neither.
    """
    from transformers import AutoProcessor, AutoTokenizer

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
    if is_shipped(name):
        return _SHIPPED[name].folder
    if name.startswith((".", "/", "~")) and not Path(name).is_dir():
        raise CheckpointError(
            f"backbone {name!r}: no such folder; expected a Hugging Face id, a folder that save_pretrained wrote, or "
            f"{shipped_names()}"
        )
    return name


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
