"""Facts about a model that may change while it is routed, such as its attention kernel: measured anew when they do."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from adaskip.backbone.inspect import BackboneSpec, count_head
from adaskip.backbone.probe import reads_ahead
from adaskip.errors import ConfigError
from adaskip.runtime.attentions import Source, asks, find_sources
from adaskip.runtime.options import Mode


class Facts:
    """Measure what depends on a model's attention kernel or vocabulary, which may change while routers are attached.

    Args:
        spec: what the model is made of.
        untouched: a context in which the attached model runs as it was.
    """

    def __init__(self, spec: BackboneSpec, untouched: Callable[[], AbstractContextManager[None]]) -> None:
        self._backbone, self._untouched = spec, untouched
        self.configs = spec.model.config, spec.config  # to look for the latter takes longer than to ask it
        self._tried_kernel = self._kernel
        self._head = self._vocabulary, spec.head
        self._ahead = {self._kernel: spec.reads_ahead}
        self._sources: dict[tuple[str, torch.dtype], tuple[Source, ...]] = {}

    @property
    def _kernel(self) -> str:
        return str(self.configs[1]._attn_implementation)

    @property
    def _vocabulary(self) -> tuple[int, ...]:
        weight = getattr(self._backbone.model.get_output_embeddings(), "weight", None)
        return tuple(weight.shape) if isinstance(weight, Tensor) else ()  # a packed head's weight is a method

    def head(self) -> float:
        """Return the FLOPs of the language-model head per position."""
        if self._head[0] != self._vocabulary:
            with self._untouched():
                self._head = self._vocabulary, count_head(self._backbone)
        return self._head[1]

    def reads_ahead(self) -> bool:
        """Return whether the model reads both ways what comes without ``token_type_ids``."""
        if self._kernel not in self._ahead:
            with self._untouched():
                self._ahead[self._kernel] = reads_ahead(self._backbone.model, self._backbone.layers)
        return self._ahead[self._kernel]

    def weight_sources(self) -> tuple[Source, ...]:
        """Find where each layer's attention weights come from; empty if the kernel gives none."""
        key = self._kernel, self._backbone.model.dtype
        if key not in self._sources:
            with self._untouched():
                self._sources[key] = find_sources(self._backbone.model, self._backbone.layers)
        return self._sources[key]

    def requested_sources(self, mode: Mode, inputs: dict[str, Any]) -> tuple[Source, ...]:
        """Return where attention weights come from; empty unless the caller asks for them and the kernel gives any.

        Raises:
            ConfigError: an output that a routed pass cannot give.
        """
        if mode == "dense":
            return ()
        if asks(inputs, "output_router_logits", self.configs):
            raise ConfigError(
                "output_router_logits: transformers collects one entry for every call of experts, which is not one a "
                "layer where layers are skipped; leave it out, or ask inside model.dense()"
            )
        if not asks(inputs, "output_attentions", self.configs):
            return ()
        if mode == "soft":
            raise ConfigError(
                "output_attentions: in training mode both branches of every layer are computed and mixed, so there is "
                "no one attention to return; leave it out, or call the model in eval()"
            )
        return self.weight_sources()

    def check_kernel(self) -> None:
        """Refuse single tokens in another kernel than the one in which they were tried.

        Raises:
            ConfigError: the attention implementation has changed.
        """
        if self._kernel != self._tried_kernel:
            raise ConfigError(
                "attention implementation: what single tokens get was tried with "
                f"{self._tried_kernel!r} when the model was attached to, and it has {self._kernel!r} now; "
                "call detach() and attach again"
            )
