"""Tiny routed models whose decisions differ from prompt to prompt, and a tokenizer of single characters."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import adaskip
from tests import toys

GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}


def spread(model: adaskip.RoutedModel, seed: int = 0) -> adaskip.RoutedModel:
    """Random routers whose decisions depend on the input."""
    draw = torch.Generator().manual_seed(seed)
    assert model.routers is not None
    with torch.no_grad():
        for weight in model.routers.parameters():
            weight.copy_(torch.randn(weight.shape, generator=draw) * (4.0 / max(1, weight.shape[-1]) ** 0.5))
    return model


def llama(seed: int = 0) -> PreTrainedModel:
    return toys.make("llama", seed=seed).model


def routed(seed: int = 0) -> adaskip.RoutedModel:
    """A llama of four layers under routers that skip."""
    return spread(adaskip.attach(llama(seed)))


def batch(*lengths: int) -> dict[str, Tensor]:
    """One row per length, padded on the left."""
    return toys.make("llama").batch(list(lengths or (5, 9)))


def answers(model: Any) -> Tensor:
    """Greedy answers to the two standard prompts."""
    return model.generate(**batch(), **GREEDY)


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a character; every id lies in the toys' vocabulary."""
    characters = "abcdefghijklmnopqrstuvwxyz0123456789 .,?!"
    ids = {token: number for number, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", *characters])}
    plain = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    plain.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=plain, unk_token="<unk>", pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
