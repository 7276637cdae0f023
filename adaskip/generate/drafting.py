"""What lossless decoding needs, checked before it starts, and what came of its drafts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import SynthIDTextWatermarkingConfig

from adaskip.errors import BackboneError, ConfigError
from adaskip.generate.decoding import SINGLE
from adaskip.runtime.arguments import read_option
from adaskip.runtime.cost import CostModel

if TYPE_CHECKING:
    from adaskip.runtime.attach import RoutedModel


@dataclass(frozen=True)
class Drafting:
    """Hold what drafts of one ``generate(..., lossless=True)`` were worth. Counts are of passes, not of rows.

    Attributes:
        path: for each layer whether drafts ran it.
        tokens: generated, of the longest row.
        drafted: passes of the routed path, each of which drafts one token of every row.
        tried: drafted tokens that the dense model was asked about, up to the first one that some row refused.
        accepted: drafted tokens that all rows kept.
        verified: dense passes that verified a draft.
        plain: dense passes of one token, without a draft.
        prefill_s: seconds of reading the prompt.
        draft_s: seconds of drafts.
        verify_s: seconds of dense passes that verified.
        plain_s: seconds of the plain ones.
        executed: decoder FLOPs of all rows behind the prompt, drafts and refused tokens included.
        dense: decoder FLOPs of the same tokens, one by one through every layer.
    """

    path: tuple[bool, ...]
    tokens: int = 0
    drafted: int = 0
    tried: int = 0
    accepted: int = 0
    verified: int = 0
    plain: int = 0
    prefill_s: float = 0.0
    draft_s: float = 0.0
    verify_s: float = 0.0
    plain_s: float = 0.0
    executed: float = 0.0
    dense: float = 0.0

    @property
    def acceptance(self) -> float | None:
        """Return the share of tried tokens that were accepted; None where nothing was drafted."""
        return self.accepted / self.tried if self.tried else None

    @property
    def accepted_length(self) -> float | None:
        """Return the mean number of accepted tokens a verification; None where nothing was drafted."""
        return self.accepted / self.verified if self.verified else None

    @property
    def seconds(self) -> float:
        """Return the seconds of all passes."""
        return self.prefill_s + self.draft_s + self.verify_s + self.plain_s

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON-ready values."""
        figures = {"acceptance": self.acceptance, "accepted_length": self.accepted_length, "seconds": self.seconds}
        return asdict(self) | {"path": list(self.path)} | figures


@dataclass
class Passes:
    """Note the passes behind a prompt, to price them when the answer is done."""

    drafts: list[int] = field(default_factory=list)  # the place of each drafted token, counted from the prompt's end
    chunks: list[tuple[int, int]] = field(default_factory=list)  # the place of each dense pass, and its tokens

    def price(self, cost: CostModel, path: Tensor, prompts: Tensor, tokens: int) -> tuple[float, float]:
        """Return the decoder FLOPs of all passes, and of as many tokens one by one through every layer.

        Args:
            cost: the prices.
            path: bool (l), the layers that drafts ran.
            prompts: long (b), each row's real tokens.
            tokens: that ran behind each prompt and stayed in the cache.
        """

        def rows(places: Sequence[int], sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
            past = prompts.cpu()[:, None] + torch.tensor(places, dtype=torch.long)
            return torch.tensor(sizes, dtype=torch.long).expand_as(past).flatten(), past.flatten()

        new, past = rows(self.drafts, [1] * len(self.drafts))
        skipped = cost.skipped(torch.zeros_like(new), new, past, past)
        drafts = torch.where(path.cpu()[:, None], cost.chunk(new, past), skipped).sum()
        dense = cost.chunk(*rows(*zip(*self.chunks, strict=True))).sum() if self.chunks else torch.tensor(0.0)
        return float(drafts + dense), float(cost.chunk(*rows(range(tokens), [1] * tokens)).sum())


def check_lossless(model: RoutedModel, options: Mapping[str, Any], length: bool | int) -> None:
    """Refuse a model or options under which drafts would be unsound, or no drafts at all.

    Args:
        model: the routed model.
        options: of ``generate``, by name.
        length: True, or how many tokens to draft a round.

    Raises:
        ConfigError: what is asked for does not go with drafts; says what does.
        BackboneError: the model keeps no cache that a draft could go on from.
    """
    if type(length) not in (bool, int) or length < 1:
        raise ConfigError(
            f"generate: lossless: expected True, or a number of tokens to draft a round (at least 1), got {length!r}"
        )
    if model.runtime.mode == "dense":
        raise ConfigError("generate: lossless=True inside dense() has no path to draft along; leave one of them out")
    target = model.target
    if target.scope == "token":
        raise ConfigError(
            "generate: lossless=True drafts along one path a prompt, and under scope 'token' there is none; attach "
            "routers or a plan of scope 'prompt'"
        )
    if target.group == "vision" or target.phase == "prefill":
        raise ConfigError(
            f"generate: lossless=True: with group {target.group!r} and phase {target.phase!r} generated tokens run "
            "every layer, so a draft would cost what the dense model does; attach a policy of group 'all' and phase "
            "'both' or 'decode'"
        )
    if not model.runtime.caches:
        raise BackboneError(
            f"generate: lossless=True: {type(model.backbone).__name__} keeps no cache that a draft could go on from; "
            "call generate without it"
        )
    _check_options(model, options)


def _check_options(model: RoutedModel, options: Mapping[str, Any]) -> None:
    """Refuse options of ``generate`` that draft in another way, or ask for what verified passes do not have."""
    backbone = model.backbone
    other = [name for name in SINGLE if read_option(backbone, options, name)]
    other += [name for name in ("past_key_values", "custom_generate") if options.get(name) is not None]
    other += ["num_beams"] if read_option(backbone, options, "num_beams", 1) > 1 else []
    if other:
        raise ConfigError(
            f"generate: {', '.join(other)} does not go with lossless=True, which drafts by itself and decodes greedily "
            "or by sampling from the prompt on; leave one of them out"
        )
    if read_option(backbone, options, "use_cache") is False:
        raise ConfigError("generate: use_cache=False does not go with lossless=True: drafts go on from the dense cache")
    for name in ("output_attentions", "output_hidden_states"):
        if read_option(backbone, options, name):
            raise ConfigError(
                f"generate: {name} does not go with lossless=True: passes that verify hold several tokens, some of "
                "them refused; call generate inside model.dense()"
            )
    if isinstance(read_option(backbone, options, "watermarking_config"), SynthIDTextWatermarkingConfig):
        raise ConfigError(
            "generate: a SynthID watermark counts every token that it is shown, drafts too; leave lossless=True out"
        )
