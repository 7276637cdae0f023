"""A part of a batch that runs a layer in one call, and how the layer's arguments are cut to it.

Two rows of a chunk at offset 10 whose vision tokens v skip a layer; the segment is their text t, filled on the left:

                 0 1 2 3 4
    row 0        t v v t t      rows 0  tokens  0 3 4      positions 10 13 14      gathered 0 3 4
    row 1        t v v v t           1         -1 0 4                -1 10 14               0 0 4

`take` gathers states, `narrow` all other arguments: of a mask (b h q k) the lines of the queries 0 3 4 and of them the
columns of the keys that the layer holds. Filling reads position 0; as a key it is hidden, as a query dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from einops import rearrange
from torch import Tensor

from adaskip.errors import BackboneError

T = TypeVar("T")
Memo = dict[Any, Any]
"""What the layers of one request share, see `once`."""

MASKS = ("attention_mask", "causal_mask")


def once(memo: Memo, name: str, sources: tuple[Any, ...], make: Callable[[], T]) -> T:
    """Return what ``make`` makes of these very objects, made once: one object for all layers that ask for the same."""
    key = (name, *(source if isinstance(source, int) else id(source) for source in sources))
    if key not in memo:
        memo[key] = (make(), sources)  # the sources live on with it, so that no other object takes over their ids
    result: T = memo[key][0]
    return result


@dataclass(frozen=True)
class Segment:
    """Name the part of a chunk that runs a layer in one call: some rows, and some positions of each."""

    rows: Tensor | None = None  # long (r), ascending; None: every row
    tokens: Tensor | None = None  # long (r n): places in the chunk, -1 where a row has fewer; None: all
    ragged: bool = False  # whether some row has fewer positions than another, so that there is filling

    def positions(self, offset: int, length: int, batch: int, device: torch.device, memo: Memo) -> Tensor:
        """Return the places of the segment's tokens in the whole sequence, long (r n), -1 for filling."""

        def make() -> Tensor:
            if self.tokens is not None:
                return torch.where(self.tokens < 0, -1, self.tokens + offset)
            count = batch if self.rows is None else len(self.rows)
            return torch.arange(offset, offset + length, device=device).expand(count, length)

        return once(memo, "positions", (self,), make)


WHOLE = Segment()


def take(value: Tensor, segment: Segment, batch_axis: int) -> Tensor:
    """Return the segment's part of a tensor (..., b, t, ...) whose b stands at ``batch_axis``; b may be 1."""
    if segment.rows is not None and value.shape[batch_axis] > 1:
        value = value.index_select(batch_axis, segment.rows)
    if segment.tokens is None:
        return value
    count, width = segment.tokens.shape
    shape = list(value.shape)
    shape[batch_axis] = count
    value = value.expand(shape)
    axis = batch_axis + 1
    index = segment.tokens.clamp(min=0).view([*[1] * batch_axis, count, width, *[1] * (len(shape) - axis - 1)])
    shape[axis] = width
    return value.gather(axis, index.expand(shape))


def put(into: Tensor, states: Tensor, segment: Segment) -> None:
    """Write (r h n d) states to a segment's places in a chunk (b h t d)."""
    if segment.tokens is None:
        into[slice(None) if segment.rows is None else segment.rows] = states
        return
    rows = torch.arange(len(into), device=into.device) if segment.rows is None else segment.rows
    real = segment.tokens >= 0
    where = rearrange(rows, "r -> r 1").expand_as(real)[real], segment.tokens[real]
    into.transpose(1, 2)[where] = states.transpose(1, 2)[real]


def fill_left(marked: Tensor) -> Tensor:
    """Return the marked places (r t) of each row, long (r n), filled on the left where it has fewer than another.

    . x . x     1 3
    . . . x ->  -1 3     -1 sorts before every place, so the columns that all rows fill are cut off the left
    """
    places = torch.where(marked, torch.arange(marked.shape[1], device=marked.device), -1).sort(1).values
    return places[:, marked.shape[1] - int(marked.sum(1).max()) :]


