"""What a recipe will need before it has run: GPU memory, from shapes alone, and steps an hour, from this machine."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from adaskip.backbone.footprint import Footprint, measure_footprint
from adaskip.backbone.inspect import count_positions
from adaskip.backbone.published import read_config
from adaskip.errors import AdaSkipError
from adaskip.recipe import Recipe

TOKENS = 512
"""Tokens of an example where neither ``data.max_tokens`` nor the backbone's positions say less."""
GPUS = (16, 24, 32, 40, 48, 80, 96, 141, 192)
"""GB that GPUs have."""
_SPARE = 1.2
"""A GPU is chosen with a fifth to spare, for what is left out: `scripts/memory_check.py` measures how much that is."""
_SHARE = 0.5
"""Share of the rate of one large matrix product that a whole step reaches; a rule of thumb."""
_ADAM = 16  # bytes of a trained parameter: float32 itself, its gradient, and two moments
_LEFT_OUT = (
    "the vision tower while it runs, what adapters keep, temporaries of single kernels, pricing before the first step, "
    "what libraries keep"
)


@dataclass(frozen=True)
class Estimate:
    """Hold what a training step of a recipe needs on each device. An estimate from shapes, not a bound."""

    tokens: int  # of an example, the most
    weights: int  # bytes of the frozen model
    trained: int  # bytes of routers and adapters with their gradients and moments
    activations: int  # bytes that the decoder layers keep for the backward pass, or that reruns keep
    logits: int  # bytes of both models' logits and of their gradient
    flops: float  # of a step: the dense pass, the routed one, and back through it
    rate: float  # FLOPs a second of a matrix product on this machine; 0: not measured

    @property
    def bytes(self) -> int:
        """Return the sum of all parts."""
        return self.weights + self.trained + self.activations + self.logits

    @property
    def gpu(self) -> int | None:
        """Return the GB of the smallest GPU that holds it with a fifth to spare; None: no single one does."""
        return next((size for size in GPUS if size * 1e9 >= _SPARE * self.bytes), None)

    @property
    def steps_an_hour(self) -> float | None:
        """Return how many steps an hour holds at half of the rate."""
        return 3600 * _SHARE * self.rate / self.flops if self.rate and self.flops else None

    def to_dict(self) -> dict[str, Any]:
        """Return what ``--json`` prints; memory in GB (1e9 bytes)."""
        parts = {name: round(getattr(self, name) / 1e9, 3) for name in ("weights", "trained", "activations", "logits")}
        return {
            "memory_gb": round(self.bytes / 1e9, 2),
            "parts_gb": parts,
            "gpu_gb": self.gpu,
            "tokens": self.tokens,
            "step_tflops": round(self.flops / 1e12, 3),
            "steps_an_hour": None if self.steps_an_hour is None else round(self.steps_an_hour, 1),
            "left_out": _LEFT_OUT,
        }


def estimate(recipe: Recipe, *, timed: bool = True) -> Estimate:
    """Estimate what a training step of a recipe needs, from the backbone's configuration; no weights are loaded.

    With b rows of t tokens, width d, attention width a, inner width m, vocabulary v and e bytes a number, a decoder
    layer keeps for its backward pass, through frozen weights, for each token: the float32 inputs of two norms (8 d),
    queries, keys, values and result of the attention (4 a e), what the gated MLP multiplies (3 m e), and what the gate
    mixes (2 d e). Logits are kept of the dense and the routed model, with the gradient of the latter (3 v e).

    Args:
        recipe: its ``data.max_tokens`` says how long examples may be.
        timed: measure a matrix product here, for the steps an hour.

    Raises:
        AdaSkipError: the configuration cannot be read, or no model built of it.
    """
    section = recipe.backbone
    config = read_config(section.path, trust_remote_code=section.trust_remote_code, revision=section.revision)
    size = measure_footprint(config)
    dtype = (size.stored or torch.float32) if section.dtype == "auto" else getattr(torch, section.dtype)
    number = torch.empty((), dtype=dtype).element_size()
    tokens = min(recipe.data.max_tokens or TOKENS, count_positions(config) or TOKENS)
    many = recipe.trainer.batch_size * tokens
    back = recipe.trainer.steps > 0 and recipe.objective.gradient == "straight-through"
    kept = _kept(size, number) if back else size.width * number  # a rerun keeps the states that enter each layer
    passes = 3 if back else 2
    pairs = 2.0 * tokens * size.attention * size.layers  # of each token: its scores and its values, half masked
    flops = passes * many * (2.0 * (size.active + size.vocabulary * size.width) + pairs)
    return Estimate(
        tokens=tokens,
        weights=size.parameters * number,
        trained=_ADAM * _trained(recipe, size),
        activations=many * size.layers * kept,
        logits=(3 if back else 2) * many * size.vocabulary * number,
        flops=flops,
        rate=_rate(dtype) if timed else 0.0,
    )


def try_estimate(recipe: Recipe) -> dict[str, Any]:
    """Return an estimate as plain values, or why there is none."""
    try:
        return estimate(recipe).to_dict()
    except AdaSkipError as error:
        return {"missing": str(error)}


def _kept(size: Footprint, number: int) -> int:
    """Return the bytes that a decoder layer keeps of each token for its backward pass."""
    return 8 * size.width + number * (4 * size.attention + 3 * size.inner + 2 * size.width)


def _trained(recipe: Recipe, size: Footprint) -> int:
    """Count the parameters of routers, which read two directions of the width at most, and of adapters."""
    inside, read = recipe.router.hidden, 2 * size.width
    router = read * inside + 2 * inside + 1 if inside else read + 1
    adapters = size.adapters(recipe.lora.rank, recipe.lora.targets) if recipe.lora else 0
    return router * size.layers + adapters


def _rate(dtype: torch.dtype, side: int = 1024, seconds: float = 0.2) -> float:
    """Measure the FLOPs a second of a square matrix product on the device that would train."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    left = torch.ones(side, side, dtype=dtype, device=device)
    done, started = 0, time.perf_counter()
    while done < 3 or time.perf_counter() - started < seconds:
        if done == 1:  # the first warms up
            started = time.perf_counter()
        left @ left
        done += 1
        if device.type == "cuda":
            torch.cuda.synchronize()
    return (done - 1) * 2.0 * side**3 / (time.perf_counter() - started)
