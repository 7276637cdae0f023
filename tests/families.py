"""Small random models of every decoder family that transformers builds, and batches for them.

`TEXT` and `VISION` are what must be routable, `REFUSED` what must not, each with a piece of the reason: of the types
listed here, those that the installed transformers knows.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    PreTrainedConfig,
    PreTrainedModel,
)

VOCABULARY, IMAGE, PAD, LAYERS = 96, 5, 0, 4

_SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": None,
    "max_position_embeddings": 128,
    # larger than usual, so that a random layer changes the logits enough for a mistake to show
    "initializer_range": 0.2,
    "is_decoder": True,
    # names that only some families know
    "decoder_layers": LAYERS,
    "encoder_layers": LAYERS,
    "decoder_ffn_dim": 48,
    "ffn_dim": 48,
    "n_inner": 48,
    "mlp_hidden_size": 48,
    "word_embed_proj_dim": 32,
    "rotary_dim": 4,
    "sliding_window": 8,
    # mixtures of experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    # latent attention
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
"""Sizes by the names that configurations use; each takes those it knows."""

_LATENT = {"num_key_value_heads": 4}
_STACK = {"d_model": 32, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "decoder_start_token_id": 1}

# fmt: off
_PLAIN = [
    "afmoe", "apertus", "arcee", "aria_text", "bart", "beam", "bert", "bert-generation", "biogpt", "bitnet",
    "bloom", "camembert", "codegen", "cohere", "cohere2", "cohere2_moe", "ctrl", "cwm", "data2vec-text",
    "diffllama", "doge", "dots1", "electra", "ernie", "ernie4_5", "ernie4_5_moe", "exaone4", "exaone_moe", "falcon",
    "flex_olmo", "flint", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "glm4_moe", "gpt-sw3", "gpt2",
    "gpt_bigcode", "gpt_neox", "gpt_neox_japanese", "gpt_oss", "gptj", "granite", "granite_swa", "granitemoe",
    "granitemoe_swa", "granitemoeshared", "helium", "hunyuan_v1_dense", "hunyuan_v1_moe", "hy_v3", "hyperclovax",
    "internlm3", "iquestcoder", "jais2", "jetmoe", "kolibri1", "laguna", "llama", "llama4_text", "mbart",
    "megatron-bert", "mellum", "mimo_v2_flash", "minimax_m2", "minimax_m3_vl_text", "ministral", "ministral3",
    "mistral", "mixtral", "modernbert-decoder", "mpt", "nanochat", "nemotron", "olmo", "olmo2", "olmo3", "olmoe",
    "openai-gpt", "opt", "persimmon", "phi", "phi3", "phimoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe",
    "rembert", "roberta", "roberta-prelayernorm", "roformer", "seed_oss", "smollm3", "solar_open", "stablelm",
    "starcoder2", "trocr", "vaultgemma", "xglm", "xlm-roberta", "xlm-roberta-xl",
]
# fmt: on

_TEXT: dict[str, dict[str, Any]] = {
    **{model_type: {} for model_type in _PLAIN},
    "axk1": _LATENT,
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "glm4_moe_lite": _LATENT,
    "minicpm3": _LATENT,
    "youtu": _LATENT,
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "num_layers": LAYERS},
    "blenderbot": _STACK,
    "marian": _STACK,
    "pegasus": _STACK,
    "plbart": _STACK,
}
TEXT = {model_type: needs for model_type, needs in _TEXT.items() if model_type in CONFIG_MAPPING}
"""Language models that must be routable: model type, and what its configuration needs beside the small sizes."""


def _known(kind: type[PreTrainedConfig]) -> set[str]:
    return set(inspect.signature(kind.__init__).parameters) | set(getattr(kind, "__dataclass_fields__", {}))


def small_config(model_type: str, **more: Any) -> PreTrainedConfig:
    """The configuration of a small model of this type."""
    kind = CONFIG_MAPPING[model_type]
    aliases = getattr(kind, "attribute_map", {}) or {}
    known = _known(kind)
    sizes = {(name if name in known else aliases.get(name, name)): value for name, value in _SMALL.items()}
    return kind(**{name: value for name, value in {**sizes, **more}.items() if name in known or name in more})


@dataclass(frozen=True)
class Pictures:
    """How a vision-language family is shown a picture."""

    inputs: Callable[[torch.Generator], dict[str, Tensor]]  # of one picture
    slots: int  # placeholder tokens it takes
    opening: tuple[int, ...] = (1,)  # token ids before them
    prefix: bool = False  # whether the prompt is read both ways


@dataclass
class Toy:
    """A model and a maker of batches for it."""

    model: PreTrainedModel
    pictures: Pictures | None = None

    def rows(self, lengths: list[int], seed: int = 0) -> list[dict[str, Tensor]]:
        """One row per length (text tokens); rows of a vision-language model open with a picture."""
        draw = torch.Generator().manual_seed(seed)
        rows = []
        for length in lengths:
            ids = torch.randint(16, VOCABULARY - 8, (length,), generator=draw)
            row: dict[str, Tensor] = {}
            if self.pictures is not None:
                ids = torch.cat([torch.tensor([*self.pictures.opening, *[IMAGE] * self.pictures.slots]), ids])
                row = self.pictures.inputs(draw)
            rows.append({"input_ids": ids, **row})
        return rows

    def collate(self, rows: list[dict[str, Tensor]], side: str = "left") -> dict[str, Tensor]:
        """Rows padded to one length, their pictures one after the other."""
        width = max(len(row["input_ids"]) for row in rows)
        batch = {
            "input_ids": torch.full((len(rows), width), PAD),
            "attention_mask": torch.zeros(len(rows), width).long(),
        }
        for i, row in enumerate(rows):
            ids = row["input_ids"]
            place = slice(width - len(ids), width) if side == "left" else slice(0, len(ids))
            batch["input_ids"][i, place] = ids
            batch["attention_mask"][i, place] = 1
        for name in rows[0].keys() - {"input_ids"}:
            batch[name] = torch.cat([row[name] for row in rows])
        takes = inspect.signature(type(self.model).forward).parameters
        if self.pictures is not None:
            kinds = (batch["input_ids"] == IMAGE).long() * (not self.pictures.prefix)
            batch |= {name: kinds for name in ("mm_token_type_ids", "token_type_ids") if name in takes}
        if self.pictures is None and "position_ids" in takes:
            batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
        return batch

    def batch(self, lengths: list[int], side: str = "left", seed: int = 0) -> dict[str, Tensor]:
        """`rows`, collated."""
        return self.collate(self.rows(lengths, seed), side)


# fmt: off
EAGER_ONLY = frozenset([
    "bloom", "codegen", "flint", "gemma2", "gpt_neo", "gpt_neox_japanese", "gpt_oss", "gptj", "granite_swa",
    "granitemoe_swa", "megatron-bert", "mimo_v2_flash", "mpt", "openai-gpt", "rembert", "roformer", "trocr",
    "vaultgemma", "xglm",
])
# fmt: on
"""Families that transformers does not run with SDPA."""


PADDING_MOVES = frozenset(["bart", "blenderbot", "marian", "mbart", "pegasus", "plbart", "trocr"])
"""Families whose own forward counts padding as positions and takes no position_ids: rows of one length only."""


def make(model_type: str, attention: str = "eager", seed: int = 0) -> Toy:
    """A fresh small model of this family, with weights large enough for a mistake to show."""
    torch.default_generator.manual_seed(seed)  # torch.manual_seed notes where it is called from, at length
    if model_type in TEXT:
        config, pictures = small_config(model_type, **TEXT[model_type]), None
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    else:
        config, pictures = VISION[model_type]()
        model = AutoModelForImageTextToText.from_config(config, attn_implementation=attention)
    model.generation_config.update(eos_token_id=None, forced_eos_token_id=None)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() >= 2 and 0 < weight.std() < 0.1:
                weight.mul_(0.2 / weight.std())
    return Toy(model.eval(), pictures)


# -- vision-language families -------------------------------------------------------------------------------------

_CLIP = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def _square(draw: torch.Generator, *shape: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(*shape, generator=draw)}


def _llava_like(
    model_type: str,
    tower: str = "clip_vision_model",
    text: str = "llama",
    key: str = "image_token_index",
    slots: int = 4,
    size: int = 16,
    inputs: Callable[[torch.Generator], dict[str, Tensor]] | None = None,
    vision: dict[str, Any] | None = None,
    prefix: bool = False,
    **more: Any,
) -> tuple[PreTrainedConfig, Pictures]:
    """A tower (16 x 16 pixels in patches of 8), a projector, and a decoder."""
    towers = {"image_size": size, "patch_size": 8, **_CLIP, **(vision or {})}
    config = CONFIG_MAPPING[model_type](
        vision_config=CONFIG_MAPPING[tower](**towers), text_config=small_config(text), **{key: IMAGE}, **more
    )
    return config, Pictures(inputs or partial(_one, size=size), slots, prefix=prefix)


def _one(draw: torch.Generator, size: int) -> dict[str, Tensor]:
    return _square(draw, 1, 3, size, size)


def _sized(draw: torch.Generator, crops: int = 0, size: int = 16) -> dict[str, Tensor]:
    shape = (1, crops, 3, size, size) if crops else (1, 3, size, size)
    return {**_square(draw, *shape), "image_sizes": torch.tensor([[size, size]])}


def _patched(draw: torch.Generator, width: int, key: str = "pixel_values") -> dict[str, Tensor]:
    """Sixteen patches in a 4 x 4 grid, merged two by two."""
    return {key: torch.randn(16, width, generator=draw), "image_grid_thw": torch.tensor([[1, 4, 4]])}


def _qwen_like(model_type: str, vision: dict[str, Any], text: dict[str, Any], **more: Any):
    """Families whose pictures come as a list of patches with a grid."""
    special = {"image_token_id": IMAGE, "video_token_id": 6, "vision_start_token_id": 7, "vision_end_token_id": 8}
    special |= {"image_start_token_id": 7, "image_end_token_id": 8, "video_start_token_id": 9, "video_end_token_id": 10}
    kind = CONFIG_MAPPING[model_type]
    known = _known(kind)
    config = kind(
        text_config={**_SMALL, **text}, vision_config=vision, **{k: v for k, v in special.items() if k in known}, **more
    )
    width = 3 * 2 * vision["patch_size"] ** 2
    return config, Pictures(partial(_patched, width=width), 4, opening=(7,))


_MROPE = {
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e4,
        "mrope_section": [1, 1, 2],
        "partial_rotary_factor": 1.0,
    }
}
_MROPE3 = {
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e4,
        "mrope_section": [1, 1, 2],
        "mrope_interleaved": True,
    }
}
_QWEN2_TOWER = {"depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": 32, "patch_size": 4, "mlp_ratio": 1}
_QWEN25_TOWER = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": 32,
    "patch_size": 4,
    "fullatt_block_indexes": [0],
    "window_size": 16,
}
_QWEN3_TOWER = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": 32,
    "patch_size": 4,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
}
_GLM_TOWER = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": 32,
    "patch_size": 4,
    "image_size": 16,
}

_VISION: dict[str, Callable[[], tuple[PreTrainedConfig, Pictures]]] = {
    "llava": partial(_llava_like, "llava", vision_feature_layer=-1),
    "vipllava": partial(_llava_like, "vipllava", vision_feature_layers=[-1, -2], vision_feature_layer=[-1, -2]),
    "llava_next": partial(
        _llava_like,
        "llava_next",
        vision_feature_layer=-1,
        image_grid_pinpoints=[[16, 16]],
        inputs=partial(_sized, crops=2),
        slots=10,
    ),
    "llava_next_video": partial(
        _llava_like,
        "llava_next_video",
        vision_feature_layer=-1,
        image_grid_pinpoints=[[16, 16]],
        inputs=partial(_sized, crops=2),
        slots=10,
    ),
    "llava_onevision": partial(
        _llava_like,
        "llava_onevision",
        tower="siglip_vision_model",
        text="qwen2",
        vision_feature_layer=-1,
        image_grid_pinpoints=[[16, 16]],
        inputs=partial(_sized, crops=2),
        slots=10,
    ),
    "video_llava": partial(
        _llava_like,
        "video_llava",
        vision_feature_layer=-1,
        inputs=lambda draw: {"pixel_values_images": torch.randn(1, 3, 16, 16, generator=draw)},
        slots=5,
        vision_feature_select_strategy="full",
    ),
    "mistral3": partial(
        _llava_like,
        "mistral3",
        tower="pixtral",
        text="mistral",
        size=32,
        inputs=partial(_sized, size=32),
        vision={"head_dim": 8},
    ),
    "aya_vision": partial(_llava_like, "aya_vision", tower="siglip_vision_model", text="cohere2", size=32),
    "cohere2_vision": partial(
        _llava_like,
        "cohere2_vision",
        tower="siglip_vision_model",
        text="cohere2",
        key="image_token_id",
        size=32,
        alignment_intermediate_size=16,
    ),
    "internvl": partial(
        _llava_like,
        "internvl",
        tower="internvl_vision",
        text="qwen2",
        key="image_token_id",
        size=32,
        vision={"image_size": [32, 32], "patch_size": [8, 8]},
    ),
    "paligemma": partial(
        _llava_like,
        "paligemma",
        tower="siglip_vision_model",
        text="gemma",
        projection_dim=32,
        hidden_size=32,
        prefix=True,
        vision={"projection_dim": 32},
    ),
    "gemma3": partial(
        _llava_like,
        "gemma3",
        tower="siglip_vision_model",
        text="gemma3_text",
        mm_tokens_per_image=4,
        boi_token_index=7,
        eoi_token_index=8,
    ),
    "idefics3": partial(
        _llava_like,
        "idefics3",
        tower="idefics3_vision",
        key="image_token_id",
        size=32,
        inputs=lambda draw: {"pixel_values": torch.randn(1, 1, 3, 32, 32, generator=draw)},
    ),
    "smolvlm": partial(
        _llava_like,
        "smolvlm",
        tower="smolvlm_vision",
        key="image_token_id",
        vision={"patch_size": 4},  # before transformers 5.23 a picture takes a multiple of that many tokens
        inputs=lambda draw: {"pixel_values": torch.randn(1, 1, 3, 16, 16, generator=draw)},
    ),
    "deepseek_vl": partial(_llava_like, "deepseek_vl", tower="siglip_vision_model", key="image_token_id"),
    "lighton_ocr": partial(
        _llava_like,
        "lighton_ocr",
        tower="pixtral",
        text="qwen3",
        key="image_token_id",
        size=32,
        inputs=partial(_sized, size=32),
        vision={"head_dim": 8},
        spatial_merge_size=2,
    ),
    "qwen2_vl": partial(_qwen_like, "qwen2_vl", _QWEN2_TOWER, _MROPE),
    "qwen2_5_vl": partial(_qwen_like, "qwen2_5_vl", _QWEN25_TOWER, _MROPE),
    "qwen3_vl": partial(_qwen_like, "qwen3_vl", _QWEN3_TOWER, _MROPE3),
    "qwen3_vl_moe": partial(_qwen_like, "qwen3_vl_moe", _QWEN3_TOWER, _MROPE3),
    "glm4v": partial(_qwen_like, "glm4v", _GLM_TOWER, _MROPE),
    "glm4v_moe": partial(_qwen_like, "glm4v_moe", _GLM_TOWER, _MROPE),
    "glm_ocr": partial(_qwen_like, "glm_ocr", _GLM_TOWER, _MROPE),
}
VISION = {model_type: build for model_type, build in _VISION.items() if model_type in CONFIG_MAPPING}
"""Vision-language models that must be routable."""


_RESIDUAL = "is not the identity when its attention and MLP add nothing"
_NO_MLP = "has no MLP module of its own"
_NO_CACHE = "it keeps no KV cache"
# fmt: off
_POST_NORM = [
    "bert", "bert-generation", "camembert", "data2vec-text", "electra", "ernie", "marian", "megatron-bert", "rembert",
    "roberta", "roberta-prelayernorm", "roformer", "xlm-roberta", "xlm-roberta-xl",
]
_OPEN_MLP = [
    "bart", "biogpt", "blenderbot", "llama4_text", "mbart", "opt", "pegasus", "plbart", "trocr", "xglm",
]
# fmt: on
_UNIT_REFUSED = {
    "attention": {**dict.fromkeys(["beam", "bloom", "mpt", *_POST_NORM], _RESIDUAL), "openai-gpt": _NO_CACHE},
    "mlp": {
        **dict.fromkeys(["beam", "bloom", "mpt", *_POST_NORM], _RESIDUAL),
        **dict.fromkeys(_OPEN_MLP, _NO_MLP),
        "openai-gpt": _NO_CACHE,
    },
}
_UNIT_REFUSED["sublayers"] = _UNIT_REFUSED["mlp"]  # what either half refuses
UNIT_REFUSED = {
    unit: {model_type: why for model_type, why in refused.items() if model_type in CONFIG_MAPPING}
    for unit, refused in _UNIT_REFUSED.items()
}
"""Families whose layers are routable, but not these sublayers of them alone: a piece of the reason."""

_OWN_MASK = "holds an attention mask of its own"
_OWN_PLACES = "single tokens do not get alone what they get in place"
_TOKEN_REFUSED = {
    **{"gpt_neo": _OWN_MASK, "openai-gpt": _OWN_MASK},
    **{"beam": _OWN_PLACES, "mpt": _OWN_PLACES, "roformer": _OWN_PLACES},
}
TOKEN_REFUSED = {model_type: why for model_type, why in _TOKEN_REFUSED.items() if model_type in CONFIG_MAPPING}
"""Families whose tokens cannot decide for themselves: a piece of the reason."""
TOKEN_ATTENTION_REFUSED = {"ctrl": _OWN_PLACES}
"""Families whose tokens cannot decide about the attention alone: a piece of the reason."""


_HYBRID = "keep something else than keys and values between tokens"
_STATE = "remembers earlier tokens in something else than a KV cache"
_OTHER_STATES = "expected states"
_TWO_STACKS = "an encoder-decoder model cannot be routed"
_PER_LAYER = {"num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY}
_MIXED = ["sliding_attention", "full_attention"] * 2
_MLLAMA_TOWER = {
    **{"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_global_layers": 1},
    **{"attention_heads": 2, "image_size": 16, "patch_size": 8, "vision_output_dim": 32, "max_num_tiles": 1},
    **{"intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1]]},
}

_REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "bailing_hybrid": ({}, _HYBRID),
    "bamba": ({"mamba_n_heads": 4, "mamba_d_head": 16}, _HYBRID),
    "deepseek_v32": ({}, _HYBRID),
    "deepseek_v4": ({}, _HYBRID),
    "falcon_h1": ({}, _HYBRID),
    "falcon_mamba": ({}, _HYBRID),
    "glm_moe_dsa": ({}, _HYBRID),
    "granitemoehybrid": (
        {"mamba_n_heads": 4, "mamba_d_head": 16, "layer_types": ["mamba", "attention"] * 2},
        _HYBRID,
    ),
    "jamba": ({}, _HYBRID),
    "kimi_linear": ({}, _HYBRID),
    "lfm2": ({"full_attn_idxs": [1, 3]}, _HYBRID),
    "lfm3": ({}, _HYBRID),
    "mamba": ({}, _HYBRID),
    "mamba2": ({"num_heads": 4, "head_dim": 16, "state_size": 4, "n_groups": 1}, _HYBRID),
    "minimax": ({}, _HYBRID),
    "nemotron_h": ({}, _HYBRID),
    "olmo_hybrid": ({}, _HYBRID),
    "qwen3_5_text": ({}, _HYBRID),
    "qwen3_next": ({}, _HYBRID),
    "recurrent_gemma": ({}, f"{_HYBRID}|keeps no keys and values of its own|{_STATE}"),
    "zamba2": ({"layers_block_type": ["mamba", "hybrid"] * 2}, _HYBRID),
    "reformer": (
        {
            **{"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 16], "attn_layers": ["local"] * LAYERS},
            **{"feed_forward_size": 48, "attention_head_size": 8},
        },
        _STATE,
    ),
    "rwkv": ({}, _STATE),
    "cpmant": ({}, _OTHER_STATES),
    "gemma3n_text": (
        {
            **_PER_LAYER,
            **{"layer_types": _MIXED, "intermediate_size": [48] * LAYERS, "laurel_rank": 4},
            **{"activation_sparsity_pattern": [0.0] * LAYERS},
        },
        _OTHER_STATES,
    ),
    "prophetnet": ({}, _OTHER_STATES),
    "xlnet": ({}, _OTHER_STATES),
    "gemma4_text": ({**_PER_LAYER, "layer_types": _MIXED}, "given their own input for every token"),
    "hrm_text": ({}, "expected one list"),
    "longcat_flash": (
        {
            **{"num_layers": LAYERS, "num_key_value_heads": 4, "zero_expert_num": 2, "moe_topk": 2},
            **{"expert_ffn_hidden_size": 16, "ffn_hidden_size": 48},
        },
        "expected one list",
    ),
    "xlm": ({}, "expected one list of 4 decoder layers"),
    "mllama": (
        {"vision_config": _MLLAMA_TOWER, "text_config": {**_SMALL, "cross_attention_layers": [1, 3]}},
        "is called 0 times when the model reads plain text",
    ),
    "bart": ({"is_encoder_decoder": True}, _TWO_STACKS),
    "t5": ({"d_model": 32, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_heads": 4}, _TWO_STACKS),
    "whisper": ({"encoder_attention_heads": 4, "decoder_attention_heads": 4, "d_model": 32}, _TWO_STACKS),
    "bert": ({"is_decoder": False}, "its attention is not causal"),
}
REFUSED = {model_type: why for model_type, why in _REFUSED.items() if model_type in CONFIG_MAPPING}
"""Models that cannot be routed soundly: what their configuration needs, and a piece of the reason."""

NEWEST = len(TEXT) + len(VISION) + len(REFUSED) == len(_TEXT) + len(_VISION) + len(_REFUSED)
"""Whether the installed transformers knows all of them; an older one is tested with those it has."""


def make_refused(model_type: str) -> PreTrainedModel:
    """A small model that must be refused; of the types with several heads, the one that generates."""
    needs, reason = REFUSED[model_type]
    config = small_config(model_type, **needs)
    if reason == _TWO_STACKS:
        auto = AutoModelForSpeechSeq2Seq if model_type == "whisper" else AutoModelForSeq2SeqLM
    else:
        auto = AutoModelForImageTextToText if model_type == "mllama" else AutoModelForCausalLM
    return auto.from_config(config)
