"""One forward pass as routing sees it: its tokens, prompt, cache and decisions, read from the call's inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from adaskip.backbone.inspect import Tokens
from adaskip.batch import IGNORED
from adaskip.errors import DataError
from adaskip.plan import Flags, Target
from adaskip.runtime.attentions import WeightRecord
from adaskip.runtime.cache import SkipCache
from adaskip.runtime.noise import Noise
from adaskip.runtime.options import Mode, Options
from adaskip.runtime.segment import Segment

_TAKEN = "_adaskip_taken"


@dataclass(eq=False)
class Request:
    """Hold everything that one forward pass knows beside the hidden states."""

    mode: Mode
    tokens: Tokens
    prompt: Tensor  # bool (b t): real tokens that stand before the first supervised or generated one
    options: Options
    cache: SkipCache | None = None
    scratch: SkipCache | None = None  # where kept keys meet the queries of an uncached request
    routed: Tensor | None = None  # bool (b t): the tokens that decisions speak of; None: every real one
    routes: bool | None = None  # whether there are any, where that is known without a look at the device
    answering: bool = False  # whether the whole chunk stands behind the prompt
    fixed: Tensor | None = None  # bool (s b), scope token (s b t): decisions made beforehand
    deciding: Tensor | None = None  # bool (b t), scope token: whose decisions they are
    flags: tuple[Flags, ...] | None = None  # the same on the host: of each site, of each row
    keep: list[Tensor] = field(default_factory=list)  # bool (b) each, scope token (b t)
    logits: list[Tensor] = field(default_factory=list)  # float32, likewise
    gates: list[Tensor] = field(default_factory=list)  # float32 (b) each
    threshold: float = 0.0  # of the routers, and the layers that run whatever they say, as this request began
    held: tuple[int, ...] = ()
    learns: bool = field(default_factory=torch.is_grad_enabled)  # whether gradients are to come
    rerun: Request | None = None  # what a layer follows that runs again for its gradient
    drawn: dict[int, Tensor] = field(default_factory=dict)  # where the noise stood as each site was decided
    decisions: dict[int, Any] = field(default_factory=dict)  # of each site
    part: Segment | None = None  # what runs the layer that the policy looks into; None: the whole chunk
    entered: dict[int, Tensor] = field(default_factory=dict)  # (b t d) by layer, where the policy changes results
    weights: WeightRecord | None = None  # of the attentions, where the caller asks for them
    seen: list[Tensor] = field(default_factory=list)  # (p n) a call of the tower: what its class token attends to
    notes: dict[str, Any] = field(default_factory=dict)  # what the runtime asks a policy once
    cut: dict[Any, Any] = field(default_factory=dict)  # the runtime's: what earlier layers cut for their parts
    memo: dict[Any, Any] = field(default_factory=dict)  # the policy's notes

    @property
    def offset(self) -> int:
        """Return the number of positions of the sequence before this chunk."""
        return self.cache.length if self.cache is not None else 0

    @property
    def has_routed(self) -> bool:
        """Return whether decisions speak of any token of this chunk."""
        if self.routes is None:
            self.routes = self.routed is None or bool(self.routed.any())
        return self.routes

    @property
    def tower(self) -> Sequence[Tensor]:
        """Return what the vision tower's class token attends to, (p n) a call; some generate before the first pass."""
        return self.seen or self.options.tower or ()

    def noise(self, index: int) -> Noise | None:
        """Return what a site's gates are drawn from: where its layer runs again, a source that gives the same draws."""
        source = self.options.noise
        if source is None:
            return None
        if index not in self.drawn:
            self.drawn[index] = source.get_state()
            return source
        return source.at(self.drawn[index])


def read_cache(cache: Any, mode: Mode, use: bool) -> bool:
    """Return whether this call is to leave a cache, and refuse one that cannot hold what it leaves.

    Args:
        cache: the caller's, if any.
        mode: how the pass runs.
        use: whether a new cache is to be made where there is none.

    Raises:
        DataError: a cache that cannot hold what a routed request leaves, or already holds something else.
    """
    if isinstance(cache, SkipCache):
        if mode == "soft" and cache.length:
            raise DataError("training mode reads whole sequences; expected no cache, got one that already holds tokens")
        return mode == "skip"
    if cache is not None and (type(cache) is not DynamicCache or cache.offloading):
        kind = "an offloaded DynamicCache" if type(cache) is DynamicCache else f"a {type(cache).__name__}"
        raise DataError(f"past_key_values: {kind} cannot hold skipped layers; leave it out")
    if cache is not None and cache.get_seq_length():
        raise DataError(
            "past_key_values: expected an adaskip cache or an empty DynamicCache, got a DynamicCache "
            f"holding {cache.get_seq_length()} tokens; start from the prompt without a cache"
        )
    if mode != "skip":
        return False
    if getattr(cache, _TAKEN, False):
        raise DataError(
            "past_key_values: this DynamicCache was replaced when it was first given, and holds nothing; go on "
            "with the cache in the model's output (outputs.past_key_values), or begin with a new one"
        )
    if cache is not None:
        setattr(cache, _TAKEN, True)
    return cache is not None or bool(use)


