"""The rule of acceptance: what it keeps and redraws is distributed as the dense model's own draws."""

from __future__ import annotations

import torch
from scipy.stats import chisquare

from adaskip.generate.accept import accept_sampled

DRAWS = 100_000
DENSE, DRAFTER = torch.tensor([0.125, 0.25, 0.375, 0.25, 0.0]), torch.tensor([0.3, 0.3, 0.1, 0.0, 0.3])


def test_tokens_have_the_dense_law_and_are_kept_as_often_as_they_can_be() -> None:
    """It fails where the residual is not what is redrawn from, or where acceptance is not min(1, p / q).

    Some tokens have no chance under one of the two laws, as behind ``top_k``.
    """
    torch.manual_seed(0)
    p, q = DENSE.expand(DRAWS, -1), DRAFTER.expand(DRAWS, -1)
    drafted = torch.multinomial(q, 1).squeeze(1)
    tokens, refused = accept_sampled(p, drafted, q)
    counts = torch.bincount(tokens, minlength=5)
    assert counts[4] == 0
    assert chisquare(counts[:4].numpy(), (DENSE[:4].double() * DRAWS).numpy()).pvalue > 1e-3
    assert torch.equal(tokens[~refused], drafted[~refused])
    kept = float(torch.minimum(DENSE, DRAFTER).sum())
    assert abs(float((~refused).float().mean()) - kept) < 0.01


def test_a_drafter_of_the_same_law_is_never_refused() -> None:
    law = DENSE.expand(1000, -1)
    drafted = torch.multinomial(law, 1).squeeze(1)
    tokens, refused = accept_sampled(law, drafted, law)
    assert not refused.any()
    assert torch.equal(tokens, drafted)
