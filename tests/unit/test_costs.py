"""What a skip costs over a wide vocabulary: one dense side for many comparisons, and the digits of float64."""

from __future__ import annotations

import pytest
import torch

from adaskip.theory import costs
from adaskip.theory.costs import Reference, compare_predicted

WIDE = 6000  # entries: more than are compared in float64


def pairs(size: float, tokens: int = 40) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, others that differ by about ``size``, and five rows of different lengths they predict."""
    draw = torch.Generator().manual_seed(0)
    dense = 3 * torch.randn(tokens, WIDE, generator=draw)
    supervised = torch.zeros(5, 20, dtype=torch.bool)
    for row, count in enumerate((2, 20, 9, 8, 1)):
        supervised[row, -count:] = True
    return dense, dense + size * torch.randn(tokens, WIDE, generator=draw), supervised


@pytest.mark.parametrize(("size", "close"), [(2.0, 1e-5), (0.3, 1e-5), (1e-3, 1e-3)])
def test_a_wide_vocabulary_is_compared_as_in_float64(size: float, close: float) -> None:
    """Catches float32 sums, and a KL of small shifts that cancels."""
    dense, routed, supervised = pairs(size)
    found, exact = Reference(dense).compare(routed, supervised), compare_predicted(dense, routed, supervised)
    assert list(found) == list(exact)
    for name, values in exact.items():
        assert (found[name] - values).abs().max() <= close * values.abs().max()
        assert found[name].dtype == torch.float64


def test_what_is_the_same_costs_nothing() -> None:
    dense, _, supervised = pairs(0)
    for values in Reference(dense).compare(dense.clone(), supervised).values():
        assert not values.any()


def test_a_token_outside_the_vocabulary_does_not_count() -> None:
    """Some models set the logits of unused entries to -inf; catches the NaN of their difference."""
    dense, routed, supervised = pairs(0.5)
    dense[:, 4000:], routed[:, 4000:] = -torch.inf, -torch.inf
    found, exact = Reference(dense).compare(routed, supervised), compare_predicted(dense, routed, supervised)
    for name, values in exact.items():
        assert torch.allclose(found[name], values, rtol=1e-5)


def test_one_likely_token_leaves_the_shift_its_digits() -> None:
    """All but one token of a near-deterministic softmax move; catches a mean that cancels against the likeliest."""
    dense, routed, supervised = pairs(1e-3)
    dense[:, 7] += 60
    routed[:, 7] += 60
    found, exact = Reference(dense).compare(routed, supervised), compare_predicted(dense, routed, supervised)
    assert torch.allclose(found["u"], exact["u"], rtol=1e-2)


def test_half_precision_logits_are_read_as_they_are() -> None:
    dense, routed, supervised = (t.bfloat16() if t.is_floating_point() else t for t in pairs(0.5))
    found = Reference(dense).compare(routed, supervised)
    assert torch.allclose(found["kl"], compare_predicted(dense, routed, supervised)["kl"], rtol=1e-5)


def test_memory_does_not_grow_with_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """So many tokens at once, whatever a batch holds: catches a comparison of them all."""
    seen: list[int] = []
    part = Reference._part
    monkeypatch.setattr(Reference, "_part", lambda self, z, start: seen.append(len(z)) or part(self, z, start))
    dense, routed, supervised = pairs(0.5)
    Reference(dense).compare(routed, supervised)
    assert sum(seen) == len(dense)
    assert max(seen) == costs._AT_ONCE


def test_a_small_vocabulary_keeps_every_digit() -> None:
    dense, routed, supervised = pairs(1e-5)
    dense, routed = dense[:, :100], routed[:, :100]
    for name, values in compare_predicted(dense, routed, supervised).items():
        assert torch.equal(Reference(dense).compare(routed, supervised)[name], values)