def embedded_ids(options: Options, inputs: dict[str, Any]) -> Tensor | None:
    """Return long (b t): the ids given to ``generate`` beside its prompt's ``inputs_embeds``; None without them."""
    ids, states = options.prompt_ids, inputs.get("inputs_embeds")
    if ids is None or states is None or ids.shape[1:] != states.shape[1:2] or len(states) % len(ids):
        return None
    return ids.repeat_interleave(len(states) // len(ids), 0)  # rows are repeated for beams and samples


def read_prompt(tokens: Tokens, inputs: dict[str, Any], mask: Tensor | None, length: int | None) -> Tensor:
    """Return what routers may look at, bool (b t): by a mask, a length, or the first label that is not -100."""
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
    supervised = (labels != IGNORED).cumsum(1) > 0
    prompt: Tensor = tokens.valid & ~supervised
    return prompt


def read_answering(tokens: Tokens, offset: int, length: int | None) -> Tensor:
    """Return which tokens of a chunk that goes on from a cache are still prompt, bool (b t).

    Args:
        tokens: of the chunk.
        offset: cached positions before it.
        length: of the prompt, where that is known.
    """
    if length is None or length <= offset:
        return torch.zeros_like(tokens.valid)
    return tokens.valid & (torch.arange(tokens.valid.shape[1], device=tokens.valid.device) + offset < length)


def find_routed(target: Target, tokens: Tokens, prompt: Tensor) -> Tensor | None:
    """Return bool (b t): the tokens that decisions speak of; None: every real one.

    group all     phase both      prompt prompt prompt answer answer
                                  routed routed routed routed routed
                  phase prefill   routed routed routed   -      -
                  phase decode      -      -      -    routed routed
    group vision  phase both        -    vision   -      -      -
    """
    if target.group == "vision":
        return tokens.vision
    if target.phase == "both":
        return None
    return prompt if target.phase == "prefill" else tokens.valid & ~prompt


def read_routed(request: Request, target: Target, started: bool) -> None:
    """Note which tokens of the chunk decisions speak of, and whether there are any where no look is needed to tell.

    Args:
        request: its ``prompt`` says where the answer begins.
        target: of the policy.
        started: whether the chunk goes on from a cache.
    """
    length, batch_tokens = request.options.prompt_length, request.tokens.valid.shape[1]
    begins = request.offset >= length if length is not None else True
    request.answering = started and begins
    request.routed = find_routed(target, request.tokens, request.prompt)
    if target.phase == "both" or target.group == "vision":
        return
    # generate says how long the prompt is, so a chunk of one kind needs no look at the device
    prompt_only = not started and request.options.prompt_mask is None and length is not None and batch_tokens <= length
    if prompt_only or request.answering:
        request.routes = request.answering == (target.phase == "decode")
        request.routed = None if request.routes else request.routed


def check_unpacked(tokens: Tokens, inputs: dict[str, Any]) -> None:
    """Refuse a row that holds several prompts one after the other: the routers would decide once for all of them.

    Raises:
        DataError: positions start again within a row, or lengths or numbers of several sequences came with it, as some
            collators give them, in the mask too.
    """
    rows, length = tokens.valid.shape
    lengths, numbers, mask = (inputs.get(name) for name in ("cu_seq_lens_q", "seq_idx", "attention_mask"))
    if (
        (isinstance(lengths, Tensor) and lengths.numel() - 1 > rows)
        or (isinstance(numbers, Tensor) and bool((numbers[:, 1:] != numbers[:, :-1]).any()))
        or (isinstance(mask, Tensor) and bool((mask > 1).any()))
        or (length > 1 and _starts_again(tokens.valid, inputs))
    ):
        raise DataError(
            "position_ids: expected one prompt a row, got several packed into one, for which scope 'prompt' would "
            "decide only once; give every prompt a row of its own, or attach with RouterConfig(scope='token')"
        )


def _starts_again(valid: Tensor, inputs: dict[str, Any]) -> bool:
    """Return whether the positions of some row's real tokens go back; those of padding mean nothing."""
    places = inputs.get("position_ids")
    if isinstance(places, Tensor) and places.dim() == 3 and len(places) == 4:  # text's, before three of a rotary kind
        places = places[0]
    if not isinstance(places, Tensor) or places.dim() > 2 or places.shape[-1] != valid.shape[1]:
        return False  # rotary positions of pictures stand still and go back within one prompt
    places = torch.where(valid, places.to(valid.device), -1)
    before, after = places.cummax(1).values[:, :-1], places[:, 1:]
    apart = after <= before
    if inputs.get("attention_mask") is None and inputs.get("past_key_values") is None:
        apart |= after > before + 1  # without a mask or a cache transformers takes a gap for another sequence too
    return bool((apart & (before >= 0) & valid[:, 1:]).any())
