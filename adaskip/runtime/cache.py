"""A KV cache that holds, per layer, exactly what ran there: ragged over rows and tokens.

What a layer holds after a prompt of 4 tokens, and after each of two more; its keys by row and slot, each slot with the
position it is of (. is a hole, which nothing attends to):

    row 1 skips           row 0  0 1 2 3    0 1 2 3 4    0 1 2 3 4 5     keys    (2 h k d): row 1 has no slots
                          row 2  0 1 2 3    0 1 2 3 4    0 1 2 3 4 5     rows 0 2, index None

    row 1 skips           row 0  0 1 2 3    0 1 2 3 4    0 1 2 3 4 5     keys    (3 h k d), filled up on the left
    positions 1 and 2     row 1  . . 0 3    . . 0 3 4    . . 0 3 4 5     rows    None
                          row 2  0 1 2 3    0 1 2 3 4    0 1 2 3 4 5     index   as drawn, with -1 for a hole
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from adaskip.errors import DataError
from adaskip.plan import Flags, Routing
from adaskip.runtime.cost import Ledger, Slots
from adaskip.runtime.segment import Memo, Segment, fill_left, once, put


class SkipLayer(DynamicLayer):
    """Hold keys and values of what ran one layer.

    ``rows`` (None: every row) names the batch rows stored; ``index`` (None: slot i is position i) gives the place of
    each slot in the sequence, -1 for a hole. A layer that nothing skipped is a plain `DynamicLayer`.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, every_row: bool = False) -> None:
        super().__init__()
        self.every_row = every_row  # rows run at different tokens: every row has its slots, some are holes
        self.rows: Tensor | None = None
        self.index: Tensor | None = None
        self._segment: Segment | None = None
        self._fresh: list[tuple[Segment, Tensor, Tensor]] = []
        self._union: tuple[Tensor, Tensor] | None = None  # stored and fresh ones, where the segment sees them all

    @property
    def filled(self) -> bool:
        """Return whether anything has run here."""
        return bool(self.is_initialized) and self.keys.numel() > 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return to the attention all keys and values that this segment's queries may see."""
        if self._segment is None:
            return super().update(key_states, value_states, *args, **kwargs)
        self._fresh.append((self._segment, key_states, value_states))
        if not self.filled:
            return key_states, value_states
        slots = self._slot_rows(self._segment.rows)
        if slots is None:
            self._union = torch.cat([self.keys, key_states], -2), torch.cat([self.values, value_states], -2)
            return self._union
        return torch.cat([self.keys[slots], key_states], -2), torch.cat([self.values[slots], value_states], -2)

    def begin(self, segment: Segment) -> None:
        """Announce the segment whose attention comes next."""
        self._segment = segment

    def key_places(self, segment: Segment, positions: Tensor, memo: Memo) -> Tensor:
        """Return the places of all keys that the segment, itself at ``positions``, attends to: long (r k)."""
        if not self.filled:
            return positions

        def join() -> Tensor:
            slots, past = self._slot_rows(segment.rows), self._places()
            return torch.cat([past if slots is None else past[slots], positions], -1)

        return once(memo, "keys", (segment, positions, *self._layout()), join)

    def commit(self, offset: int, length: int, batch: int, memo: Memo) -> None:
        """Store what the segments since the last commit have computed."""
        fresh, self._fresh, self._segment = self._fresh, [], None
        union, self._union = self._union, None
        if not fresh:  # the whole chunk skips the layer; the places of what comes later will show the gap
            return
        segments = [segment for segment, _, _ in fresh]
        rows = segments[0].rows if len(segments) == 1 else None  # several segments share out all rows
        # One tensor has to hold old and new slots: where it has every row, a row that skips gets holes.
        every = rows is None or self.every_row or (self.filled and self.rows is None)
        index = None
        holes = every and rows is not None
        # Places have to be written down as soon as slot i is not position i of every row stored.
        if len(fresh) > 1 or holes or not self.follows_on(segments[0], offset):

            def places() -> Tensor:
                device = fresh[0][1].device
                blocks = [s.positions(offset, length, batch, device, memo) for s in segments]
                new = _merge_places(blocks, segments, batch, every)
                return torch.cat([self._places(), new], -1) if self.filled else new

            index = once(memo, "places", (*segments, *self._layout()), places)
        keys, values = _merge_states(fresh, batch, every)
        if union is not None and len(fresh) == 1:  # the attention has joined old and new already: no second copy
            keys, values = union
        elif self.filled:
            keys, values = torch.cat([self.keys, keys], -2), torch.cat([self.values, values], -2)
        else:  # the first keys tell dtype and device, which `DynamicLayer` asks for
            self.lazy_initialization(keys, values)
        self.keys, self.values, self.index = keys, values, index
        self.rows = None if rows is None or every or len(rows) == batch else rows

    def follows_on(self, segment: Segment, offset: int) -> bool:
        """Return whether slot i stays position i with this segment stored: no key is missing, no mask need be cut."""
        count = self.keys.shape[-2] if self.filled else 0
        return segment.tokens is None and self.index is None and count == offset

    def select(self, rows: Tensor, batch: int, memo: Memo) -> None:
        """Make row i what row ``rows[i]`` was (repeats allowed)."""
        if not self.filled:
            return
        rows, before = rows.to(self.keys.device), self.rows
        if self.rows is not None:  # batch row -> row of the keys, -1 where it has none; new rows without stay without
            slot = torch.full((batch,), -1, device=self.keys.device)
            slot[self.rows] = torch.arange(len(self.rows), device=slot.device)
            sources = slot[rows]
            self.rows = (sources >= 0).nonzero().squeeze(1)
            rows = sources[self.rows]
        self.keys, self.values = self.keys[rows], self.values[rows]
        if (index := self.index) is not None:
            self.index = once(memo, "select", (index, before), lambda: index[rows])

    def truncate(self, length: int, memo: Memo) -> None:
        """Forget every position from ``length`` on."""
        if not self.filled:
            return
        if (index := self.index) is None:  # a view, as `DynamicCache.crop` makes one: nothing is copied
            self.keys, self.values = self.keys[:, :, :length], self.values[:, :, :length]
        else:
            places = torch.where(index < length, index, -1)
            used = (places >= 0).any(0)
            self.keys, self.values = self.keys[:, :, used], self.values[:, :, used]
            self.index = once(memo, "truncate", (index,), lambda: places[:, used])
        if not self.filled:
            self.rows = self.index = None

    def forget(self, lost: Tensor, memo: Memo) -> None:
        """Free the keys and values of the positions marked in ``lost``, bool (b n)."""
        if not self.filled:
            return
        places, lost = self._places(), lost if self.rows is None else lost[self.rows]

        def compact() -> tuple[Tensor, Tensor]:
            slots = fill_left((places >= 0) & ~lost.to(places.device).gather(1, places.clamp(min=0)))
            return slots, torch.where(slots >= 0, places.gather(1, slots.clamp(min=0)), -1)

        slots, self.index = once(memo, "forget", self._layout(), compact)
        at = rearrange(slots.clamp(min=0), "r k -> r 1 k 1")  # gathered and not viewed, or what goes would stay
        self.keys, self.values = (
            states.gather(2, at.expand(-1, states.shape[1], -1, states.shape[3])) for states in (self.keys, self.values)
        )

    def undo(self, length: int) -> None:
        """Forget what a pass that failed has left behind: parts that were not stored, and positions from ``length``."""
        self._fresh, self._union, self._segment = [], None, None
        if self.filled and int(self._places().max()) >= length:
            self.truncate(length, {})

    def slots(self, batch: int) -> Slots:
        """Return what is held, for a batch of so many rows."""
        if not self.filled:
            return Slots(batch, None, None, 0, 0)
        size = sum(int(x.shape[1] * x.shape[-1] * x.element_size()) for x in (self.keys, self.values))
        return Slots(batch, self.rows, self.index, self.keys.shape[-2], size)

    def nbytes(self) -> int:
        """Return the bytes of the keys and values of real slots, holes left out."""
        if not self.filled:
            return 0
        slots = self.keys.shape[0] * self.keys.shape[-2] if self.index is None else int((self.index >= 0).sum())
        per_slot = sum(int(x.shape[1] * x.shape[-1] * x.element_size()) for x in (self.keys, self.values))
        return slots * per_slot

    def _layout(self) -> tuple[Tensor | None, Tensor | None, int]:
        """Return what tells two layers apart that hold different positions."""
        return self.index, self.rows, self.keys.shape[-2] if self.filled else 0

    def _places(self) -> Tensor:
        """Return the place of every slot in the sequence, long (r k), -1 for a hole."""
        if self.index is not None:
            return self.index
        return torch.arange(self.keys.shape[-2], device=self.keys.device).expand(self.keys.shape[0], -1)

    def _slot_rows(self, rows: Tensor | None) -> Tensor | None:
        """Return which rows of the keys these batch rows are; None: all of them, in order."""
        if rows is None or (self.rows is not None and len(rows) == len(self.rows)):
            return None
        return rows if self.rows is None else torch.searchsorted(self.rows, rows)


