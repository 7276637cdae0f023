"""Decoding as a replayed CUDA graph over a static cache: what a cut-out path can have and a routed model cannot."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache

from adaskip.bench.forced import force, spread_out
from adaskip.bench.rounds import bounded_ratio, interleave
from adaskip.bench.sides import Side
from adaskip.bench.subject import Subject
from adaskip.errors import AdaSkipError
from adaskip.generate.cut import cut
from adaskip.runtime.timing import timed

_CLOSE = 0.1  # of the largest logit, for models in half precision
_WARM_UP = 3  # steps before the capture, in which kernels are chosen and workspaces taken


@dataclass
class Graph:
    """Hold a model without routers, a prompt without padding, and after `settle` one captured step of its decoding.

    On a CPU the step is run and not replayed: the same arithmetic, at seconds that say nothing of a graph.
    """

    model: Any
    inputs: dict[str, Tensor]
    new: int
    graph: Any = None
    cache: Any = None
    logits: Tensor | None = None  # (b v) of the step last run; a replay writes into the same memory

    @torch.no_grad()
    def settle(self) -> None:
        """Prefill a static cache and capture a step after it."""
        ids = self.inputs["input_ids"]
        self.cache = StaticCache(config=self.model.config, max_cache_len=ids.shape[1] + self.new)
        self.model(**self.inputs, past_key_values=self.cache, logits_to_keep=1)
        if ids.device.type != "cuda":
            return
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(_WARM_UP):
                self._rewind()
                self._step()
        torch.cuda.current_stream().wait_stream(aside)
        self._rewind()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self._step()

    @torch.no_grad()
    def decode(self) -> Tensor | None:
        """Write ``new`` tokens after the prompt, as `Side.decode` does; the next turn overwrites what it returns."""
        self._rewind()
        for _ in range(self.new):
            if self.graph is None:
                self._step()
            else:
                self.graph.replay()
        return self.logits

    def decode_seconds(self) -> float:
        """Measure the seconds of writing one token."""
        return timed(self.decode)[1] / self.new

    def _step(self) -> None:
        out = self.model(input_ids=self.inputs["input_ids"][:, -1:], past_key_values=self.cache)
        self.logits = out.logits[:, -1]
        self.logits.argmax(-1)

    def _rewind(self) -> None:
        """Forget what was written; the cache counts on the device, where a replay reads it."""
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.inputs["input_ids"].shape[1])


@torch.no_grad()
def graph_row(subject: Subject, batch: int, rate: float, new: int, budget: float) -> dict[str, Any]:
    """Time decoding a token, eagerly dense, routed and cut, and as a replayed graph dense and cut.

    All rows leave out the same layers; the cut model is `adaskip.cut` of their path, and the control a second graph of
    it. ``SIDE / cut_graph``: the ratio over paired rounds and its interval. ``gap``: by how much the routed model's and
    the graph's logits differ, as a share of the largest.

    Raises:
        AdaSkipError: they differ by more than rounding.
    """
    inputs, dense = subject.batch(batch), subject.spec.model
    keep = spread_out(len(subject.spec.layers), rate, batch, "uniform")
    routed = force(subject, keep)
    plain = cut(routed, keep[:, 0])
    eager = {"dense": Side(dense, inputs, new), "routed": Side(routed, inputs, new), "cut": Side(plain, inputs, new)}
    graphs = {"dense_graph": Graph(dense, inputs, new), "cut_graph": Graph(plain, inputs, new)}
    graphs["control"] = Graph(plain, inputs, new)
    sides: dict[str, Any] = {**eager, **graphs}
    for side in sides.values():
        side.settle()
        side.decode_seconds()
    expected, replayed = eager["routed"].decode(), graphs["cut_graph"].decode()
    eager["routed"].cache.crop(-new)
    assert expected is not None
    assert replayed is not None
    gap = float((replayed - expected).abs().max() / expected.abs().max())
    if not gap <= _CLOSE:
        raise AdaSkipError(f"bench: the graph's logits and the routed model's differ by {gap:.2g} of the largest")
    seconds = interleave({name: side.decode_seconds for name, side in sides.items()}, lambda _: False, budget)
    row: dict[str, Any] = {"batch": batch, "skip": rate, "tokens": inputs["input_ids"].shape[1]}
    row |= {f"{name}_s": statistics.median(values) for name, values in seconds.items()}
    below = seconds["cut_graph"]
    row |= {f"{name} / cut_graph": bounded_ratio(seconds[name], below) for name in seconds if name != "cut_graph"}
    return row | {"gap": gap, "rounds": len(below), "rounds_s": seconds}
