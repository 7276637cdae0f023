"""Make one cache of chosen rows of several, so that prompts which were prefilled apart go on together.

Keys of the tokens a b c, behind one position of padding p, and of the tokens d e f g h become one layer of length 5:

    p a b c      length 4, padding 1       . . a b c       places   -1 -1 2 3 4
    d e f g h    length 5, padding 0  ->   d e f g h                 0  1 2 3 4

Zeros (.) fill up the left, where the mask of later tokens hides them. A layer with holes in some part writes the places
down; there p stays, in a hole.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adaskip.plan import Routing, host
from adaskip.runtime.cache import SkipCache, SkipLayer
from adaskip.runtime.cost import Ledger


@dataclass(frozen=True)
class Part:
    """Name rows of one cache that took the same path."""

    cache: SkipCache
    rows: Tensor  # long (r)
    padding: int  # leading positions that are padding in all of them


def join(parts: list[Part]) -> SkipCache:
    """Return the rows of all parts, in order, as one cache; they are made equally long by padding on the left.

    Nothing is computed: keys and values are moved, and masked padding stands where a row has fewer positions.
    """
    first = parts[0].cache
    whole = SkipCache(len(first.layers), first.kept, first.every_row)
    whole.length = max(part.cache.length - part.padding for part in parts)
    whole.batch = sum(len(part.rows) for part in parts)
    for index, layer in enumerate(whole.layers):
        _join_layer(layer, [(part.cache.layers[index], part) for part in parts], whole.length)
    routings = [part.cache.routing.select(part.rows.to(part.cache.routing.keep.device)) for part in parts]  # type: ignore[union-attr]
    logits = [routing.logits for routing in routings if routing.logits is not None]
    keep = torch.cat([routing.keep for routing in routings], 1)
    whole.routing = Routing(
        keep=keep,
        group=routings[0].group,
        logits=torch.cat(logits, 1) if len(logits) == len(parts) else None,
        flags=host(keep),
    )
    ledgers = [_tokens(part, whole.length) for part in parts]
    assert first.ledger is not None
    chunk = torch.cat([always for always, _ in ledgers]), torch.cat([routed for _, routed in ledgers])
    whole.ledger = Ledger(first.ledger.routes_answers, [chunk])
    whole.note()
    return whole


def _join_layer(into: SkipLayer, parts: list[tuple[SkipLayer, Part]], length: int) -> None:
    """Fill one layer of the whole; where no part has anything in it, as on a path that skips it, it stays empty."""
    sample = next((layer for layer, part in parts if _holds(layer, part)), None)  # tells heads, width and dtype
    if sample is None:
        return
    blocks: list[tuple[Tensor, Tensor, Tensor | None, Part]] = []
    for layer, part in parts:
        if not layer.filled:  # a prompt of one token holds nothing yet
            nothing = [x.new_zeros(len(part.rows), x.shape[1], 0, x.shape[-1]) for x in (sample.keys, sample.values)]
            blocks.append((nothing[0], nothing[1], None, part))
            continue
        rows = part.rows.to(layer.keys.device)
        slots = rows if layer.rows is None else torch.searchsorted(layer.rows, rows)
        places = None if layer.index is None else layer.index[slots]
        begin = part.padding if places is None else 0  # with places, padding becomes holes in `_move`
        blocks.append((layer.keys[slots, :, begin:], layer.values[slots, :, begin:], places, part))
    ragged = any(places is not None for _, _, places, _ in blocks)
    width = max(keys.shape[-2] for keys, _, _, _ in blocks) if ragged else length
    keys = torch.cat([_widen(block[0], width) for block in blocks])
    into.lazy_initialization(keys, keys)
    into.keys, into.values = keys, torch.cat([_widen(block[1], width) for block in blocks])
    if ragged:  # slots that are holes in every row are dropped
        index = torch.cat([_move(places, keys, part, width, length) for keys, _, places, part in blocks])
        used = (index >= 0).any(0)
        into.keys, into.values, into.index = into.keys[:, :, used], into.values[:, :, used], index[:, used]


def _holds(layer: SkipLayer, part: Part) -> bool:
    """Return whether the part's rows, which all went the same path, have anything in a layer."""
    return layer.filled and (layer.rows is None or bool(torch.isin(part.rows.to(layer.rows.device), layer.rows).all()))


def _widen(states: Tensor, width: int) -> Tensor:
    """Put zeros before the n positions of (r h n d) to make them ``width``."""
    return torch.nn.functional.pad(states, (0, 0, width - states.shape[-2], 0))


def _move(places: Tensor | None, keys: Tensor, part: Part, width: int, length: int) -> Tensor:
    """Return where the slots of a part stand in the whole, long (r width), -1 for a hole."""
    own = part.cache.length - part.padding
    if places is None:
        places = torch.arange(keys.shape[-2], device=keys.device).expand(len(keys), -1) + length - own
    else:
        places = torch.where(places >= part.padding, places - part.padding + length - own, -1)
    return torch.nn.functional.pad(places, (width - places.shape[1], 0), value=-1)


def _tokens(part: Part, length: int) -> tuple[Tensor, Tensor]:
    """Return the tokens of a part's rows that always run, and those that are routed: bool (r length) each."""
    ledger = part.cache.ledger
    assert ledger is not None
    masks = []
    for kind in zip(*ledger.chunks, strict=True):
        mask = torch.cat([chunk[part.rows.to(chunk.device)] for chunk in kind], 1)[:, part.padding :]
        masks.append(torch.nn.functional.pad(mask, (length - mask.shape[1], 0)))
    return masks[0], masks[1]