def narrow(
    named: dict[str, Any], segment: Segment, batch: int, queries: Tensor, keys: Tensor | None, memo: Memo
) -> dict[str, Any]:
    """Return the arguments of a layer, cut to a segment.

    The batch axis of each is known by its name, since sizes can coincide.

    Args:
        named: what the model passed for the whole batch.
        segment: the rows and positions that run.
        batch: rows of the whole batch.
        queries: long (r q), the place of every query in the sequence, -1 for filling.
        keys: long (r k), the place of every key the segment attends to, -1 for a hole; None: all keys, in order.
        memo: what earlier layers of the request have cut; tables and masks are cut once per distinct part.
    """

    def one(name: str, value: Any) -> Any:
        if name in MASKS:
            return _cut_mask(value, segment, queries, keys)
        if name == "position_embeddings" and isinstance(value, tuple):
            return tuple(one(name, item) for item in value)
        if not isinstance(value, Tensor):
            return value
        if name == "alibi":  # (b h) 1 k
            rows = rearrange(value, "(b h) q k -> b h q k", b=batch)
            rows = rows if segment.rows is None else rows.index_select(0, segment.rows)
            if keys is not None and rows.shape[-1] >= keys.shape[-1]:
                at = rearrange(keys.clamp(min=0), "r k -> r 1 1 k")
                rows = rows.gather(3, at.expand(-1, rows.shape[1], rows.shape[2], -1))
            return rearrange(rows, "b h q k -> (b h) q k")
        if name == "position_bias" and value.dim() == 3:  # h q k: the same for every row
            return value
        if name == "position_embeddings":  # (... b t d)
            return take(value, segment, value.dim() - 3)
        if name == "position_ids":  # (... b t)
            return take(value, segment, value.dim() - 2)
        if value.dim() >= 2 and value.shape[0] == batch and segment.rows is not None:
            return value.index_select(0, segment.rows)
        return value

    return {
        name: once(memo, name, (value, segment, keys), partial(one, name, value))
        if isinstance(value, Tensor | tuple) or name in MASKS
        else value
        for name, value in named.items()
    }


def _cut_mask(mask: Any, segment: Segment, queries: Tensor, keys: Tensor | None) -> Any:
    """Return a mask for the segment's queries and the keys they attend to: None, (r k) or (r h q k)."""
    if mask is None:
        # None means plain causal attention by slots. No key is missing: that is causal by positions too.
        if keys is None:
            return None
        # Some are missing, but slots still ascend: causal for one query, or for queries that are all the keys.
        last = queries.shape[1] in (1, keys.shape[1]) and bool((keys[:, -queries.shape[1] :] == queries).all())
        if last and bool((keys >= 0).all()):
            return None
        # Else slots say nothing about who came first, so positions are compared.
        visible = (keys[:, None, :] >= 0) & (keys[:, None, :] <= queries[:, :, None])
        return rearrange(visible, "r q k -> r 1 q k")
    # flex attention's block mask is a program over positions, of which no rows and columns can be taken
    if not isinstance(mask, Tensor):
        raise BackboneError(
            f"attention mask of type {type(mask).__name__} cannot be cut to a part of the batch; "
            "load the model with attn_implementation='sdpa' or 'eager'"
        )
    if segment.rows is not None and mask.shape[0] > 1:
        mask = mask.index_select(0, segment.rows)
    if keys is None:  # whole rows over all keys
        return mask
    places = keys.clamp(min=0)
    if mask.dim() == 2:  # of keys alone: the kernel itself is causal, by slots
        return torch.where(keys < 0, 0, mask.expand(len(keys), -1).gather(1, places))
    mask = mask.expand(len(keys), -1, -1, -1)
    if segment.tokens is not None:
        lines = rearrange(segment.tokens.clamp(min=0), "r q -> r 1 q 1")  # a mask's queries are those of the chunk
        mask = mask.gather(2, lines.expand(-1, mask.shape[1], -1, mask.shape[3]))
    mask = mask.gather(3, rearrange(places, "r k -> r 1 1 k").expand(-1, mask.shape[1], mask.shape[2], -1))
    hidden = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    return torch.where(rearrange(keys < 0, "r k -> r 1 1 k"), hidden, mask)


def hide_keys(mask: Any, gate: Tensor, dtype: torch.dtype) -> Tensor:
    """Return an additive mask (b h|1 t t): a token sees itself, and of the others those whose gate (b t) is on.

    Where a gate is on, its slope is added to its key's scores: d/dg of a softmax whose weights are multiplied by g.
    """
    length, low = gate.shape[1], torch.finfo(dtype).min
    if mask is None:
        mask = torch.ones(length, length, dtype=torch.bool, device=gate.device).tril()[None, None]
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        raise BackboneError(
            "scope 'token': an attention mask without places for queries and keys cannot hide what skipped; "
            "load the model with attn_implementation='sdpa' or 'eager'"
        )
    if mask.dtype == torch.bool:
        mask = torch.where(mask, 0.0, low).to(dtype)
    others = ~torch.eye(length, dtype=torch.bool, device=gate.device)
    off = rearrange(gate.detach() <= 0.5, "b k -> b 1 1 k") & others
    slope = rearrange(gate - gate.detach(), "b k -> b 1 1 k").to(dtype) * others
    return torch.where(off, low, mask + slope)
