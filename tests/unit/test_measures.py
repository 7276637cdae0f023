import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cosine

from adaskip.errors import DataError
from adaskip.theory.measures import (
    TailCurve,
    attention_mass,
    cosine_distance,
    relative_change,
    spearman,
    token_cosine_distance,
)

NAN = math.nan


@pytest.fixture
def states():
    """Hidden states before and after a layer (b=3 t=5 d=8) and a mask; NaN stands in the padding."""
    generator = torch.Generator().manual_seed(0)
    before, after = torch.randn(2, 3, 5, 8, generator=generator)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 0], [0, 1, 0, 0, 0]]).bool()
    return before.masked_fill(~mask.unsqueeze(-1), NAN), after.masked_fill(~mask.unsqueeze(-1), NAN), mask


# Cosine distance


def test_token_cosine_distance_agrees_with_scipy(states):
    before, after, mask = states
    found = token_cosine_distance(before, after)
    for b, t in mask.nonzero().tolist():
        assert found[b, t].item() == pytest.approx(cosine(before[b, t].double(), after[b, t].double()), abs=1e-6)


def test_cosine_distance_is_the_mean_over_masked_tokens(states):
    before, after, mask = states
    tokens = token_cosine_distance(before, after)
    expected = torch.stack([row[keep].mean() for row, keep in zip(tokens, mask, strict=True)])
    torch.testing.assert_close(cosine_distance(before, after, mask), expected)
    torch.testing.assert_close(cosine_distance(before, after, mask.long()), expected)


@pytest.mark.parametrize("angle", [0.0, 1e-6, 1e-4, 0.1, 1.0, math.pi / 2, math.pi])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_small_angles_keep_their_digits(angle, dtype):
    before = torch.tensor([[[1.0, 0.0]]], dtype=dtype)
    after = torch.tensor([[[math.cos(angle), math.sin(angle)]]], dtype=torch.float64).to(dtype)
    expected = 2 * math.sin(angle / 2) ** 2
    assert token_cosine_distance(before, 3 * after).item() == pytest.approx(expected, rel=1e-3, abs=1e-14)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_states_accumulate_in_float32(dtype):
    generator = torch.Generator().manual_seed(1)
    before = (300 * torch.randn(2, 6, 512, generator=generator)).to(dtype)  # squares overflow float16
    after = (before.float() + 20 * torch.randn(2, 6, 512, generator=generator)).to(dtype)
    mask = torch.ones(2, 6).bool()
    for measure in (cosine_distance, relative_change):
        found = measure(before, after, mask)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), measure(before.double(), after.double(), mask), rtol=1e-4, atol=0)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1.0, 1e20, 1e30])
def test_cosine_distance_ignores_scale(scale):
    before, after = torch.tensor([[[1.0, 2.0, 2.0]]]), torch.tensor([[[2.0, 1.0, 2.0]]])
    assert token_cosine_distance(before * scale, after).item() == pytest.approx(1 / 9, rel=1e-6)


def test_zero_vectors_are_far_from_all_but_each_other():
    zero, other = torch.zeros(1, 1, 4), torch.ones(1, 1, 4)
    assert token_cosine_distance(zero, other).item() == 1.0
    assert token_cosine_distance(other, zero).item() == 1.0
    assert token_cosine_distance(zero, zero).item() == 0.0


def test_identical_states_are_at_distance_zero():
    generator = torch.Generator().manual_seed(2)
    h = torch.randn(4, 7, 33, generator=generator)
    mask = torch.ones(4, 7).bool()
    assert not cosine_distance(h, h, mask).any()
    assert not relative_change(h, h, mask).any()


# Relative change


def test_relative_change_is_the_mean_of_each_tokens_own_ratio(states):
    before, after, mask = states
    ratio = (after - before).norm(dim=-1) / after.norm(dim=-1)
    expected = [row[keep].mean().item() for row, keep in zip(ratio, mask, strict=True)]
    assert relative_change(before, after, mask).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("where", ["before", "after", "both"])
@pytest.mark.parametrize("place", [0, 3])
def test_sinks_do_not_move_the_relative_change(where, place):
    """A ratio of whole norms is the sink's own; a mean of ratios still is where a sink appears or goes."""
    generator = torch.Generator().manual_seed(4)
    before, after = torch.randn(2, 1, 9, 8, generator=generator)
    mask, others = torch.ones(1, 9).bool(), torch.arange(9) != place
    for states, name in ((before, "before"), (after, "after")):
        if where in (name, "both"):
            states[0, place] *= 1000
    alone = relative_change(before[:, others], after[:, others], mask[:, others])
    torch.testing.assert_close(relative_change(before, after, mask), alone)


def test_relative_change_of_zero_states():
    zero, one, mask = torch.zeros(1, 2, 3), torch.ones(1, 2, 3), torch.ones(1, 2).bool()
    assert relative_change(zero, zero, mask).item() == 0.0
    assert relative_change(one, zero, mask).item() == math.inf
    assert relative_change(zero, one, mask).item() == 1.0


# Masks


