"""Accept or refuse drafted tokens so that what is kept is distributed as the dense model alone would draw it."""

from __future__ import annotations

import torch
from torch import Tensor


def accept_greedily(scores: Tensor, drafted: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the dense model's own token of each row, and whether the draft was another.

    Args:
        scores: float32 (b v), the dense model's processed logits.
        drafted: long (b); None: nothing was drafted here.

    Returns:
        Tokens, long (b), and refused, bool (b).

    >>> accept_greedily(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([1, 1]))
    (tensor([1, 0]), tensor([False,  True]))
    """
    tokens = scores.argmax(-1)
    return tokens, torch.zeros_like(tokens, dtype=torch.bool) if drafted is None else tokens != drafted


def accept_sampled(law: Tensor, drafted: Tensor | None, drafter: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return one draw of each row from the dense model's law, which is the drafted token as often as it can be.

        keep x ~ q with probability min(1, p(x) / q(x)), else draw from max(p - q, 0) / sum max(p - q, 0)

    An identity: P(x) = min(p, q)(x) + (1 - sum min(p, q)) * residual(x) = p(x). Draws use torch's default generator.
    Source: Leviathan et al., Fast Inference from Transformers via Speculative Decoding, arXiv 2211.17192, appendix A.1.

    Args:
        law: p, float32 (b v), what the dense model would draw from.
        drafted: long (b), drawn from ``drafter``; None: nothing was drafted here.
        drafter: q, float32 (b v).

    Returns:
        Tokens, long (b), and refused, bool (b).
    """
    if drafted is None or drafter is None:
        tokens = torch.multinomial(law, 1).squeeze(1)
        return tokens, torch.zeros_like(tokens, dtype=torch.bool)
    at = drafted[:, None]
    ratio = (law.gather(1, at) / drafter.gather(1, at)).squeeze(1)
    refused = torch.rand_like(ratio) >= ratio
    residual = (law - drafter).clamp(min=0.0)
    # where p and q differ by rounding alone nothing is left to draw from, and p itself is as good
    residual = torch.where(residual.sum(1, keepdim=True) > 0, residual, law)
    return torch.where(refused, torch.multinomial(residual, 1).squeeze(1), drafted), refused
