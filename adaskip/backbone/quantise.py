"""Weights of 8 or 4 bits, made by bitsandbytes while a backbone is loaded."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, Literal

import torch
from transformers import BitsAndBytesConfig

from adaskip.errors import ConfigError


def quantisation(bits: Literal["8bit", "4bit"], dtype: str = "auto") -> Any:
    """Return what ``from_pretrained(quantization_config=...)`` takes; ``dtype`` is what 4 bits are computed in.

    Raises:
        ConfigError: bitsandbytes is missing.
    """
    if find_spec("bitsandbytes") is None or find_spec("accelerate") is None:
        raise ConfigError(
            f"backbone.quantise {bits}: needs bitsandbytes and accelerate; type: pip install 'adaskip[quantise]'"
        )
    if bits == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    computed = torch.float32 if dtype == "auto" else getattr(torch, dtype)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=computed)
