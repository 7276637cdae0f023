"""Attention weights of a routed pass: one entry a layer in full shape, whatever part of the batch ran it.

transformers collects one entry for every call of an attention. A routed layer may be called on a part of the batch, on
several, or not at all, so what it collects would have other shapes and numbers than the dense model's. Here each call's
weights are put where its queries and keys stand, and what nothing ran is 0.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from adaskip.backbone.probe import ROWS, TOKENS, dense_pass, in_this_thread
from adaskip.errors import ConfigError
from adaskip.runtime.segment import Segment


@dataclass(frozen=True)
class Source:
    """Name the module that returns a layer's attention weights, and where among what it returns."""

    module: nn.Module = field(repr=False)  # the innermost one that returns them
    place: int  # where in what it returns
    heads: int
    dtype: torch.dtype
    outputs: int = 0  # what the layer returns along with them: a tensor (0), or a tuple of this many


def asks(inputs: dict[str, Any], name: str, configs: Sequence[PreTrainedConfig]) -> bool:
    """Return whether a call asks for an output by this name, or leaves that to a configuration which does."""
    choice = inputs.get(name)
    return bool(choice) if choice is not None else any(getattr(config, name, False) for config in configs)


def find_sources(model: PreTrainedModel, layers: Sequence[nn.Module]) -> tuple[Source, ...]:
    """Find where each layer's weights come from in one tiny dense pass; empty if the model's kernel gives none.

    Raises:
        ConfigError: the model's entries are not one a layer, of shape (batch, heads, queries, keys).
    """
    returned: list[tuple[Tensor, nn.Module, int]] = []  # innermost first, as modules return

    # An entry of the output is the very tensor that some module inside a layer returned: which one, hooks tell.
    def watch(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        if isinstance(out, tuple):
            returned.extend((value, module, place) for place, value in enumerate(out) if isinstance(value, Tensor))

    counts: dict[nn.Module, int] = {}

    def count(layer: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        counts[layer] = len(out) if isinstance(out, tuple) else 0

    handles = [layer.register_forward_hook(in_this_thread(count)) for layer in layers]
    watching = in_this_thread(watch)
    handles += [module.register_forward_hook(watching) for layer in layers for module in layer.modules()]
    try:
        entries = dense_pass(model, output_attentions=True, return_dict=True).get("attentions") or ()
    finally:
        for handle in handles:
            handle.remove()
    if all(entry is None for entry in entries):
        return ()
    sources = [_source(entry, returned) for entry in entries]
    if len(sources) != len(layers) or None in sources:
        raise ConfigError(
            f"output_attentions: {type(model).__name__} does not return one entry a layer of shape (batch, heads, "
            "queries, keys), so entries cannot be put together where layers are skipped; leave it out, or ask inside "
            "model.dense()"
        )
    return tuple(
        replace(source, outputs=counts[layer])
        for source, layer in zip(sources, layers, strict=True)
        if source is not None
    )


def _source(entry: Any, returned: list[tuple[Tensor, nn.Module, int]]) -> Source | None:
    """Return which module returned this very tensor; None if none did, or if its shape is no attention's."""
    if not isinstance(entry, Tensor) or entry.dim() != 4 or entry.shape[::2] != (ROWS, TOKENS):
        return None
    return next(
        (Source(module, place, entry.shape[1], entry.dtype) for value, module, place in returned if value is entry),
        None,
    )


class WeightRecord:
    """Put the attention weights of one pass together from the parts of the batch that ran.

    Args:
        sources: where each layer's weights come from.
        batch: rows of the batch.
        past: positions before this chunk.
        length: positions of this chunk.
        as_tuple: whether the caller expects the model's output as a plain tuple.
    """

    def __init__(self, sources: tuple[Source, ...], batch: int, past: int, length: int, as_tuple: bool) -> None:
        self.sources, self.batch, self.past, self.length, self.as_tuple = sources, batch, past, length, as_tuple
        self.part: tuple[Segment, Tensor, Tensor | None] | None = None
        self._entries: dict[int, Tensor] = {}
        self._handles: list[Any] = []

    def watch(self, patched: Collection[nn.Module], under_way: Callable[[], bool]) -> None:
        """Hook the sources that are not ``patched``; ``under_way`` tells whether a call belongs to this pass."""

        def hook(index: int) -> Callable[..., None]:
            def note(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
                if under_way():
                    self._note(index, out)

            return note

        self._handles = [
            source.module.register_forward_hook(hook(index))
            for index, source in enumerate(self.sources)
            if source.module not in patched
        ]

    def listen(self, index: int, module: nn.Module, call: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap the call of a patched module, whose own hooks see the whole batch and not the parts that ran."""
        if self.sources[index].module is not module:
            return call

        def listening(*args: Any, **kwargs: Any) -> Any:
            out = call(*args, **kwargs)
            self._note(index, out)
            return out

        return listening

    def _note(self, index: int, out: Any) -> None:
        """Put the weights (r h n m) of one call at the rows r, queries n and keys m that it was about.

        row 0 ran positions 2 3 of a chunk 0 1 2 3; the entry's row 0 is then, by queries q and keys k,

            k   0 1 2 3
            q 0 . . . .     . = 0: that query did not run, or that key was not there
              1 . . . .
              2 . . w .
              3 . . w w
        """
        weights, part = out[self.sources[index].place], self.part
        if part is None:  # the whole batch ran at once
            self._entries[index] = weights
            return
        segment, queries, keys = part  # places in the whole sequence, -1 where a row has fewer
        rows = torch.arange(self.batch, device=weights.device) if segment.rows is None else segment.rows
        if keys is None:
            keys = torch.arange(weights.shape[-1], device=weights.device).expand(len(rows), -1)
        real = rearrange(queries >= 0, "r n -> r n 1") & rearrange(keys >= 0, "r m -> r 1 m")
        row, query, key = torch.broadcast_tensors(
            rearrange(rows, "r -> r 1 1"),
            rearrange(queries - self.past, "r n -> r n 1"),  # an entry's queries are those of this chunk
            rearrange(keys, "r m -> r 1 m"),
        )
        if index not in self._entries:
            self._entries[index] = self._nothing(index, weights.dtype, weights.device)
        into = rearrange(self._entries[index], "b h q k -> b q k h")  # a view: what is written to it is in the entry
        into[row[real], query[real], key[real]] = rearrange(weights, "r h n m -> r n m h")[real]

    def _nothing(self, index: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return a layer's entry (b h q k) as it is where nothing ran."""
        shape = (self.batch, self.sources[index].heads, self.length, self.past + self.length)
        return torch.zeros(shape, dtype=dtype, device=device)

    def complete(self, output: Any) -> Any:
        """Return the model's output with one entry a layer, (b h q k), or None if it failed; stop watching."""
        for handle in self._handles:
            handle.remove()
        if output is None:
            return None
        if output.get("attentions") is not None:
            device = output[0].device
            dtypes = [entry.dtype for entry in self._entries.values()]  # autocast may have changed it
            output["attentions"] = tuple(
                self._entries[index]
                if index in self._entries
                else self._nothing(index, dtypes[0] if dtypes else source.dtype, device)
                for index, source in enumerate(self.sources)
            )
        return output.to_tuple() if self.as_tuple else output