def test_an_empty_mask_is_undefined_for_that_row_alone(states):
    before, after, mask = states
    emptied = mask.clone()
    emptied[1] = False
    for measure in (cosine_distance, relative_change):
        found, full = measure(before, after, emptied), measure(before, after, mask)
        assert found[1].isnan()
        torch.testing.assert_close(found[[0, 2]], full[[0, 2]], rtol=0, atol=0)


def test_a_row_is_blind_to_its_batch_mates_and_padding(states):
    before, after, mask = states
    for measure in (cosine_distance, relative_change):
        alone = measure(before[1:2, 2:4], after[1:2, 2:4], torch.ones(1, 2).bool())
        torch.testing.assert_close(measure(before, after, mask)[1:2], alone)


def test_measures_refuse_shapes_that_do_not_fit():
    h, mask = torch.zeros(2, 3, 4), torch.ones(2, 3).bool()
    with pytest.raises(DataError, match=r"one shape \(b, t, d\), got \(2, 3, 4\) and \(2, 3, 5\)"):
        token_cosine_distance(h, torch.zeros(2, 3, 5))
    for measure in (cosine_distance, relative_change):
        with pytest.raises(DataError, match=r"mask: expected shape \(2, 3\), got \(2, 4\)"):
            measure(h, h, torch.ones(2, 4).bool())
        with pytest.raises(DataError, match=r"one shape \(b, t, d\)"):
            measure(h[0], h[0], mask)
    with pytest.raises(DataError, match=r"attention: expected \(b, h, q, k\), got \(2, 3, 4\)"):
        attention_mass(h, mask, mask)
    with pytest.raises(DataError, match=r"key_mask: expected shape \(2, 5\), got \(2, 3\)"):
        attention_mass(torch.zeros(2, 1, 3, 5), mask, mask)
    with pytest.raises(DataError, match=r"query_mask: expected shape \(2, 3\), got \(3, 2\)"):
        attention_mass(torch.zeros(2, 1, 3, 5), mask.T, mask)


# Attention


def test_attention_mass_agrees_with_a_loop():
    generator = torch.Generator().manual_seed(3)
    attention = torch.softmax(3 * torch.randn(2, 3, 4, 5, generator=generator), -1)
    queries = torch.tensor([[1, 0, 1, 1], [0, 0, 1, 0]]).bool()
    keys = torch.tensor([[1, 1, 0, 0, 0], [0, 0, 0, 1, 1]]).bool()
    expected = [
        torch.stack([attention[b, h, q, keys[b]].sum() for h in range(3) for q in range(4) if queries[b, q]]).mean()
        for b in range(2)
    ]
    torch.testing.assert_close(attention_mass(attention, queries, keys), torch.stack(expected))
    attention[0, :, 1] = NAN  # the row of a padded query
    torch.testing.assert_close(attention_mass(attention, queries, keys), torch.stack(expected))


def test_attention_mass_at_its_edges():
    attention = torch.full((2, 2, 3, 4), 0.25, dtype=torch.float16)
    some, none = torch.ones(2, 3).bool(), torch.zeros(2, 4).bool()
    assert attention_mass(attention, some, none).tolist() == [0.0, 0.0]
    assert attention_mass(attention, some, ~none).tolist() == [1.0, 1.0]
    assert attention_mass(attention, ~some, ~none).isnan().all()
    assert attention_mass(attention, some, none).dtype == torch.float32


# Tails


@settings(deadline=None)
@given(st.lists(st.floats(0, 2, width=32), min_size=1, max_size=40), st.floats(-0.5, 2.5, width=32))
def test_tail_counts_values_strictly_above(values, delta):
    expected = sum(v > delta for v in values) / len(values)
    sample = torch.tensor(values)
    assert TailCurve.of(sample)(delta).item() == pytest.approx(expected)
    assert TailCurve.of(sample)(torch.tensor([delta, max(values)])).tolist() == pytest.approx([expected, 0.0])


def test_tail_curve_keeps_the_whole_sample():
    curve = TailCurve.of(torch.tensor([[0.4, 0.1], [0.3, 0.2]]))
    assert curve.sample.tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert curve(0.3).item() == 0.25  # float32 0.3 is not above 0.3
    assert curve(torch.tensor([[0.0], [1.0]])).tolist() == [[1.0], [0.0]]
    assert curve.mean == pytest.approx(0.25)


@pytest.mark.parametrize(("values", "text"), [([], "got 0, 0 of them NaN"), ([1.0, NAN], "got 2, 1 of them NaN")])
def test_tail_refuses_undefined_samples(values, text):
    with pytest.raises(DataError, match=text):
        TailCurve.of(torch.tensor(values))


# Rank correlation


def test_spearman_ranks():
    x = torch.tensor([0.1, 0.4, 0.2, 0.9])
    assert spearman(x, x.exp()) == pytest.approx(1.0)
    assert spearman(x, -x) == pytest.approx(-1.0)
    assert spearman(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1.0, 3.0, 2.0, 4.0])) == pytest.approx(0.8)


def test_spearman_is_nan_where_undefined_and_refuses_unequal_lengths():
    assert math.isnan(spearman(torch.ones(4), torch.arange(4.0)))
    assert math.isnan(spearman(torch.ones(1), torch.ones(1)))
    with pytest.raises(DataError, match="one length, got 3 and 4"):
        spearman(torch.ones(3), torch.ones(4))
