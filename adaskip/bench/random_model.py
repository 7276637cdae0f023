"""A random model of a named architecture and size, with random prompts."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig

from adaskip.backbone.inspect import inspect_backbone, size_of, twin
from adaskip.bench.subject import Subject
from adaskip.errors import BackboneError, ConfigError, did_you_mean
from adaskip.plan import Group
from adaskip.policies.learned.config import RouterConfig
from adaskip.runtime.attach import attach

IMAGE = 5
_FIRST_TEXT = 16  # ids below are kept for what configurations give a meaning
_PATCH = 4


@dataclass(frozen=True)
class Size:
    """Hold the size of a random model; None: what the comment says."""

    layers: int = 24
    hidden: int = 1024
    heads: int | None = None  # one for 64 of the width
    kv_heads: int | None = None  # as many as heads
    intermediate: int | None = None  # 8/3 of the width, rounded up to a multiple of 64
    vocabulary: int = 32_000

    def names(self, longest: int) -> dict[str, Any]:
        """Return the size under the names that configurations use.

        Raises:
            ConfigError: sizes that do not fit one another; all faults at once.
        """
        heads = self.heads or max(1, self.hidden // 64)
        kv_heads = self.kv_heads or heads
        faults = [
            f"--{name.replace('_', '-')}: expected a whole number >= 1, got {value}"
            for name, value in vars(self).items()
            if value is not None and value < 1
        ]
        if not faults and self.hidden % (2 * heads):
            faults.append(f"--hidden {self.hidden}: expected a multiple of twice the {heads} heads; set --heads")
        if not faults and heads % kv_heads:
            faults.append(f"--kv-heads {kv_heads}: expected a divisor of the {heads} heads")
        if self.vocabulary < 2 * _FIRST_TEXT:
            faults.append(f"--vocabulary: expected at least {2 * _FIRST_TEXT}, got {self.vocabulary}")
        if faults:
            raise ConfigError("bench: " + "; ".join(faults))
        return {
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": self.hidden // heads,
            "intermediate_size": self.intermediate or -(-self.hidden * 8 // 3 // 64) * 64,
            "n_inner": self.intermediate or 4 * self.hidden,
            "ffn_dim": self.intermediate or 4 * self.hidden,
            "decoder_layers": self.layers,
            "decoder_attention_heads": heads,
            "decoder_ffn_dim": self.intermediate or 4 * self.hidden,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": longest,
            "is_decoder": True,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }


def random_subject(
    backbone: str,
    size: Size,
    prompt: int,
    new: int,
    image_tokens: int,
    group: Group,
    attention: str,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
) -> Subject:
    """Make a model of this type with random weights, and random prompts of ``prompt`` text tokens after a picture.

    Raises:
        ConfigError: no such type, or sizes that do not fit.
        BackboneError: it cannot be routed.
    """
    if backbone not in CONFIG_MAPPING:
        raise ConfigError(
            f"--backbone {backbone}: transformers has no such model type; {did_you_mean(backbone, _common(backbone))}"
        )
    names = size.names(prompt + image_tokens + new + 8)
    if image_tokens:
        if backbone not in _PICTURES:
            raise ConfigError(
                f"--image-tokens {image_tokens}: pictures are made for --backbone {' or '.join(_PICTURES)}, "
                f"not for {backbone}"
            )
        config, picture = _PICTURES[backbone](names, image_tokens)
        auto: Any = AutoModelForImageTextToText
    elif backbone in _PICTURES:
        raise ConfigError(
            f"--backbone {backbone}: a vision-language model; say how long its picture is: --image-tokens 576"
        )
    else:
        config, picture = None, None
        auto = AutoModelForCausalLM
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        config = config or _config(backbone, names)
        _check_size(backbone, size, *size_of(config))  # a composite configuration knows none of the names
        with device:
            model = auto.from_config(config, attn_implementation=attention)
    except (torch.OutOfMemoryError, ConfigError):
        raise
    except Exception as error:  # whatever a configuration or a model does not like
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BackboneError(f"--backbone {backbone}: {first}") from error
    finally:
        torch.set_default_dtype(before)
    model.eval().requires_grad_(False)
    takes = inspect.signature(type(model).forward).parameters
    if "past_key_values" not in takes:
        raise BackboneError(f"--backbone {backbone}: it keeps no KV cache, so that decoding cannot be measured")
    opening = [getattr(config, "vision_start_token_id", names["bos_token_id"])]

    def batch(rows: int) -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(seed)
        ids = torch.randint(_FIRST_TEXT, size.vocabulary, (rows, prompt), generator=draw)
        if picture is not None:
            head = torch.tensor([*opening, *[IMAGE] * image_tokens]).expand(rows, -1)
            ids = torch.cat([head, ids[:, len(opening) :]], 1)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if picture is not None:
            inputs |= picture(rows, draw)
            inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
        if "mm_token_type_ids" in takes:
            inputs["mm_token_type_ids"] = (ids == IMAGE).long()
        return {name: value.to(device) for name, value in inputs.items()}

    spec = inspect_backbone(model)
    _check_size(backbone, size, len(spec.layers), spec.width)
    routed = attach(twin(spec), RouterConfig(group=group), seed=seed)
    return Subject(backbone, spec, routed, batch)


def _check_size(backbone: str, size: Size, layers: int, width: int) -> None:
    if (layers, width) != (size.layers, size.hidden):
        raise ConfigError(
            f"--backbone {backbone}: expected a model of {size.layers} layers and width {size.hidden}, but its "
            f"configuration made one of {layers} layers and width {width}; "
            "try the model type of its language model, such as gemma3_text"
        )


def _common(word: str) -> list[str]:
    near = [name for name in CONFIG_MAPPING if name[:3] == word[:3]]
    return near or ["llama", "qwen2", "qwen3", "mistral", "gemma2", "mixtral", *_PICTURES]


def _config(model_type: str, names: dict[str, Any]) -> PreTrainedConfig:
    kind: Any = CONFIG_MAPPING[model_type]
    aliases = getattr(kind, "attribute_map", {}) or {}
    known = set(inspect.signature(kind.__init__).parameters) | set(getattr(kind, "__dataclass_fields__", {}))
    sizes = {(name if name in known else aliases.get(name, name)): value for name, value in names.items()}
    config: PreTrainedConfig = kind(**{name: value for name, value in sizes.items() if name in known})
    return config


Picture = Callable[[int, torch.Generator], dict[str, Tensor]]


def _llava(names: dict[str, Any], slots: int) -> tuple[PreTrainedConfig, Picture]:
    """Configure a tower of one narrow layer over a square of patches, then a Llama."""
    side = round(slots**0.5)
    if side * side != slots:
        raise ConfigError(f"--image-tokens {slots}: expected a square for llava, such as {side * side}")
    clip: Any = CONFIG_MAPPING["clip_vision_model"]
    tower = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
    kind: Any = CONFIG_MAPPING["llava"]
    config = kind(
        vision_config=clip(image_size=side * _PATCH, patch_size=_PATCH, **tower),
        text_config=_config("llama", names),
        image_token_index=IMAGE,
        vision_feature_layer=-1,
    )
    return config, lambda rows, draw: {
        "pixel_values": torch.randn(rows, 3, side * _PATCH, side * _PATCH, generator=draw)
    }


def _qwen2_vl(names: dict[str, Any], slots: int) -> tuple[PreTrainedConfig, Picture]:
    """Configure a tower of one narrow layer over patches that are merged two by two, then a Qwen2."""
    tower = {"depth": 1, "embed_dim": 64, "num_heads": 1, "hidden_size": names["hidden_size"], "mlp_ratio": 1}
    return _patched("qwen2_vl", names, tower, slots)


def _qwen2_5_vl(names: dict[str, Any], slots: int) -> tuple[PreTrainedConfig, Picture]:
    """Make the same with that model's tower, whose one layer looks at the whole picture."""
    tower = {"depth": 1, "hidden_size": 64, "intermediate_size": 64, "num_heads": 1, "fullatt_block_indexes": [0]}
    tower |= {"out_hidden_size": names["hidden_size"], "window_size": 8 * _PATCH}
    return _patched("qwen2_5_vl", names, tower, slots)


def _patched(
    model_type: str, names: dict[str, Any], tower: dict[str, Any], slots: int
) -> tuple[PreTrainedConfig, Picture]:
    half = names["head_dim"] // 2
    sections = [half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8]
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}
    kind: Any = CONFIG_MAPPING[model_type]
    config = kind(
        text_config={**names, "rope_parameters": rope},
        vision_config={**tower, "patch_size": _PATCH},
        image_token_id=IMAGE,
        video_token_id=6,
        vision_start_token_id=7,
        vision_end_token_id=8,
    )
    high = next(n for n in range(round(slots**0.5), 0, -1) if slots % n == 0)

    def picture(rows: int, draw: torch.Generator) -> dict[str, Tensor]:
        patches = torch.randn(rows * slots * 4, 3 * 2 * _PATCH**2, generator=draw)
        return {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, 2 * high, 2 * slots // high]] * rows)}

    return config, picture


_PICTURES: dict[str, Callable[[dict[str, Any], int], tuple[PreTrainedConfig, Picture]]] = {
    "llava": _llava,
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
}
