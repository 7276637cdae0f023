"""The dense model's cache, which drafts read and write for a while: one set of keys and values for both."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from adaskip.plan import host
from adaskip.runtime.cache import SkipCache
from adaskip.runtime.cost import Ledger
from adaskip.runtime.segment import Memo


class SharedCache(SkipCache):
    """Hold every layer's keys and values of every position, as dense passes fill them, and drafts behind them.

        prompt and answer   pending  drafts          what a layer holds
        0 1 2 3 4              5     6 7             0 1 2 3 4 5 6     run by drafts: they attend to the dense keys
                                                     0 1 2 3 4         skipped by drafts

    `rewind` takes drafts back, and the pass that verifies them writes the same places anew. Layers of sliding attention
    hold every position too, so that they can be rewound; the model's mask hides what is beyond the window.
    """

    @property
    def gaps(self) -> bool:
        """Return that a dense pass misses nothing here, once drafts are taken back."""
        return False

    def follow(self, count: int) -> None:
        """Note a dense pass of so many tokens, which the routing knows nothing of."""
        self.length += count

    def rewind(self, length: int) -> None:
        """Forget what stands at position ``length`` and behind it, in the layers that hold anything there."""
        memo: Memo = {}
        for layer in self.layers:
            layer.truncate(length, memo)
        self.length = length

    def draft_along(self, path: Tensor) -> None:
        """Let every row follow one path, bool (l), from here on; its tokens are counted apart from the text's."""
        assert self.routing is not None
        keep = path[:, None].expand(-1, self.batch)
        self.routing, self.ledger = replace(self.routing, keep=keep, flags=host(keep)), None

    def plain(self) -> DynamicCache:
        """Return the same keys and values as a cache that the dense model goes on from."""
        cache = DynamicCache()
        for layer in self.layers:
            twin = DynamicLayer()
            twin.lazy_initialization(layer.keys, layer.values)
            twin.keys, twin.values = layer.keys, layer.values
            cache.layers.append(twin)
        return cache


def count_dense(ledger: Ledger, count: int) -> None:
    """Add generated tokens that each ran every layer, one by one as the dense model alone would have run them."""
    ledger.routes_answers = False
    ledger.decoded += count
    ledger.heads += count
