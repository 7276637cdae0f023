"""What each decoder layer computes for a token and for a query-key pair: its matrix products, counted as they run.

A few plain tokens go through the untouched model while every matrix product is watched. A product with a weight is work
for each token; what an attention multiplies of states alone is work for each pair of a query and a key. So weights that
never run cost nothing, and of a mixture of experts what counts is the experts that a token really meets.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import PreTrainedModel

from adaskip.backbone.probe import ROWS, TOKENS, ToldCache, dense_pass, in_this_thread


@dataclass(frozen=True)
class Work:
    """Hold the FLOPs of one decoder layer; a multiply-add is two.

    Attributes:
        token: per token, by the module that the layer calls itself.
        stored: of these, what is done by the time that the layer's keys and values are stored.
        pair: per pair of a query and a key.
        attention: which of the modules attends; None where that was not seen.
    """

    token: dict[nn.Module, float] = field(repr=False)
    stored: dict[nn.Module, float] = field(repr=False)
    pair: float
    attention: nn.Module | None = field(repr=False)


def measure_work(model: PreTrainedModel, layers: tuple[nn.Module, ...], pair: float) -> tuple[tuple[Work, ...], float]:
    """Measure the work of each layer, and the FLOPs of the language-model head per position.

    A model on device ``meta`` is not run: all its weights are counted, as if every token met each once, and ``pair``
    FLOPs for a query-key pair.
    """
    if any(weight.is_meta for weight in model.parameters()):  # offloaded ones too
        head = model.get_output_embeddings()
        return tuple(Work({layer: _weights(layer)}, {}, pair, None) for layer in layers), _weights(head)
    meter = _Meter(model, layers)
    caches = "past_key_values" in inspect.signature(type(model).forward).parameters
    with meter, meter.products:
        dense_pass(model, **({"past_key_values": ToldCache(meter.store), "use_cache": True} if caches else {}))
    return tuple(meter.work(index) for index in range(len(layers))), meter.head / (ROWS * TOKENS)


def _weights(module: nn.Module | None) -> float:
    weights = () if module is None else module.parameters()
    return 2.0 * sum(weight.numel() for weight in weights if weight.dim() >= 2)


Counter = defaultdict[nn.Module, float]


class _Meter:
    """Sum products by layer and by the module that the layer calls itself."""

    def __init__(self, model: PreTrainedModel, layers: tuple[nn.Module, ...]) -> None:
        self.layers = layers
        self.products = _Products(self, {_storage(weight) for weight in model.parameters()})
        self.stack: list[nn.Module] = []
        self.layer = -1
        self.counted = 0.0
        self.weighted: list[Counter] = [defaultdict(float) for _ in layers]
        self.paired: list[Counter] = [defaultdict(float) for _ in layers]
        self.stored: list[dict[nn.Module, float]] = [{} for _ in layers]
        self.attention: list[nn.Module | None] = [None] * len(layers)
        self.head = 0.0
        self._before: list[float] = []
        self._handles: list[Any] = []

    def __enter__(self) -> None:
        for module in {module for layer in self.layers for module in layer.modules()}:
            self._handles.append(module.register_forward_pre_hook(in_this_thread(self._enter)))
            self._handles.append(module.register_forward_hook(in_this_thread(self._leave)))

    def __exit__(self, *raised: Any) -> None:
        for handle in self._handles:
            handle.remove()

    def _enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if not self.stack:
            self.layer += 1
        self.stack.append(module)
        self._before.append(self.counted)

    def _leave(self, module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        width = getattr(module, "out_features", None)
        if self._before.pop() == self.counted and isinstance(width, int) and args and isinstance(args[0], Tensor):
            self.add(2.0 * args[0].numel() * width, paired=False)  # a linear map whose kernel hides its product
        self.stack.pop()

    def add(self, flops: float, paired: bool) -> None:
        """Count a product, of states alone or with a weight, for whatever is under way."""
        self.counted += flops
        if self.stack:
            (self.paired if paired else self.weighted)[self.layer][self._part] += flops
        elif self.layer == len(self.layers) - 1:
            self.head += flops

    def store(self, slot: int) -> None:
        """Note the module that has just handed over keys and values, and the work done by then; called by the cache."""
        if self.stack and self.attention[self.layer] is None:
            self.attention[self.layer] = self._part
            self.stored[self.layer] = dict(self.weighted[self.layer])

    @property
    def _part(self) -> nn.Module:
        return self.stack[min(1, len(self.stack) - 1)]

    def work(self, index: int) -> Work:
        """Return the work of one layer, as the pass showed it."""
        weighted, paired, attention = self.weighted[index], self.paired[index], self.attention[index]
        if attention is None and paired:  # nothing was cached
            attention = max(paired, key=paired.__getitem__)
        token = {part: flops / (ROWS * TOKENS) for part, flops in weighted.items()}
        for part, flops in paired.items():
            if part is not attention:  # copied weights, as of experts gathered for each token
                token[part] = token.get(part, 0.0) + flops / (ROWS * TOKENS)
        stored = {part: flops / (ROWS * TOKENS) for part, flops in self.stored[index].items()}
        pairs = 0.0 if attention is None else paired[attention]
        return Work(token, stored, pairs / (ROWS * TOKENS**2), attention)


class _Products(TorchDispatchMode):
    """Tell a meter of every matrix product, whatever kernel makes it."""

    def __init__(self, meter: _Meter, weights: set[int]) -> None:
        super().__init__()
        self.meter, self.weights = meter, weights - {0}  # 0 would match every tensor without an address

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and count it."""
        kwargs = kwargs or {}
        name, formula = func._schema.name, flop_registry.get(func._overloadpacket)
        if "scaled_dot_product" in name:
            q, k, v = args[:3]
            self.meter.add(2.0 * q[..., 0].numel() * k.shape[-2] * (q.shape[-1] + v.shape[-1]), paired=True)
            out = func(*args, **kwargs)
        elif "grouped_mm" in name:  # each row with the matrix of its group
            out = func(*args, **kwargs)
            self.meter.add(2.0 * out.numel() * args[0].shape[-1], paired=False)
        elif formula is not None:
            out = func(*args, **kwargs)
            batched = isinstance(out, Tensor) and out.dim() > 2  # what is flat is a layer's weight, maybe unpacked
            self.meter.add(float(formula(*args, **kwargs, out_val=out)), batched and not self._weighted(args))
        else:
            with self:  # in inference mode operations come whole, and have to be taken apart
                out = func.decompose(*args, **kwargs)
            if out is NotImplemented:
                out = func(*args, **kwargs)
        return out

    def _weighted(self, args: Any) -> bool:
        return any(isinstance(x, Tensor) and _storage(x) in self.weights for x in args)


def _storage(tensor: Tensor) -> int:
    """Return the address of a tensor's values; 0 where there is none to be had, as of a packed or distributed one."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):
        return 0
