"""Save a policy and load it: JSON, safetensors and a model card; never a pickle, never the backbone's weights."""

from __future__ import annotations

import hashlib
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as pack
from torch import Tensor, nn
from transformers import PreTrainedModel

from adaskip.backbone.load import load_backbone
from adaskip.errors import CheckpointError, ConfigError
from adaskip.policy import Policy
from adaskip.runfiles import write
from adaskip.runtime.adapters import PREFIX, adapt
from adaskip.runtime.card import write_card
from adaskip.runtime.description import CARD, CONFIG, FORMAT, WEIGHTS, describe_policy, read_config, read_policy, sign
from adaskip.runtime.fingerprint import Fingerprint, Sample, check_digest, check_fingerprint, fingerprint
from adaskip.runtime.hub import fetch, is_hub_id
from adaskip.runtime.lora import Lora
from adaskip.sources import model_name
from adaskip.theory.gauge import stored_gauge
from adaskip.version import __version__

if TYPE_CHECKING:
    from adaskip.runtime.attach import RoutedModel

SAMPLES = "backbone."
"""The prefix of the names of values that identify the backbone in the weights file; no policy's weights have it."""


@dataclass(frozen=True)
class Saved:
    """Hold the contents of a folder, checked as far as they can be without the model."""

    folder: Path
    meta: dict[str, Any]
    policy: Policy
    weights: dict[str, Tensor]
    samples: dict[str, Sample]
    backbone: PreTrainedModel


def save(model: RoutedModel, folder: str | Path) -> Path:
    """Write a model's policy; each file appears whole or not at all.

    Raises:
        ConfigError: a policy that cannot be brought back; weights or facts that no file could hold.
        CheckpointError: the folder cannot be written.
    """
    _check_readable(model.policy)
    policy = describe_policy(model.policy)
    folder, backbone = Path(folder), model.whole or fingerprint(model.spec)
    meta: dict[str, Any] = {
        "format": FORMAT if model.adapters is not None else 3,
        "adaskip": __version__,
        "backbone": {
            "name": model_name(model.backbone.config._name_or_path),
            **backbone.identity,
            "weights": backbone.digest(),
            "quantised": backbone.quantised,
        },
        "policy": policy,
        "trained": sign(policy),
        "facts": _plain("facts", model.facts),
        "certificate": _plain("certificate", model.certificate),
        "gauge": None if model.gauge is None else model.gauge.to_dict(),
        "adapters": None if model.adapters is None else model.adapters.lora.to_dict(),
    }
    weights = {name: value.detach().cpu().contiguous() for name, value in model.policy.state_dict().items()}
    if model.adapters is not None:
        weights |= {name: value.cpu().contiguous() for name, value in model.adapters.state_dict().items()}
    count = sum(value.numel() for value in weights.values())
    content = _pack(weights, backbone.samples)
    meta["content"] = hashlib.sha256(content).hexdigest()
    card = write_card(meta, model.target, count)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write(folder / WEIGHTS, content)
        write(folder / CONFIG, (json.dumps(meta, indent=2) + "\n").encode())
        if _is_ours(folder / CARD):
            write(folder / CARD, card.encode())
    except OSError as error:
        raise CheckpointError(
            f"{folder}: the routers cannot be written here ({error.strerror or error}); choose another folder"
        ) from error
    return folder


def _plain(name: str, values: Any) -> Any:
    """Return a model's facts as JSON holds them; tensors and numpy's numbers become Python's."""

    def convert(value: Any) -> Any:
        if callable(getattr(value, "tolist", None)):
            return value.tolist()
        raise TypeError(f"a {type(value).__name__}")

    try:
        if not isinstance(values, dict | None):
            raise TypeError(f"a {type(values).__name__} instead of a dictionary")
        return json.loads(json.dumps(values, default=convert))
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"save_pretrained: model.{name}: expected numbers, texts, lists and dictionaries, got {error}; convert it, "
            "or take it out"
        ) from error


def _check_readable(policy: nn.Module) -> None:
    """Refuse weights that are codes or shards: as numbers they would not be the policy's."""
    for name, value in policy.state_dict().items():
        if type(value) not in (Tensor, nn.Parameter) or not value.is_floating_point():
            raise ConfigError(
                f"save_pretrained: the routers are quantised or sharded ({name}: {type(value).__name__} of "
                f"{value.dtype}), and cannot be written; quantise the backbone alone: quantize_(model.backbone, ...)"
            )


def _load_named(folder: Path, name: str, options: dict[str, Any]) -> PreTrainedModel:
    """Load the backbone that a folder names."""
    try:
        return load_backbone(name, **options)
    except CheckpointError as error:
        raise CheckpointError(
            f"{folder}: {error}; if it has moved, load it yourself: RoutedModel.from_pretrained(folder, backbone)"
        ) from error


