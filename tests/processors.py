"""Tokenizers of words and a picture processor, small, made on the spot: what stands around a prompt is set by hand."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

from tests import toys

WORDS = [*(f"w{i}" for i in range(80))]


def tokenizer(begin: str = "", end: str = "", **special: str | None) -> Any:
    """A tokenizer of w0 ... w79 that puts ``begin`` and ``end``, names of special tokens, around every text."""
    names: dict[str, Any] = {
        "pad_token": "<pad>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    } | special
    extra = ["<image>", "[gMASK]", "<sop>"]
    vocabulary = ["<pad>", "<s>", "</s>", "<unk>", "x", *extra, *WORDS]
    vocabulary.insert(toys.IMAGE, vocabulary.pop(vocabulary.index("<image>")))  # where the toy model looks for it
    ids = {word: i for i, word in enumerate(vocabulary)}
    inner = Tokenizer(models.WordLevel(ids, unk_token=names["unk_token"]))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    around = [*begin.split(), *end.split()]
    if around:
        inner.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A {end}".strip(), special_tokens=[(word, ids[word]) for word in around]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, additional_special_tokens=extra, **{k: v for k, v in names.items() if v is not None}
    )


def picture_processor(begin: str = "", end: str = "") -> Any:
    """A processor of 16 x 16 pictures, four tokens each, as the toy vision-language model takes them."""
    size = {"height": 16, "width": 16}
    pictures = CLIPImageProcessor(do_resize=True, size=size, do_center_crop=False)
    return LlavaProcessor(pictures, tokenizer(begin, end), patch_size=8, vision_feature_select_strategy="full")


CHAT = (
    "{{ bos_token }}{% for turn in messages %} {{ {'system': 'w72', 'user': 'w70', 'assistant': 'w71'}[turn.role] }}"
    "{% if turn.content is string %} {{ turn.content }}{% else %}{% for part in turn.content %} "
    "{{ '<image>' if part.type == 'image' else part.text }}{% endfor %}{% endif %}"
    "{% if turn.role == 'assistant' %} {{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %} w71{% endif %}"
)
"""A chat template: w70 opens a turn of the user, w71 one of the assistant, w72 the system's; an end token ends his."""