def _merge_places(places: list[Tensor], segments: list[Segment], batch: int, every: bool) -> Tensor:
    """Make one block (b k) of segments; several share out the batch, and holes on the left make them equally long."""
    if len(places) == 1 and (segments[0].rows is None or not every):
        return places[0]
    width = max(index.shape[1] for index in places)
    merged = places[0].new_full((batch, width), -1)
    for segment, index in zip(segments, places, strict=True):
        merged[segment.rows, width - index.shape[1] :] = index
    return merged


def _merge_states(fresh: list[tuple[Segment, Tensor, Tensor]], batch: int, every: bool) -> tuple[Tensor, Tensor]:
    """Make the same block of keys and of values (b h k d), with zeros in the holes."""
    if len(fresh) == 1 and (fresh[0][0].rows is None or not every):
        return fresh[0][1:]
    width = max(keys.shape[-2] for _, keys, _ in fresh)
    merged = tuple(x.new_zeros(batch, x.shape[1], width, x.shape[-1]) for x in fresh[0][1:])
    for segment, *states in fresh:
        for into, one in zip(merged, states, strict=True):
            into[segment.rows, :, width - one.shape[-2] :] = one
    return merged[0], merged[1]


class Projected(Exception):
    """Stop an attention that was only to project keys and values, once a `KeptLayer` has them."""


