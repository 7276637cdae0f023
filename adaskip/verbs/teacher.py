"""Read the data's own answers by teacher forcing: dense, routed, and along a static plan, token by token."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from adaskip.batch import Batch
from adaskip.runtime.attach import RoutedModel
from adaskip.survey.record import record
from adaskip.theory.costs import WIDE, per_input

ROWS = 16
"""Inputs read at once under a wide vocabulary: three sides' logits of every predicted token are in memory together."""
_AT_ONCE = 64
"""Predicted tokens whose likelihoods are taken at once, so that no second copy of all logits is made."""


@dataclass(frozen=True)
class Forced:
    """Hold what one side gives the data's own answers, (n) each; float64 on the CPU."""

    tokens: Tensor  # how many are predicted
    log_likelihood: Tensor  # of the whole answer, nats
    kl: Tensor  # exact KL(dense || side), nats per predicted token; 0 of the dense side
    same: Tensor  # predicted tokens whose argmax is the dense model's

    def figures(self) -> dict[str, float]:
        """Return the side's figures on these inputs.

        ``kl`` and ``log_likelihood`` are means over inputs of each input's mean over its tokens. ``token_agreement``
        and ``perplexity``, exp of the mean negative log-likelihood of a token, count every token alike.
        """
        tokens = self.tokens.sum()
        return {
            "kl": float(self.kl.mean()),
            "log_likelihood": float((self.log_likelihood / self.tokens).mean()),
            "token_agreement": float(self.same.sum() / tokens),
            "perplexity": float((-self.log_likelihood.sum() / tokens).exp()),
        }


@torch.no_grad()
def read_answers(model: RoutedModel, batches: Iterable[Batch], skip: Sequence[int] | None) -> dict[str, Forced]:
    """Read answers by each side: ``dense``, ``routed``, and ``static`` where a plan is named.

    Args:
        model: routed.
        batches: prompts with answers.
        skip: the sites that the static plan leaves out; None: there is none.
    """
    parts = [_read(model, batch.to(model.spec.device), skip) for batch in batches]
    return {side: join([part[side] for part in parts]) for side in parts[0]}


def join(parts: Sequence[Forced]) -> Forced:
    """Put the inputs of several together, in order."""
    return Forced(**{f.name: torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Forced)})


def rows_at_once(model: RoutedModel, batch_size: int) -> int:
    """Return how many of ``batch_size`` inputs may be read at once, for the memory that their logits take."""
    wide = model.backbone.config.get_text_config(decoder=True).vocab_size > WIDE
    return min(batch_size, ROWS) if wide else batch_size


def _read(model: RoutedModel, batch: Batch, skip: Sequence[int] | None) -> dict[str, Forced]:
    # without the states: every side runs all of its layers, and only scored tokens pass a wide head
    dense = record(model, batch, states=False)
    logits = {"dense": dense.logits, "routed": record(model, batch, routed=True, states=False).logits}
    if skip is not None:
        logits["static"] = dense.rerun(dense.skipping(skip))
    supervised = batch.supervised
    targets = batch.labels[:, 1:][supervised]
    count, best = supervised.sum(1), dense.logits.argmax(-1)

    def total(values: Tensor) -> Tensor:
        return (per_input(values.double(), supervised, "mean") * count).cpu()

    return {
        side: Forced(
            tokens=count.double().cpu(),
            log_likelihood=total(log_likelihood(own, targets)),
            kl=torch.zeros(len(batch)).double() if side == "dense" else dense.compare(own)["kl"].double().cpu(),
            same=total(own.argmax(-1) == best),
        )
        for side, own in logits.items()
    }


def log_likelihood(logits: Tensor, targets: Tensor) -> Tensor:
    """Return log p of each target, (k v) and long (k) -> float32 (k), a few tokens at a time.

    >>> round(log_likelihood(torch.zeros(1, 4), torch.tensor([2])).exp().item(), 6)
    0.25
    """
    parts = [
        own.float().log_softmax(-1).gather(1, target[:, None])[:, 0]
        for own, target in zip(logits.split(_AT_ONCE), targets.split(_AT_ONCE), strict=True)
    ]
    return torch.cat(parts)
