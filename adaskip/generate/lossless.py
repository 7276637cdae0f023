"""Decode losslessly: the routed path drafts tokens, the dense model verifies several of them in one pass.

    text         a b c d            d is pending: its keys are not in the cache yet
    draft        d -> e'  e' -> f'  two routed passes, which attend to the dense keys of a b c
    rewind       a b c              what they wrote is dropped
    verify       d e' f'            one dense pass: the dense model's own e, f and g
    accept       e = e', f != f'    the text grows by e and f; g was predicted behind f' and means nothing
    rewind       a b c d e          f is pending

Transformers' own assisted generation takes one row, calls ``generate`` for each draft, stops within a draft at end
tokens alone, and would keep a second cache. Here ``generate`` prepares prompts, processors and stopping criteria, and
this loop decodes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList, StopStringCriteria
from transformers.generation.utils import GenerateDecoderOnlyOutput

from adaskip.errors import ConfigError
from adaskip.generate.accept import accept_greedily, accept_sampled
from adaskip.generate.drafting import Drafting, Passes, check_lossless
from adaskip.generate.pace import Pace
from adaskip.generate.shared import SharedCache, count_dense
from adaskip.runtime.arguments import name_arguments, read_option
from adaskip.runtime.timing import clock

if TYPE_CHECKING:
    from adaskip.runtime.attach import RoutedModel
    from adaskip.runtime.forward import Runtime

_PACES: WeakKeyDictionary[Runtime, dict[int, Pace]] = WeakKeyDictionary()
"""What is known of a model's drafts by batch size, so that an answer begins with what earlier ones have taught."""


def generate_lossless(model: RoutedModel, args: tuple[Any, ...], inputs: dict[str, Any], length: bool | int) -> Any:
    """Generate what the dense model would, faster where the routed path often agrees with it.

    The prompt is read once, by every layer; the policy decides meanwhile, from the dense states, which layers drafts
    leave out. Greedy tokens are the dense model's own, up to rounding: a pass of several tokens adds up in another
    order than a pass of one. Sampled tokens are other draws of the dense model's distribution (`accept_sampled`).

    In a batch every row drafts along the layers that any of them keeps, and a round ends at the first token that some
    row refuses; rows that have ended have no say. That is sound, as each token of each row is accepted or redrawn by
    itself and only the round's length depends on the others; it pays for few rows.

    Args:
        model: routed; scope ``prompt``, group ``all``, phase ``both`` or ``decode``.
        args: of ``generate``, by position.
        inputs: of ``generate``, by name. Logits processors are asked about drafts too, so one of your own must depend
            on the tokens that it is shown alone.
        length: True: drafts are as long as running acceptance and measured seconds say, and are left out where they do
            not pay, so draws depend on the machine's speed. A number: always so many, which a seed repeats.

    Returns:
        What ``generate`` returns. `RoutedModel.lossless` says what the drafts were worth; `RoutedModel.routing` has the
        policy's decisions, and counts the answer as what it is, the dense model's.

    Raises:
        ConfigError: a model or an option that does not go with drafts.
        BackboneError: the model keeps no cache.
    """
    backbone = model.backbone
    options = name_arguments(type(backbone).generate, args, inputs, "model.generate")  # type: ignore[attr-defined]
    check_lossless(model, options, length)
    decoder = Decoder(model, options.get("streamer"), None if length is True else int(length))
    # prompts run every layer, as the dense model does; adapters are the drafts' alone
    with model.runtime.state.using(target=replace(model.target, phase="decode"), adapted=False):
        return backbone.generate(**_with_stops(model, options), custom_generate=decoder)  # type: ignore[operator]


