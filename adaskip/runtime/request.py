"""What one forward pass knows beside its hidden states, and how a call's inputs tell it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from adaskip.backbone import Tokens
from adaskip.errors import DataError
from adaskip.plan import Flags
from adaskip.runtime.cache import SkipCache

Mode = Literal["dense", "soft", "skip"]


@dataclass
class Request:
    """Everything one forward pass knows beside the hidden states."""

    mode: Mode
    tokens: Tokens
    prompt: Tensor  # bool (b t): real tokens that stand before the first supervised or generated one
    cache: SkipCache | None = None
    scratch: SkipCache | None = None  # where kept keys meet the queries of an uncached request
    fixed: Tensor | None = None  # bool (l b), scope token (l b t): decisions made beforehand
    deciding: Tensor | None = None  # bool (b t), scope token: whose decisions they are
    flags: tuple[Flags, ...] | None = None  # the same on the host: of each layer, of each row
    keep: list[Tensor] = field(default_factory=list)  # bool (b) each, scope token (b t)
    logits: list[Tensor] = field(default_factory=list)  # float32, likewise
    gates: list[Tensor] = field(default_factory=list)  # float32 (b) each
    decision: Any = None  # of the layer under way, for its sublayers
    memo: dict[Any, Any] = field(default_factory=dict)

    @property
    def offset(self) -> int:
        """Positions of the sequence before this chunk."""
        return self.cache.length if self.cache is not None else 0

    @property
    def has_vision(self) -> bool:
        """Whether any row of this chunk holds a vision token."""
        if "vision" not in self.memo:
            self.memo["vision"] = self.tokens.has_vision
        return self.memo["vision"]


def read_prompt(tokens: Tokens, inputs: dict[str, Any], mask: Tensor | None, length: int | None) -> Tensor:
    """bool (b t): what routers may look at, by an explicit mask, a length, or the first label that is not -100."""
    if mask is not None:
        if mask.shape != tokens.valid.shape:
            raise DataError(
                f"prompt_mask: expected shape {tuple(tokens.valid.shape)} like input_ids, got {tuple(mask.shape)}"
            )
        return mask.to(tokens.valid) & tokens.valid
    if length is not None:
        return tokens.valid & (torch.arange(tokens.valid.shape[1], device=tokens.valid.device) < length)
    labels = inputs.get("labels")
    if labels is None:
        return tokens.valid
    supervised = (labels != -100).cumsum(1) > 0
    return tokens.valid & ~supervised
