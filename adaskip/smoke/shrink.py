"""A configuration made small: the same architecture, with few layers and a width of some dozen."""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from adaskip.backbone.inspect import size_of
from adaskip.errors import BackboneError

LAYERS = 4
"""Decoder layers: so few that seconds suffice, and so many that one can go and the rest still holds a budget."""
WIDTH, HEADS = 32, 4
_PATCH, _SIDE = 4, 16  # pixels
_TEXT: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "head_dim": WIDTH // HEADS,
    "max_position_embeddings": 512,
    "sliding_window": 32,
    "max_window_layers": LAYERS,
    # mixtures of experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
}
_TOWER: dict[str, Any] = {
    "hidden_size": 16,
    "embed_dim": 16,
    "intermediate_size": 16,
    "mlp_ratio": 1,
    "num_hidden_layers": 2,
    "depth": 2,
    "num_attention_heads": 2,
    "num_heads": 2,
    "head_dim": 8,
    "patch_size": _PATCH,
    "image_size": _SIDE,
    "window_size": _SIDE,
    "out_hidden_size": WIDTH,
    "projection_dim": 16,
    "num_position_embeddings": 16,
    "fullatt_block_indexes": [1],
    "deepstack_visual_indexes": [0],
}
_WHOLE: dict[str, Any] = {"mm_tokens_per_image": 4, "image_grid_pinpoints": [[_SIDE, _SIDE], [_SIDE, 2 * _SIDE]]}


def shrink(config: PreTrainedConfig, vocabulary: int, ids: dict[str, int]) -> PreTrainedConfig:
    """Return a configuration of the same architecture whose model has `LAYERS` narrow decoder layers.

    Args:
        config: of the large model.
        vocabulary: tokens of the small one.
        ids: numbers of its special tokens, by the names that configurations give them.

    Raises:
        BackboneError: the architecture does not let itself be built so small.
    """
    values = config.to_dict()
    text = config.get_text_config(decoder=True)
    small = _small_text(text, vocabulary, ids)
    if text is config:
        values = small
    else:
        tower = _taken(values["vision_config"], _TOWER)
        values |= {"text_config": small, "vision_config": _as_pairs(tower, values["vision_config"])}
        values |= {name: value for name, value in (_WHOLE | ids).items() if name in values}
        values |= {"scale_factor": 2} if values.get("scale_factor", 0) > 1 else {}
        if "hidden_size" in values:  # some hold the language model's width a second time
            values["hidden_size"] = WIDTH
    for name in ("dtype", "architectures", "transformers_version", "quantization_config", "auto_map"):
        values.pop(name, None)
    try:
        kind: Any = CONFIG_MAPPING[values.pop("model_type")]
        result: PreTrainedConfig = kind(**values)
    except Exception as error:  # whatever a configuration does not like
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BackboneError(f"--smoke: {config.model_type} cannot be made small ({first})") from error
    return result


def _small_text(text: Any, vocabulary: int, ids: dict[str, int]) -> dict[str, Any]:
    values: dict[str, Any] = text.to_dict()
    layers, heads = size_of(text)[0], text.num_attention_heads
    groups = getattr(text, "num_key_value_heads", None) or heads
    small = _taken(values, _TEXT, getattr(text, "attribute_map", {}))
    small |= {name: value for name, value in ids.items() if name in values}
    small["vocab_size"] = vocabulary
    if "num_key_value_heads" in small:
        small["num_key_value_heads"] = HEADS if groups == heads else min(groups, HEADS // 2)
    for name, value in small.items():  # what is told layer by layer keeps its variety
        if isinstance(value, list) and len(value) == layers:
            small[name] = _varied(value)
    rope = small.get("rope_parameters")
    if isinstance(rope, dict) and "mrope_section" in rope:
        small["rope_parameters"] = rope | {"mrope_section": [2, 1, 1]}  # half of a head, for time, height and width
    return small


def _taken(values: dict[str, Any], sizes: dict[str, Any], aliases: dict[str, str] | None = None) -> dict[str, Any]:
    """Replace the sizes that a configuration knows; what it leaves out stays left out."""
    result = dict(values)
    for name, value in sizes.items():
        known = (aliases or {}).get(name, name)
        if values.get(known) is not None:
            result[known] = value
    return result


def _as_pairs(tower: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """Give height and width apart to the towers that have them apart."""
    pairs = [name for name in ("image_size", "patch_size") if isinstance(before.get(name), list | tuple)]
    return tower | {name: [tower[name], tower[name]] for name in pairs}


def _varied(values: list[Any]) -> list[Any]:
    """Return as many values as there are layers now, each that occurred in turn."""
    kinds = list(dict.fromkeys(map(repr, values)))
    first = [values[[*map(repr, values)].index(kind)] for kind in kinds]
    return [first[i % len(first)] for i in range(LAYERS)]