def _with_stops(model: RoutedModel, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options with stop strings as a criterion: ``generate`` hands a decoding of one's own no tokenizer."""
    strings = read_option(model.backbone, options, "stop_strings")
    if strings is None:
        return dict(options)
    if options.get("tokenizer") is None:
        raise ConfigError("generate: stop_strings need the tokenizer; pass tokenizer=processor.tokenizer, or your own")
    if options.get("stop_strings") is None:
        raise ConfigError(
            "generate: lossless=True takes stop strings from the call; pass stop_strings=[...], and set "
            "generation_config.stop_strings = None"
        )
    rest = {name: value for name, value in options.items() if name not in ("stop_strings", "tokenizer")}
    stop = StopStringCriteria(tokenizer=options["tokenizer"], stop_strings=strings)
    return rest | {"stopping_criteria": StoppingCriteriaList([*(options.get("stopping_criteria") or ()), stop])}


@dataclass
class _Text:
    """Hold the rows so far, and how their next tokens are chosen."""

    ids: Tensor  # long (b t)
    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    config: GenerationConfig
    unfinished: Tensor  # bool (b)
    scores: tuple[Tensor, ...] = ()  # float32 (b v) each, where asked for
    logits: tuple[Tensor, ...] = ()

    @property
    def fills(self) -> bool:
        """Return whether rows that have ended are filled up; where nothing but length ends a row, they go on."""
        return any(hasattr(criterion, "eos_token_id") for criterion in self.criteria)

    @property
    def room(self) -> int:
        """Return how many tokens may still come."""
        limit = self.criteria.max_length
        return 2**31 if limit is None else limit - self.ids.shape[1]

    def law(self, ids: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return raw and processed logits of the next token behind ``ids``, float32 (b v)."""
        raw = logits.to(copy=True, dtype=torch.float32, device=ids.device)
        return raw, self.processors(ids, raw)  # type: ignore[arg-type]

    def draft(self, ids: Tensor, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """Choose the drafter's token of each row, long (b); return it with the law it was drawn from."""
        _, scores = self.law(ids, logits)
        if not self.config.do_sample:
            return scores.argmax(-1), None
        law = scores.softmax(-1)
        return torch.multinomial(law, 1).squeeze(1), law

    def grow(self, logits: Tensor, drafted: Tensor | None, drafter: Tensor | None) -> bool:
        """Add the dense model's token to each row; return whether a row that goes on has refused the draft."""
        raw, scores = self.law(self.ids, logits)
        if self.config.return_dict_in_generate:
            self.scores += (scores,) if self.config.output_scores else ()
            self.logits += (raw,) if self.config.output_logits else ()
        if self.config.do_sample:
            tokens, refused = accept_sampled(scores.softmax(-1), drafted, drafter)
        else:
            tokens, refused = accept_greedily(scores, drafted)
        if self.fills:
            padding: Tensor = self.config._pad_token_tensor  # type: ignore[assignment]
            padding = padding.to(tokens)
            tokens, refused = torch.where(self.unfinished, tokens, padding), refused & self.unfinished
        self.ids = torch.cat([self.ids, tokens[:, None]], 1)
        self.unfinished = self.unfinished & ~self.criteria(self.ids, self.scores or None)
        return drafted is not None and bool(refused.any())

    def ends(self, tokens: Tensor) -> bool:
        """Return whether every row that goes on would end with these tokens."""
        ends = getattr(self.config, "_eos_token_tensor", None)
        return ends is not None and bool((torch.isin(tokens, ends.to(tokens)) | ~self.unfinished).all())


class Decoder:
    """Decode one batch in place of ``generate``'s own loop.

    Args:
        model: the routed model.
        streamer: hears every token that is final, or is None.
        length: tokens to draft each round; None: as many as pay.
    """

    def __init__(self, model: RoutedModel, streamer: Any, length: int | None) -> None:
        self.model, self.streamer, self.length = model, streamer, length
        self.begins = 0  # where the answer begins in the cache
        self.cache = SharedCache(len(model.spec.layers))
        self.figures, self.passes = Drafting(()), Passes()

    def __call__(
        self,
        backbone: Any,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **inputs: Any,
    ) -> Any:
        """Read the prompts, decode round by round, and return what ``generate`` returns."""
        begin, slot = clock(), self.model.runtime.state.here
        rows = torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
        text = _Text(input_ids, logits_processor, stopping_criteria, generation_config, rows)
        inputs = inputs | {"past_key_values": self.cache}
        prompt = backbone.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **inputs)
        output = backbone(**prompt, return_dict=True)
        inputs = backbone._update_model_kwargs_for_generation(output, inputs)
        decided, ledger, self.begins = self.cache.routing, self.cache.ledger, self.cache.length
        assert decided is not None
        assert ledger is not None
        path = decided.keep.any(1)
        self.cache.draft_along(path)
        self._grow(text, output.logits[:, -1])
        del output  # all of the prompt's logits, in models that compute them
        self.figures = Drafting(tuple(path.tolist()), prefill_s=clock() - begin)
        pace = _pace(self.model, len(input_ids), self.figures.path)
        while bool(text.unfinished.any()):
            inputs = self._round(text, inputs, pace)
        if self.streamer is not None:
            self.streamer.end()
        count = self.cache.length - self.begins
        real = sum((always | routed).sum(1) for always, routed in ledger.chunks)
        executed, dense = self.passes.price(self.model.runtime.cost, path, torch.as_tensor(real), count)
        self.figures = replace(self.figures, tokens=count + 1, executed=executed, dense=dense)
        count_dense(ledger, count)
        self.cache.ledger = ledger
        self.cache.note()
        slot.routing, slot.ledger, slot.drafting = decided, ledger, self.figures
        if not generation_config.return_dict_in_generate:
            return text.ids
        return GenerateDecoderOnlyOutput(
            sequences=text.ids,  # type: ignore[arg-type]
            scores=text.scores or None,  # type: ignore[arg-type]
            logits=text.logits or None,  # type: ignore[arg-type]
            past_key_values=self.cache.plain(),
        )

    def _round(self, text: _Text, inputs: dict[str, Any], pace: Pace) -> dict[str, Any]:
        """Draft, verify, and let the text grow; return the inputs of what comes next."""
        begin, held, room = clock(), self.cache.length, text.room - 1  # the dense model adds one token itself
        length = min(self.length, room) if self.length is not None else pace.choose(room)
        drafts: list[tuple[Tensor, Tensor | None]] = []
        place = held - self.begins
        ids, states = text.ids, [inputs]  # of the text with 0, 1, ... tokens more
        while len(drafts) < length and not all(self.figures.path) and not (drafts and text.ends(drafts[-1][0])):
            with self.model.runtime.state.using(adapted=True):
                logits, after = self._run(ids, states[-1], 1)
            drafts.append(text.draft(ids, logits[:, -1]))
            ids = torch.cat([ids, drafts[-1][0][:, None]], 1)
            states.append(after)
        self.cache.rewind(held)
        self.passes.drafts += range(place, place + len(drafts))
        self.passes.chunks.append((place, len(drafts) + 1))
        middle = clock()
        with self._dense():
            logits, after = self._run(ids, states[-1], len(drafts) + 1)
        self.cache.follow(len(drafts) + 1)
        states.append(after)
        tried = accepted = emitted = 0
        for number in range(len(drafts) + 1):
            drafted, drafter = drafts[number] if number < len(drafts) else (None, None)
            refused = self._grow(text, logits[:, number], drafted, drafter)
            emitted += 1
            tried += drafted is not None
            accepted += drafted is not None and not refused
            if refused or not bool(text.unfinished.any()):
                break
        self.cache.rewind(held + emitted)
        end = clock()
        pace.note(len(drafts), tried, accepted, emitted, middle - begin, end - middle)
        self._count(len(drafts), tried, accepted, middle - begin, end - middle)
        return states[emitted]

    def _run(self, ids: Tensor, inputs: dict[str, Any], count: int) -> tuple[Tensor, dict[str, Any]]:
        """Run the last ``count`` tokens; return their logits (b count v), and the inputs with one token more."""
        backbone: Any = self.model.backbone
        call = backbone.prepare_inputs_for_generation(ids, next_sequence_length=count, **inputs)
        if "logits_to_keep" in call:
            call["logits_to_keep"] = count
        output = backbone(**call, return_dict=True)
        return output.logits[:, -count:], backbone._update_model_kwargs_for_generation(output, dict(inputs))

    def _grow(self, text: _Text, logits: Tensor, drafted: Tensor | None = None, drafter: Tensor | None = None) -> bool:
        """Let the text grow by one token a row, and tell the streamer."""
        refused = text.grow(logits, drafted, drafter)
        if self.streamer is not None:
            self.streamer.put(text.ids[:, -1].cpu())
        return refused

    @contextmanager
    def _dense(self) -> Iterator[None]:
        """Run every layer inside, as the dense model does."""
        with self.model.runtime.state.using(mode="dense"):
            yield

    def _count(self, drafts: int, tried: int, accepted: int, draft_s: float, verify_s: float) -> None:
        """Add a round to the figures."""
        now = self.figures
        if not drafts:
            self.figures = replace(now, plain=now.plain + 1, plain_s=now.plain_s + draft_s + verify_s)
            return
        self.figures = replace(
            now,
            drafted=now.drafted + drafts,
            tried=now.tried + tried,
            accepted=now.accepted + accepted,
            verified=now.verified + 1,
            draft_s=now.draft_s + draft_s,
            verify_s=now.verify_s + verify_s,
        )


def _pace(model: RoutedModel, rows: int, path: tuple[bool, ...]) -> Pace:
    """Return what is known of drafts for so many rows."""
    paces = _PACES.setdefault(model.runtime, {})
    if rows not in paces:
        paces[rows] = Pace(sum(path) / len(path))
    return paces[rows]
