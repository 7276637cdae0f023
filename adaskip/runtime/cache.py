"""A KV cache that holds, per layer, exactly what ran there: ragged over rows and tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from adaskip.plan import Routing
from adaskip.runtime.cost import Ledger
from adaskip.runtime.segment import Segment


class SkipLayer(DynamicLayer):
    """Keys and values of what ran one layer.

    ``rows`` (None: every row) names the batch rows stored; ``index`` (None: slot i is position i) gives the place of
    each slot in the sequence, -1 for a hole. A layer that nothing skipped is a plain `DynamicLayer`.
    """

    keys: Tensor
    values: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.rows: Tensor | None = None
        self.index: Tensor | None = None
        self._segment: Segment | None = None
        self._fresh: list[tuple[Segment, Tensor, Tensor]] = []

    @property
    def filled(self) -> bool:
        """Whether anything has run here."""
        return bool(self.is_initialized) and self.keys.numel() > 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Called by the attention: all keys and values this segment's queries may see."""
        if self._segment is None:
            return super().update(key_states, value_states, *args, **kwargs)
        self._fresh.append((self._segment, key_states, value_states))
        if not self.filled:
            return key_states, value_states
        stored = self._stored_rows(self._segment.rows)
        past_keys = self.keys if stored is None else self.keys[stored]
        past_values = self.values if stored is None else self.values[stored]
        return torch.cat([past_keys, key_states], -2), torch.cat([past_values, value_states], -2)

    def begin(self, segment: Segment, positions: Tensor) -> Tensor:
        """Announce the segment whose attention comes next; long (r k): the place of every key it will see."""
        self._segment = segment
        if not self.filled:
            return positions
        stored = self._stored_rows(segment.rows)
        past = self._places()
        return torch.cat([past if stored is None else past[stored], positions], -1)

    def commit(self, offset: int, length: int, batch: int) -> None:
        """Store what the segments since the last commit have computed."""
        fresh, self._fresh, self._segment = self._fresh, [], None
        if not fresh:
            return
        dense = len(fresh) == 1 and self.follows_on(fresh[0][0], offset)
        placed = [(s, s.positions(offset, length, batch, k.device), k, v) for s, k, v in fresh]
        rows, index, keys, values = _merge(placed, batch)
        if self.filled:
            index = index if dense else torch.cat([self._places(), index], -1)
            keys, values = torch.cat([self.keys, keys], -2), torch.cat([self.values, values], -2)
        else:
            self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values
        self.rows = None if rows is None or len(rows) == batch else rows
        self.index = None if dense else index

    def follows_on(self, segment: Segment, offset: int) -> bool:
        """Whether, with this segment, slot i still is position i: no key was left out, so no mask need be cut."""
        stored = self.keys.shape[-2] if self.filled else 0
        return segment.tokens is None and self.index is None and stored == offset

    def select(self, rows: Tensor, batch: int) -> None:
        """Make row i what row ``rows[i]`` was (repeats allowed)."""
        if not self.filled:
            return
        rows = rows.to(self.keys.device)
        if self.rows is not None:
            slot = torch.full((batch,), -1, device=self.keys.device)
            slot[self.rows] = torch.arange(len(self.rows), device=slot.device)
            picked = slot[rows]
            self.rows = (picked >= 0).nonzero().squeeze(1)
            rows = picked[self.rows]
        self.keys, self.values = self.keys[rows], self.values[rows]
        self.index = None if self.index is None else self.index[rows]

    def truncate(self, length: int) -> None:
        """Forget every position from ``length`` on."""
        if not self.filled:
            return
        places = self._places()
        places = torch.where(places < length, places, -1)
        used = (places >= 0).any(0)
        self.keys, self.values = self.keys[:, :, used], self.values[:, :, used]
        self.index = None if self.index is None else places[:, used]

    def nbytes(self) -> int:
        """Bytes of the keys and values of real slots, holes left out."""
        if not self.filled:
            return 0
        slots = self.keys.shape[0] * self.keys.shape[-2] if self.index is None else int((self.index >= 0).sum())
        per_slot = sum(int(x.shape[1] * x.shape[-1] * x.element_size()) for x in (self.keys, self.values))
        return slots * per_slot

    def _places(self) -> Tensor:
        if self.index is not None:
            return self.index
        return torch.arange(self.keys.shape[-2], device=self.keys.device).expand(self.keys.shape[0], -1)

    def _stored_rows(self, rows: Tensor | None) -> Tensor | None:
        if rows is None or (self.rows is not None and len(rows) == len(self.rows)):
            return None
        return rows if self.rows is None else torch.searchsorted(self.rows, rows)


def _merge(
    placed: list[tuple[Segment, Tensor, Tensor, Tensor]], batch: int
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """One block out of segments; several share out the whole batch and are made equally long by holes on the left."""
    if len(placed) == 1:
        segment, index, keys, values = placed[0]
        return segment.rows, index, keys, values
    width = max(index.shape[1] for _, index, _, _ in placed)
    _, index, keys, values = placed[0]
    index = index.new_full((batch, width), -1)
    keys, values = (x.new_zeros(batch, x.shape[1], width, x.shape[-1]) for x in (keys, values))
    for segment, places, new_keys, new_values in placed:
        start = width - places.shape[1]
        index[segment.rows, start:] = places
        keys[segment.rows, :, start:] = new_keys
        values[segment.rows, :, start:] = new_values
    return None, index, keys, values


class SkipCache(Cache):
    """A request's cache: its layers, its length, and the routing that every later token follows.

    The sequence length is counted here, never read from a layer, since any layer may be empty.
    """

    layers: list[SkipLayer]  # type: ignore[assignment]

    def __init__(self, n_layers: int) -> None:
        super().__init__(layers=[SkipLayer() for _ in range(n_layers)])
        self.length = 0
        self.batch = 0
        self.routing: Routing | None = None
        self.ledger: Ledger | None = None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions seen so far, whichever layers they ran."""
        return self.length

    def get_mask_sizes(self, query_length: int | Tensor, layer_idx: int = 0) -> tuple[int, int]:
        """The model builds its masks for the whole sequence; each layer takes the part it holds."""
        new = query_length if isinstance(query_length, int) else len(query_length)
        return self.length + new, 0

    @property
    def is_initialized(self) -> bool:
        """Whether the request has begun; models ask this to tell the prompt from what follows."""
        return self.length > 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """No maximum."""
        return -1

    def commit(self, layer: int, chunk: int, batch: int) -> None:
        """Store what the segments of one layer have computed for this chunk."""
        self.layers[layer].commit(self.length, chunk, batch)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row ``beam_idx[i]`` was, routing included."""
        for layer in self.layers:
            layer.select(beam_idx, self.batch)
        if self.routing is not None and self.ledger is not None:
            self.routing = self.routing.select(beam_idx.to(self.routing.keep.device))
            self.ledger.select(beam_idx)
        self.batch = len(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self.reorder_cache(torch.arange(self.batch).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` positions (a number <= 0)."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop: expected a number <= 0 of tokens to remove, got {tokens_to_remove}")
        self.length += tokens_to_remove
        for layer in self.layers:
            layer.truncate(self.length)

    def reset(self) -> None:
        """Forget the request."""
        self.__init__(len(self.layers))  # type: ignore[misc]

    def nbytes(self) -> int:
        """Bytes of the keys and values that are really held."""
        return sum(layer.nbytes() for layer in self.layers)