class KeptLayer(SkipLayer):
    """Hold keys and values of every position, whether it ran the layer or only had them projected from its bypass.

    Slot i is position i. A chunk is put together part by part before it is stored; whoever attends sees all of it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._size = (0, 0)
        self._chunk: list[Tensor] = []
        self._project = False

    def undo(self, length: int) -> None:
        """Forget what a `SkipLayer` forgets, and the chunk that was being put together."""
        self._chunk = []
        super().undo(length)

    def open(self, batch: int, length: int) -> None:
        """Announce that a chunk of this size comes next, in parts."""
        self._size, self._chunk = (batch, length), []

    def begin(self, segment: Segment, project: bool = False) -> None:
        """Announce the part whose attention comes next; ``project``: only its keys and values are to be computed."""
        self._segment, self._project = segment, project

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return to the attention all keys and values of the part's rows.

        Raises:
            Projected: the part was only to be projected.
        """
        if self._segment is None:
            return super().update(key_states, value_states, *args, **kwargs)
        batch, length = self._size
        if not self._chunk:
            self._chunk = [x.new_zeros(batch, x.shape[1], length, x.shape[-1]) for x in (key_states, value_states)]
        for into, states in zip(self._chunk, (key_states, value_states), strict=True):
            put(into, states, self._segment)
        if self._project:
            raise Projected
        rows = self._segment.rows
        keys, values = (x if rows is None else x[rows] for x in self._chunk)
        if not self.filled:
            return keys, values
        past = (x if rows is None else x[rows] for x in (self.keys, self.values))
        return tuple(torch.cat([old, new], -2) for old, new in zip(past, (keys, values), strict=True))  # type: ignore[return-value]

    def key_places(self, segment: Segment, positions: Tensor, memo: Memo) -> Tensor:
        """Return every position so far, long (r k)."""
        total = (self.keys.shape[-2] if self.filled else 0) + self._size[1]

        def every() -> Tensor:
            return torch.arange(total, device=positions.device).expand(len(positions), -1)

        return once(memo, "all", (segment, total), every)

    def commit(self, offset: int, length: int, batch: int, memo: Memo) -> None:
        """Store the chunk."""
        (keys, values), self._chunk, self._segment = self._chunk, [], None
        if self.filled:
            keys, values = torch.cat([self.keys, keys], -2), torch.cat([self.values, values], -2)
        else:
            self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values


