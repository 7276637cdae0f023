"""What lossless decoding needs, checked before it starts, and what came of its drafts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from transformers import SynthIDTextWatermarkingConfig

from adaskip.errors import BackboneError, ConfigError
from adaskip.generate.decoding import SINGLE
from adaskip.runtime.arguments import read_option

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
