"""A tokenizer trained on a few sentences, and the processor that an architecture's own class makes with it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedConfig, PreTrainedTokenizerFast

from adaskip.backbone.stills import processor_class
from adaskip.errors import BackboneError

_SIZE = 512  # bytes, and the words of the conversations
_BEGIN, _END, _PAD = "<s>", "<|im_end|>", "<pad>"
_SIDE = {"height": 16, "width": 16}
_CHAT = (
    "{{ bos_token }}{% for turn in messages %}<|im_start|>{{ turn.role }}\n{% if turn.content is string %}"
    "{{ turn.content }}{% else %}{% for part in turn.content %}"
    "{% if part.type == 'image' %}IMAGE{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""A chat template in the manner of ChatML; ``IMAGE`` is what the processor takes for a picture."""


@dataclass(frozen=True)
class _Pictures:
    """Hold what an architecture's processor is made of."""

    image: str  # class of its image processor
    token: str  # stands for a picture in a prompt
    text: str | None = None  # what a template writes for a picture, if that is more than the token
    more: dict[str, str] = field(default_factory=dict)  # further special tokens, by their attribute of the tokenizer
    ids: dict[str, str] = field(default_factory=dict)  # names of the configuration, and the tokens they number
    sizes: dict[str, Any] = field(default_factory=dict)  # of the image processor
    options: dict[str, Any] = field(default_factory=dict)  # of the processor


_QWEN = _Pictures(
    "Qwen2VLImageProcessor",
    "<|image_pad|>",
    "<|vision_start|><|image_pad|><|vision_end|>",
    {"video_token": "<|video_pad|>", "vision_start_token": "<|vision_start|>", "vision_end_token": "<|vision_end|>"},
    {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    },
    {"patch_size": 4, "size": {"shortest_edge": 1024, "longest_edge": 1024}},  # pixels of a picture,
)
_ARCHITECTURES = {
    "llava": _Pictures(
        "CLIPImageProcessor",
        "<image>",
        ids={"image_token_id": "<image>", "image_token_index": "<image>"},
        sizes={"size": _SIDE, "do_center_crop": False},
        options={"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
    ),
    "llava_onevision": _Pictures(
        "LlavaOnevisionImageProcessor",
        "<image>",
        more={"video_token": "<video>"},
        ids={"image_token_id": "<image>", "image_token_index": "<image>", "video_token_id": "<video>",
             "video_token_index": "<video>"},
        sizes={"size": _SIDE, "image_grid_pinpoints": [[16, 16], [16, 32]]},
        options={"num_image_tokens": 16, "vision_feature_select_strategy": "full"},
    ),
    "qwen2_vl": _QWEN,
    "qwen2_5_vl": _QWEN,
    "qwen3_vl": _QWEN,
    "qwen3_vl_moe": _QWEN,
    "idefics3": _Pictures(
        "Idefics3ImageProcessor",
        "<image>",
        more={"fake_image_token": "<fake_token_around_image>", "global_image_token": "<global-img>",
              "end_of_utterance_token": "<end_of_utterance>"},
        ids={"image_token_id": "<image>"},
        sizes={"size": {"longest_edge": 16}, "max_image_size": {"longest_edge": 16}},
        options={"image_seq_len": 4},
    ),
    "internvl": _Pictures(
        "GotOcr2ImageProcessor",
        "<IMG_CONTEXT>",
        more={"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
              "video_token": "<video>"},
        ids={"image_token_id": "<IMG_CONTEXT>"},
        sizes={"size": _SIDE, "max_patches": 2},
        options={"image_seq_length": 4},
    ),
    "gemma3": _Pictures(
        "Gemma3ImageProcessor",
        "<image_soft_token>",
        "<start_of_image>",
        {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"},
        {"image_token_id": "<image_soft_token>", "image_token_index": "<image_soft_token>",
         "boi_token_index": "<start_of_image>", "eoi_token_index": "<end_of_image>"},
        sizes={"size": _SIDE, "image_seq_length": 4},
        options={"image_seq_length": 4},
    ),
    "mistral3": _Pictures(
        "PixtralImageProcessor",
        "[IMG]",
        more={"image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]"},
        ids={"image_token_id": "[IMG]", "image_token_index": "[IMG]"},
        sizes={"size": {"longest_edge": 16}, "patch_size": {"height": 4, "width": 4}},
        options={"patch_size": 4, "spatial_merge_size": 2},
    ),
}  # fmt: skip


def make_tokenizer(config: PreTrainedConfig, sentences: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level tokenizer, with the special tokens and a chat template for this architecture.

    Raises:
        BackboneError: the architecture takes pictures, and how its processor is made is not known here.
    """
    pictures = _pictures(config)
    own = [pictures.token, *pictures.more.values()] if pictures else []
    special = [*dict.fromkeys([_PAD, _BEGIN, "<|im_start|>", _END, *own])]
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=_SIZE, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(sentences, trainer)
    result = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token=_PAD, bos_token=_BEGIN, eos_token=_END,
        extra_special_tokens=pictures.more if pictures else {},
    )  # fmt: skip
    result.chat_template = _CHAT.replace("IMAGE", (pictures.text or pictures.token) if pictures else "")
    return result


def make_processor(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerFast) -> Any:
    """Make the architecture's own processor of small pictures.

    The tokenizer is returned where the architecture takes none, or where its processor needs a package that is not
    installed.

    Raises:
        BackboneError: how the architecture's processor is made is not known here.
    """
    if (pictures := _pictures(config)) is None:
        return tokenizer
    if (kind := processor_class(config.model_type)) is None:
        return tokenizer
    image = getattr(transformers, pictures.image)(**pictures.sizes)
    return kind(image, tokenizer, chat_template=tokenizer.chat_template, **pictures.options)


def special_ids(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    """Return the numbers of the special tokens, by the names that configurations give them."""
    pictures = _pictures(config)
    names = {"pad_token_id": _PAD, "bos_token_id": _BEGIN, "eos_token_id": _END} | (pictures.ids if pictures else {})
    numbers = tokenizer.get_vocab()
    return {name: numbers[token] for name, token in names.items()}


def _pictures(config: PreTrainedConfig) -> _Pictures | None:
    if config.get_text_config(decoder=True) is config:
        return None
    if config.model_type not in _ARCHITECTURES:
        raise BackboneError(
            f"--smoke: how the processor of {config.model_type} is made offline is not known; expected a language "
            f"model, or one of {', '.join(_ARCHITECTURES)}: train a few steps of the model itself instead, with "
            "trainer.steps=4 tracking.wandb=disabled"
        )
    return _ARCHITECTURES[config.model_type]