class SkipCache(Cache):
    """Hold a request's layers, its length, and the routing that every later token follows.

    The sequence length is counted here, never read from a layer, since any layer may be empty.
    """

    layers: list[SkipLayer]  # type: ignore[assignment]

    def __init__(self, n_layers: int, kept: bool = False, every_row: bool = False) -> None:
        super().__init__(layers=[KeptLayer() if kept else SkipLayer(every_row) for _ in range(n_layers)])
        self.kept, self.every_row = kept, every_row
        self.length = 0
        self.batch = 0
        self.routing: Routing | None = None
        self.ledger: Ledger | None = None
        self.rows: dict[Flags, tuple[Segment, Tensor]] = {}  # that keep a layer, and that skip it

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, None]]:
        """Yield keys and values (b h n d) layer by layer, as a `DynamicCache` does.

        Raises:
            DataError: something was skipped, so that they have no such shape.
        """
        for number, layer in enumerate(self.layers):
            if not layer.filled or layer.rows is not None or layer.index is not None:
                raise DataError(
                    f"SkipCache: layer {number} does not hold every row and position, so its keys have no common "
                    "shape; pass the cache on as it is, or use one of a request inside model.dense()"
                )
            yield layer.keys, layer.values, None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of positions so far, whichever layers they ran."""
        return self.length

    def get_mask_sizes(self, query_length: int | Tensor, layer_idx: int = 0) -> tuple[int, int]:
        """Return the whole sequence's length, which models build their masks for; each layer cuts its own part out."""
        new = query_length if isinstance(query_length, int) else len(query_length)
        return self.length + new, 0

    @property
    def gaps(self) -> bool:
        """Return whether something may be missing that a dense pass would attend to."""
        return self.length > 0

    @property
    def is_initialized(self) -> bool:
        """Return whether the request has begun; models ask this to tell the prompt from what follows."""
        return self.length > 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Return -1: there is no maximum."""
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make row i what row ``beam_idx[i]`` was, routing included."""
        memo: Memo = {}
        for layer in self.layers:
            layer.select(beam_idx, self.batch, memo)
        if self.routing is not None and self.ledger is not None:
            self.routing = self.routing.select(beam_idx.to(self.routing.keep.device))
            self.ledger.select(beam_idx)
        self.batch = len(beam_idx)
        self.note()

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
        removed = min(-tokens_to_remove, self.length)  # of a shorter cache all, as of a `DynamicCache`
        self.length -= removed
        if self.ledger is not None:
            self.ledger.crop(removed)
        self.routing = None if self.routing is None else self.routing.crop(self.length)
        memo: Memo = {}
        for layer in self.layers:
            layer.truncate(self.length, memo)
        self.note()

    def undo(self) -> None:
        """Forget what a pass that failed has left in some of the layers."""
        for layer in self.layers:
            layer.undo(self.length)

    def reset(self) -> None:
        """Forget the request."""
        self.__init__(len(self.layers), self.kept, self.every_row)  # type: ignore[misc]

    def note(self) -> None:
        """Tell the ledger what is held now, so that it can say so when the cache itself is gone."""
        if self.ledger is not None:
            self.ledger.slots = tuple(layer.slots(self.batch) for layer in self.layers)

    def nbytes(self) -> int:
        """Return the bytes of the keys and values that are really held."""
        return sum(layer.nbytes() for layer in self.layers)
