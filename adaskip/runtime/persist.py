"""Routers on disk: JSON, safetensors and a model card; never a pickle, never the backbone's weights."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedModel,
)

from adaskip import __version__
from adaskip.backbone import fingerprint
from adaskip.demo.backbone import EMBEDDED, FOLDER
from adaskip.errors import BackboneError, CheckpointError, ConfigError
from adaskip.plan import RouterConfig

if TYPE_CHECKING:
    from adaskip.runtime.attach import RoutedModel

CONFIG, WEIGHTS, CARD = "adaskip_config.json", "router.safetensors", "README.md"
FORMAT = 1


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


def save(model: RoutedModel, folder: str | Path) -> Path:
    """Write a model's routers; each file appears whole or not at all."""
    if model.routers is None:
        raise ConfigError("save_pretrained: this model follows a hand-written plan and has no routers to save")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    meta: dict[str, Any] = {
        "format": FORMAT,
        "adaskip": __version__,
        "backbone": {"name": model.backbone.config._name_or_path, **fingerprint(model.described)},
        "router": model.config.to_dict(),
        "facts": model.facts,
        "certificate": model.certificate,
    }
    if Path(meta["backbone"]["name"]) == FOLDER:
        meta["backbone"]["name"] = EMBEDDED
    weights = {name: value.detach().cpu().contiguous() for name, value in model.routers.state_dict().items()}
    save_file(weights, folder / f"{WEIGHTS}.part", metadata={"format": "pt"})
    (folder / f"{WEIGHTS}.part").replace(folder / WEIGHTS)
    _write(folder / CONFIG, json.dumps(meta, indent=2) + "\n")
    _write(folder / CARD, _card(meta, sum(w.numel() for w in weights.values())))
    return folder


def load(folder: str | Path, backbone: PreTrainedModel | None, *, strict: bool, options: dict[str, Any]) -> RoutedModel:
    """Read routers and attach them; see `RoutedModel.from_pretrained`."""
    from adaskip.runtime.attach import attach

    folder = Path(folder)
    meta = read_config(folder)
    config = RouterConfig.from_dict(meta["router"])
    named = meta["backbone"]
    base = backbone if backbone is not None else load_backbone(named["name"], **options)
    model = attach(base, config)
    try:
        check_fingerprint({k: v for k, v in named.items() if k != "name"}, fingerprint(model.described), strict)
        model.facts, model.certificate = meta.get("facts", {}), meta.get("certificate")
        state = load_file(folder / WEIGHTS)
        assert model.routers is not None
        model.routers.load_state_dict(state)
    except (SafetensorError, OSError, RuntimeError) as error:
        model.detach()
        raise CheckpointError(f"{folder / WEIGHTS}: damaged or not of this configuration ({error})") from error
    except BackboneError:
        model.detach()
        raise
    return model


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration of saved routers.

    Raises:
        CheckpointError: the folder holds none, or a damaged one.
    """
    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder}: expected saved routers, found no {' and no '.join(missing)} (missing); "
            "pass the folder that save_pretrained or `adaskip export` wrote, or RUN/router"
        )
    try:
        meta = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if meta["format"] != FORMAT:
            raise CheckpointError(
                f"{folder / CONFIG}: format {meta['format']}, this adaskip reads format {FORMAT}; upgrade adaskip"
            )
        if not isinstance(meta["router"], dict) or not isinstance(meta["backbone"]["name"], str):
            raise KeyError("router")
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / CONFIG}: damaged ({error}); export the routers again") from error
    return meta


def check_fingerprint(expected: dict[str, Any], found: dict[str, Any], strict: bool) -> None:
    """Compare what the routers were trained on with the model at hand.

    Raises:
        BackboneError: they differ and ``strict``; the text lists every difference.
    """
    differing = [
        f"{key}: {value!r} expected, {found.get(key)!r} found"
        for key, value in expected.items()
        if found.get(key) != value
    ]
    if not differing:
        return
    text = "the routers were trained on another backbone: " + "; ".join(differing)
    if strict:
        raise BackboneError(f"{text}. Load the backbone they name, or pass strict=False to use this one all the same")
    warnings.warn(text, stacklevel=3)


def _write(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def _card(meta: dict[str, Any], parameters: int) -> str:
    backbone, router = meta["backbone"], meta["router"]
    facts = (
        "\n".join(f"- {name.replace('_', ' ')}: {value}" for name, value in meta["facts"].items()) or "- none recorded"
    )
    return f"""---
library_name: adaskip
base_model: {backbone["name"]}
tags: [layer-skipping, router]
---

# Layer-skipping routers for {backbone["name"]}

One small router per decoder layer ({parameters:,} parameters in all) decides {_decides(router)} may leave out,
of each of the {backbone["layers"]} layers: {_UNITS[router["unit"]]}.
The backbone is not in this folder and is not changed.

```python
import adaskip

model = adaskip.RoutedModel.from_pretrained("path/to/this/folder")
```

Backbone: `{backbone["class"]}`, {backbone["layers"]} layers, width {backbone["width"]}; digest `{backbone["weights"]}`.
Group `{router["group"]}`, scope `{router["scope"]}`, unit `{router["unit"]}`, keys and values `{router["kv"]}`.

## Measured

{facts}
{_promise(meta["certificate"])}
Made with adaskip {meta["adaskip"]}.
"""


_UNITS = {"block": "all of it", "attention": "its attention", "mlp": "its MLP"}


def _decides(router: dict[str, Any]) -> str:
    vision = router["group"] == "vision"
    if router["scope"] == "token":
        return f"what each {'vision token' if vision else 'token'}"
    return f"from the prompt what the {'vision tokens' if vision else 'whole sequence'}"


def _promise(certificate: dict[str, Any] | None) -> str:
    if certificate is None:
        return ""
    risk, delta, n = (certificate[name] for name in ("risk", "delta", "n"))
    what = "No threshold could be certified, so every layer runs: the answers are the dense model's."
    if certificate["threshold"] is not None:
        what = (
            f"Routed and dense greedy answers differ on at most {risk:g} of the inputs, with probability {1 - delta:g} "
            "over the draw of the calibration inputs."
        )
    return f"""
## Guarantee

{what} Learn-then-Test on {n} inputs (digest `{certificate["data"]["digest"]}`), for inputs from the same distribution.
"""
