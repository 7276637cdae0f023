"""What a policy skips against what the theory admits, by hand."""

from __future__ import annotations

import pytest
import torch

from adaskip.errors import DataError
from adaskip.theory.admission import agree

COST = torch.tensor([[0.1, 0.2, 0.9, 0.6]]) * torch.linspace(0.8, 1.2, 10)[:, None]


def test_a_plan_by_hand() -> None:
    """Layers 0 and 1 are admissible, 1 and 2 go; catches inside and outside swapped, and the union counted twice."""
    found = agree(torch.tensor([0.0, 1.0, 1.0, 0.0]), [0, 1], COST)
    assert found.jaccard == pytest.approx(1 / 3)
    assert (found.inside, found.outside) == (pytest.approx(0.2), pytest.approx(0.9))
    assert found.difference is not None
    assert found.difference.estimate == pytest.approx(0.7)
    assert found.difference.low > 0
    assert found.p == pytest.approx(2**-10)  # all ten inputs agree


def test_what_skips_by_the_input_counts_by_its_share() -> None:
    found = agree(torch.tensor([0.5, 0.25, 0.0, 0.25]), [0, 1], COST)
    assert found.jaccard == pytest.approx(0.75 / 2.25)
    assert found.inside == pytest.approx((0.5 * 0.1 + 0.25 * 0.2) / 0.75)
    assert found.outside == pytest.approx(0.6)


def test_the_order_is_that_of_the_cheapest_layers() -> None:
    assert agree(torch.tensor([1.0, 0.7, 0.0, 0.2]), [0], COST).spearman == pytest.approx(1.0)
    assert agree(torch.tensor([0.0, 0.1, 1.0, 0.5]), [0], COST).spearman == pytest.approx(-1.0)


def test_a_few_dear_inputs_count_by_what_they_cost() -> None:
    """Outside costs a fifth of the inputs much, and all others a little less: its mean is larger; catches ranks."""
    cost = torch.tensor([[0.02, 0.01]]).repeat(40, 1)
    cost[:8, 1] = 1.0
    found = agree(torch.tensor([1.0, 1.0]), [0], cost)
    assert found.outside == pytest.approx(0.208)
    assert found.p is not None
    assert found.p < 0.01


def test_one_side_alone_tells_no_difference() -> None:
    """Catches a mean over nothing, which is NaN."""
    inside = agree(torch.tensor([1.0, 0.0, 0.0, 0.0]), [0, 1], COST)
    assert (inside.outside, inside.difference, inside.p) == (None, None, None)
    nothing = agree(torch.zeros(4), [], COST)
    assert (nothing.jaccard, nothing.spearman, nothing.inside) == (1.0, None, None)


def test_shapes_are_checked() -> None:
    with pytest.raises(DataError, match=r"expected costs \(n l\) and a share \(l\), got \(10, 4\), \(3,\)"):
        agree(torch.zeros(3), [], COST)