def read_saved(folder: Any, backbone: Any, options: dict[str, Any]) -> Saved:
    """Read a saved policy and find its backbone; see `RoutedModel.from_pretrained`."""
    folder, backbone = _sort(folder, backbone, options)
    if is_hub_id(folder):
        folder = fetch(str(folder), options.pop("revision", None))
    meta = read_config(folder)
    policy = read_policy(meta)
    weights, samples = read_weights(folder / WEIGHTS, meta)
    if backbone is None and not meta["backbone"]["name"]:
        raise CheckpointError(
            f"{folder}: the routers' backbone was built in memory and has no name to load it by; pass it: "
            "RoutedModel.from_pretrained(folder, backbone)"
        )
    base = backbone if backbone is not None else _load_named(folder, meta["backbone"]["name"], options)
    return Saved(folder, meta, policy, weights, samples, base)


def restore(saved: Saved, model: RoutedModel, strict: bool) -> None:
    """Give an attached model's policy the weights that were saved, once the backbone is known to be the right one."""
    _check(saved.meta, saved.samples, model, strict)
    ours = {name: value for name, value in saved.weights.items() if not name.startswith(PREFIX)}
    _check_shapes(saved.folder / WEIGHTS, ours, model.policy.state_dict())
    model.policy.load_state_dict(ours)
    if (lora := saved.meta.get("adapters")) is not None:
        adapt(model, Lora.from_dict(lora)).load_state_dict(saved.weights)
    model.facts, model.certificate = saved.meta.get("facts") or {}, saved.meta.get("certificate")
    model.gauge = stored_gauge(saved.meta.get("gauge"))


def _sort(folder: Any, backbone: Any, options: dict[str, Any]) -> tuple[Path, Any]:
    """Return the folder and the backbone, whichever of them was passed first; in PEFT the backbone is."""
    if isinstance(folder, nn.Module):
        folder, backbone = backbone, folder
    if not isinstance(folder, str | Path) or not isinstance(backbone, nn.Module | None):
        raise ConfigError(
            f"from_pretrained: expected the routers' folder and a loaded backbone, got {type(folder).__name__} and "
            f"{type(backbone).__name__}; write RoutedModel.from_pretrained(folder), which loads the backbone named "
            "there, or RoutedModel.from_pretrained(folder, backbone)"
        )
    foreign = options.keys() - ({"revision"} if is_hub_id(folder) else set())
    if backbone is not None and foreign:
        raise ConfigError(
            f"from_pretrained: {', '.join(sorted(foreign))} would load a backbone, but one is given already; leave out "
            "either"
        )
    return Path(folder), backbone


def _check(meta: dict[str, Any], samples: dict[str, Sample], model: RoutedModel, strict: bool) -> None:
    """Refuse another backbone than the saved one, as far as the file's format can tell."""
    identity = {key: value for key, value in meta["backbone"].items() if key not in ("name", "quantised")}
    if meta["format"] == 1:
        return check_digest(identity, model.spec, strict)
    identity.pop("weights", None)  # a hash, since format 2 for people only
    return check_fingerprint(Fingerprint(identity, samples, meta["backbone"]["quantised"]), model.spec, strict)


def _check_shapes(path: Path, actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Refuse weights of other names or shapes than the policy's."""
    shapes = [{name: tuple(value.shape) for name, value in state.items()} for state in (actual, expected)]
    wrong = sorted(name for name in {**actual, **expected} if shapes[0].get(name) != shapes[1].get(name))
    if wrong:
        got, needed = (values.get(wrong[0], "nothing") for values in shapes)
        raise CheckpointError(
            f"{path}: damaged or not of this configuration: {wrong[0]}: expected {needed}, got {got}, and "
            f"{len(wrong) - 1} more; export the routers again"
        )


def _pack(weights: dict[str, Tensor], samples: dict[str, Sample]) -> bytes:
    """Return one safetensors file of the policy's weights and of the values that identify their backbone."""
    values = {f"{SAMPLES}{n}": sample.values.contiguous() for n, sample in samples.items() if sample.values is not None}
    shapes = {name: sample.shape if sample.values is not None else None for name, sample in samples.items()}
    return pack({**weights, **values}, metadata={"format": "pt", "backbone": json.dumps(shapes)})


def read_weights(path: Path, meta: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Sample]]:
    """Return the policy's weights, and the values that identify their backbone (none in format 1).

    Raises:
        CheckpointError: the file is damaged, or not the one that the configuration speaks of.
    """
    try:
        if meta.get("content", meta.get("routers")) not in (None, hashlib.sha256(path.read_bytes()).hexdigest()):
            raise CheckpointError(
                f"{path}: damaged, or not saved together with {CONFIG} (two saves into one folder at once?); "
                "save the routers again"
            )
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            shapes = json.loads((file.metadata() or {}).get("backbone", "{}"))
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: damaged or not of this configuration ({error})") from error
    samples = {n: Sample(tuple(shape or ()), tensors.pop(f"{SAMPLES}{n}", None)) for n, shape in shapes.items()}
    if meta["format"] < 3:  # all was routers then, and their weights were called by their layers alone
        tensors = {f"heads.{name}": value for name, value in tensors.items()}
    return tensors, samples


def _is_ours(card: Path) -> bool:
    """Return whether a card may be written: a README of something else that lives in this folder is left alone."""
    if not card.is_file() or "library_name: adaskip" in card.read_text(encoding="utf-8", errors="replace"):
        return True
    warnings.warn(f"{card}: left as it is, because it is no model card of adaskip", stacklevel=4)
    return False
