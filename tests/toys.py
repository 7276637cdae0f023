"""Two-minute toys: tiny random models of real architectures, built from configurations, and batches for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

VOCABULARY, IMAGE, PAD = 96, 5, 0
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": None,
    # larger than usual, so that a random layer changes the logits enough for a mistake to show
    "initializer_range": 0.2,
}


def llama() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**TEXT))


def qwen2() -> PreTrainedModel:
    return Qwen2ForCausalLM(Qwen2Config(**TEXT))


def llava() -> PreTrainedModel:
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision, text_config=LlamaConfig(**TEXT), image_token_index=IMAGE, vision_feature_layer=-1
        )
    )


def qwen2_vl() -> PreTrainedModel:
    text = {**TEXT, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
    vision = {"depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": 32, "patch_size": 4, "mlp_ratio": 1}
    special = {"image_token_id": IMAGE, "video_token_id": 6, "vision_start_token_id": 7, "vision_end_token_id": 8}
    return Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision, **special))


@dataclass
class Toy:
    """A model and a maker of batches for it."""

    model: PreTrainedModel
    images: bool
    qwen: bool

    def batch(self, lengths: list[int], side: str = "left", seed: int = 0) -> dict[str, Tensor]:
        """One row per length (text tokens); rows of a vision-language model open with an image (4 tokens)."""
        draw = torch.Generator().manual_seed(seed)
        rows, patches = [], []
        for length in lengths:
            text = torch.randint(10, VOCABULARY, (length,), generator=draw)
            if self.images:
                head = [7] if self.qwen else [1]
                text = torch.cat([torch.tensor(head + [IMAGE] * 4), text])
                shape = (16, 3 * 2 * 4 * 4) if self.qwen else (1, 3, 16, 16)
                patches.append(torch.randn(shape, generator=draw))
            rows.append(text)
        width = max(len(row) for row in rows)
        batch = {
            "input_ids": torch.full((len(rows), width), PAD),
            "attention_mask": torch.zeros(len(rows), width).long(),
        }
        for i, row in enumerate(rows):
            place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
            batch["input_ids"][i, place] = row
            batch["attention_mask"][i, place] = 1
        if self.images:
            batch["pixel_values"] = torch.cat(patches)
            if self.qwen:
                batch["image_grid_thw"] = torch.tensor([[1, 4, 4]] * len(rows))
                batch["mm_token_type_ids"] = (batch["input_ids"] == IMAGE).long()
        return batch


MAKERS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": llama,
    "qwen2": qwen2,
    "llava": llava,
    "qwen2_vl": qwen2_vl,
}


def make(name: str, attention: str = "sdpa", seed: int = 0) -> Toy:
    """A fresh toy of the named family."""
    torch.manual_seed(seed)
    model = MAKERS[name]().eval()
    model.set_attn_implementation(attention)
    return Toy(model, images=name in ("llava", "qwen2_vl"), qwen=name == "qwen2_vl")
