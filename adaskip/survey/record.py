"""Record one pass of a batch, and rerun its suffix with other decisions: the experiment that every survey repeats.

                 layer 0         layer 1         layer 2         layer 3
    record:   s0 ───────▶ s1 ───────────▶ s2 ───────────▶ s3 ───────────▶ s4 ──▶ logits

    rerun, layer 2 left out:
              s0          s1              s2 ─ ─ ─ ─ ─ ─▶ s2 ───────────▶ s4' ─▶ logits'

Layers before the first one that is decided otherwise hand out what they returned in the recorded pass, so that a rerun
costs the layers behind it only: all single layers of a model together cost about half as many passes as it has layers.
Kept of the logits are those that predict a supervised token, k of all rows together; the rest nobody reads.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from adaskip.backbone.inspect import Tokens
from adaskip.batch import Batch
from adaskip.errors import ConfigError
from adaskip.runtime.attach import RoutedModel
from adaskip.runtime.request import find_routed
from adaskip.survey.crossmodal import AttentionReading, read_attention
from adaskip.theory.costs import WIDE, Reference, predicted


@dataclass(frozen=True, eq=False)
class Recorded:
    """Hold one pass of one batch: its decisions, its logits, and the states between its layers."""

    model: RoutedModel
    batch: Batch
    tokens: Tokens  # which positions are real, and which are vision
    logits: Tensor  # (k v) at the predicted tokens, row by row
    keep: Tensor  # bool (s b) the decisions of the pass; all True where it was dense
    states: list[Tensor]  # l+1 of (b t d): what layer 0 got, then what every layer returned; none if not asked for
    entered: list[Tensor]  # l of (b t d): what every layer got; some models add to the states between two layers
    attention: AttentionReading | None  # of the text to vision, if asked for
    routed: bool = False  # whether the pass was one, with the adapters that the model may have

    @property
    def group(self) -> Tensor:
        """Return bool (b t): the tokens that leave a layer which is skipped."""
        return find_group(self.model, self.tokens, self.batch)

    def skipping(self, sites: Iterable[int]) -> Tensor:
        """Return the decisions bool (s b) of leaving out these sites, for every row, and no other."""
        keep = torch.ones_like(self.keep)
        keep[list(sites)] = False
        return keep

    def rerun(self, keep: Tensor) -> Tensor:
        """Run the batch under other decisions, from the first layer on that is decided otherwise -> (k v).

        Reruns of a routed pass have the adapters that the model may have, as it had; those of a dense one have none.

        Args:
            keep: bool (s b); of a model of scope ``token`` also (s b t).
        """
        recorded = self.keep[..., None] if keep.dim() > self.keep.dim() else self.keep
        different = (keep.to(self.keep.device) != recorded).flatten(1).any(1)
        first = self.model.sites.layer(int(different.long().argmax())) if different.any() else len(self.entered)
        # a dense pass has no adapters, and what is left out of one is priced without them
        with self.model.replay(self.states[: first + 1]), self.model.runtime.state.using(adapted=self.routed):
            return self._run(routing=keep)

    def rerun_dense(self, start: int, entry: Tensor | None = None) -> Tensor:
        """Run every layer from ``start`` on, whatever the decisions -> (k v). For what is changed inside a layer.

        Args:
            start: the first layer that runs.
            entry: (b t d) what the layer before it hands out instead of what it returned.

        Raises:
            ConfigError: an entry to layer 0, before which there is no layer.
        """
        states = self.states[: start + 1]
        if entry is not None:
            if not start:
                raise ConfigError("rerun_dense: expected a start of at least 1 with an entry, got 0")
            states[start] = entry
        with self.model.dense(), self.model.replay(states):
            return self._run()

    def compare(self, logits: Tensor) -> dict[str, Tensor]:
        """Return ``kl``, ``s`` and ``u`` of logits (k v) against the recorded ones, (b) each; see `costs.compare`."""
        return self._reference.compare(logits, self.batch.supervised)

    @cached_property
    def _reference(self) -> Reference:
        return Reference(self.logits)

    def match(self, logits: Tensor) -> Tensor:
        """Return bool (b): whether the argmax of logits (k v) is right at every predicted token of a row."""
        return match_predicted(logits, self.batch)

    def _run(self, **decisions: Tensor) -> Tensor:
        return _predict(self.model, self.batch, **decisions)


@torch.no_grad()
def record(
    model: RoutedModel, batch: Batch, *, routed: bool = False, states: bool = True, attention: bool = False
) -> Recorded:
    """Run a batch once, densely or as the routers decide, and keep what reruns need.

    Args:
        model: attached.
        batch: prompts with answers, on the model's device.
        routed: follow the routers or the plan; False: every layer runs.
        states: keep the states between the layers, l+1 of (b t d); without them reruns begin at layer 0.
        attention: also read how much the text attends to vision, in the same pass.
    """
    after: list[Tensor] = []
    entered: list[Tensor] = []

    def watch(layer: int, before: Tensor, result: Tensor) -> None:
        entered.append(before)
        after.append(result)

    tokens = model.read_tokens(batch.inputs)
    reading = read_attention(model, tokens) if attention else nullcontext()
    decided = nullcontext() if routed else model.dense()
    with decided, model.observe(watch) if states else nullcontext(), reading as text:
        logits = _predict(model, batch)
    if routed:
        keep = model.routing.keep
    else:
        keep = torch.ones(len(model.sites), len(batch), dtype=torch.bool, device=logits.device)
    return Recorded(model, batch, tokens, logits, keep, [*entered[:1], *after], entered, text, routed)


def _predict(model: RoutedModel, batch: Batch, **decisions: Tensor) -> Tensor:
    """Return the logits (k v) that predict a supervised token.

    A wide head reads nothing before the first of them: over prompts it would take more seconds than many a layer, and
    most of the memory.
    """
    supervised, config = batch.supervised, model.backbone.config.get_text_config(decoder=True)
    takes = "logits_to_keep" in inspect.signature(type(model.backbone).forward).parameters
    if not takes or config.vocab_size <= WIDE:
        return predicted(model(**batch.arguments(), **decisions).logits, supervised)
    first = int(supervised.any(0).long().argmax())
    last = supervised.shape[1] + 1 - first
    logits = model(**batch.arguments(), **decisions, logits_to_keep=last).logits
    return predicted(logits, supervised[:, first:])


def find_group(model: RoutedModel, tokens: Tokens, batch: Batch) -> Tensor:
    """Return bool (b t): the tokens that the routing of a model speaks of."""
    routed = find_routed(model.target, tokens, batch.prompt_mask & tokens.valid)
    return tokens.valid if routed is None else routed


def match_predicted(logits: Tensor, batch: Batch) -> Tensor:
    """Return bool (b) as `adaskip.batch.exact_match`, from the logits (k v) of the predicted tokens alone."""
    supervised = batch.supervised
    wrong = torch.zeros_like(supervised)
    return ~wrong.masked_scatter(supervised, logits.argmax(-1) != batch.labels[:, 1:][supervised]).any(1)
