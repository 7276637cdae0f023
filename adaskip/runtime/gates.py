"""Turn logits into gates: what executes is always a hard 0 or 1, what the gradient sees is soft."""

from __future__ import annotations

import torch
from torch import Tensor

from adaskip.runtime.noise import Noise


def hard(logits: Tensor, threshold: float = 0.0) -> Tensor:
    """Return where the logit exceeds the threshold, so that the layer runs: bool, of the same shape."""
    return logits > threshold


def perturb(logits: Tensor, generator: torch.Generator | Noise, temperature: float = 1.0) -> Tensor:
    """Add logistic noise (a binary Gumbel-softmax), with which `hard` draws its decisions.

    P(hard) = sigmoid((logit - threshold) / temperature)

    """
    # drawn on the generator's device, so that a run is the same wherever the router lives; and in float32 whatever
    # torch's default is: in bfloat16 the upper end would round to 1, and the noise be infinite
    uniform = Noise.of(generator).uniform(logits.shape)
    return logits + temperature * uniform.clamp(1e-6, 1 - 1e-6).logit().to(logits.device)


def straight_through(
    logits: Tensor, threshold: float = 0.0, temperature: float = 1.0, generator: torch.Generator | Noise | None = None
) -> Tensor:
    """Return gates that are exactly 0 or 1 forward and have the slope of a sigmoid backward.

    With a generator the decision is drawn at the temperature, so that training explores. Without one it is `hard`.

    >>> straight_through(torch.tensor([2.0, -1.0]))
    tensor([1., 0.])
    """
    if generator is not None:
        logits = perturb(logits, generator, temperature)
    soft = torch.sigmoid((logits - threshold) / temperature)
    return hard(logits, threshold).to(soft.dtype) + (soft - soft.detach())
