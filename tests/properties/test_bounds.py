"""Attempts to break every link of the chain: random mass, adversarial draws, closed forms, attained extremes."""

import itertools
import math
from decimal import Decimal, localcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from adaskip.errors import ConfigError, DataError
from adaskip.theory.bounds import (
    argmax_certified_kl,
    argmax_certified_margin,
    compose,
    cosine_band,
    distance_sq,
    fano,
    geometric_from_proximal,
    information_lost,
    joint_shift,
    kl_bennett,
    kl_exact,
    kl_lower,
    kl_quadratic,
    kl_range,
    kl_two_point,
    logit_shift,
    proximal_from_geometric,
    redundancy_bound,
    risk_shift,
    tv_from_kl,
    tv_from_range,
)
from tests.properties.inequalities import F64, no_more_than

MASS = [pytest.param(100_000, id="1e5"), pytest.param(1_000_000, id="1e6", marks=pytest.mark.slow)]
DRAWN_DTYPES = [torch.float64, torch.float32, torch.float16]


def tensor(*values):
    return torch.tensor(values, dtype=F64)


def draw_batches(n, seed=0, size=25_000):
    """n pairs (Z, Z') of logits in batches: mild to near-deterministic, dense to sparse changes, 1e-7 to 1e3 large."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=F64)

    for index in range(n // size):
        vocab = (2, 3, 6, 17)[index % 4]
        magnitude = torch.rand(size, 1, generator=generator, dtype=F64)
        logits = normal(size, vocab) * 10 ** (magnitude * 4 - 2)
        scale = 10 ** (torch.rand(size, 1, generator=generator, dtype=F64) * 10 - 7)
        heavy = normal(size, vocab).clamp(-3, 3) ** 3
        sparse = normal(size, vocab) * (torch.rand(size, vocab, generator=generator) < 0.3)
        kind = torch.randint(3, (size, 1), generator=generator)
        change = torch.where(kind == 0, normal(size, vocab), torch.where(kind == 1, heavy, sparse))
        yield logits, logits + scale * change


def kl_reference(logits, logits_skipped):
    """KL in 60 decimal digits, one row, from its definition."""
    with localcontext() as context:
        context.prec = 60
        rows = [[Decimal(v) for v in row.double().tolist()] for row in (logits, logits_skipped)]
        log_p, log_q = ([v - sum((w.exp() for w in row), Decimal(0)).ln() for v in row] for row in rows)
        return float(sum((a.exp() * (a - b) for a, b in zip(log_p, log_q, strict=True)), Decimal(0)))


def two_point_reference(s, u):
    with localcontext() as context:
        context.prec = 60
        s, u = Decimal(s), Decimal(u)
        return float(((u * u * (-s * s / u).exp() + s * s * u.exp()) / (u * u + s * s)).ln())


reals = st.floats(-1e4, 1e4, allow_subnormal=False)
vectors = st.integers(2, 9).flatmap(
    lambda n: st.tuples(*(hnp.arrays("float64", n, elements=reals) for _ in range(2))).map(
        lambda pair: tuple(map(torch.from_numpy, pair))
    )
)


# Links 1, 2, 6b


@settings(deadline=None)
@given(hnp.arrays("float64", st.integers(1, 30), elements=st.floats(0, 2)), st.floats(1e-6, 2))
def test_geometric_and_proximal_bound_each_other(sample, delta):
    distances = torch.from_numpy(sample)
    eps, tau = distances.mean(), (distances > delta).double().mean()
    assert no_more_than(tau, proximal_from_geometric(eps, delta))
    assert no_more_than(eps, geometric_from_proximal(delta, tau))


def test_geometric_and_proximal_are_attained():
    assert proximal_from_geometric(0.25 * 0.4, 0.4).item() == pytest.approx(0.25)  # mass 1/4 at delta, the rest at 0
    assert geometric_from_proximal(0.5, 0.25).item() == 0.75 * 0.5 + 0.25 * 2.0
    assert proximal_from_geometric(0.9, 0.1).item() == 1.0


@pytest.mark.parametrize("delta", [0.0, -0.1])
def test_proximal_refuses_a_useless_delta(delta):
    with pytest.raises(ConfigError, match="expected delta > 0, got"):
        proximal_from_geometric(0.1, delta)


@settings(deadline=None)
@given(vectors)
def test_distance_sq_is_the_cosine_rule(pair):
    u, v = (x + 1e-3 for x in pair)
    norm_u, norm_v = u.norm(), v.norm()
    if norm_u == 0 or norm_v == 0:
        return
    found = distance_sq(norm_u, norm_v, (u @ v) / (norm_u * norm_v))
    assert found.item() == pytest.approx(((u - v) ** 2).sum().item(), rel=1e-9, abs=1e-12 * (norm_u * norm_v).item())


@pytest.mark.parametrize("n", MASS)
def test_a_band_is_no_further_than_its_steps_allow(n):
    generator = torch.Generator().manual_seed(1)
    first = torch.nn.functional.normalize(torch.randn(n, 1, 3, generator=generator, dtype=F64), dim=-1)
    scale = 10 ** (torch.rand(n, 1, 1, generator=generator, dtype=F64) * 5 - 4)
    path = first + (scale * torch.randn(n, 5, 3, generator=generator, dtype=F64)).cumsum(1)
    path = torch.nn.functional.normalize(torch.cat([first, path], 1), dim=-1)
    steps = ((path[:, 1:] - path[:, :-1]) ** 2).sum(-1) / 2
    whole = ((path[:, -1] - path[:, 0]) ** 2).sum(-1) / 2
    assert no_more_than(whole, cosine_band(steps))
    assert (whole > steps.sum(-1) * 1.5).any()  # adding 1 - cos itself is no bound


def test_a_band_of_equal_small_turns_grows_like_the_square():
    angle = 1e-3
    steps = torch.full((4,), 1 - math.cos(angle), dtype=F64)
    assert cosine_band(steps).item() == pytest.approx(1 - math.cos(4 * angle), rel=1e-5)
    assert cosine_band(torch.full((4,), 2.0)).item() == 2.0


# Link 3


@pytest.mark.parametrize("n", MASS)
def test_every_bound_holds_on_random_logits(n):
    estimator_too_low = 0
    for logits, skipped in draw_batches(n):
        shift, kl = logit_shift(logits, skipped), kl_exact(logits, skipped)
        two_point = kl_two_point(shift.s, shift.u)
        assert kl.isfinite().all()
        assert no_more_than(torch.zeros_like(kl), kl)
        assert no_more_than(kl, two_point)
        assert no_more_than(two_point, kl_bennett(shift.s, shift.u))
        assert no_more_than(two_point, shift.u)
        assert no_more_than(kl, kl_range(shift.r))
        assert no_more_than(kl_lower(shift.s, shift.b), kl)
        assert no_more_than(shift.s**2, shift.u * shift.b)
        tv = (torch.softmax(logits, -1) - torch.softmax(skipped, -1)).abs().sum(-1) / 2
        assert no_more_than(tv, tv_from_range(shift.r) + 1e-15)
        assert no_more_than(tv, tv_from_kl(kl) + 1e-15)
        estimator_too_low += int((kl_quadratic(shift.s) < 0.99 * kl).sum())
    assert estimator_too_low > n / 100  # s^2/2 is an estimator, and must never be sold as a bound


@settings(deadline=None, max_examples=300)
@given(vectors)
def test_every_bound_holds_on_adversarial_logits(pair):
    logits, skipped = pair
    shift, kl = logit_shift(logits, skipped), kl_exact(logits, skipped)
    two_point = kl_two_point(shift.s, shift.u)
    assert kl.isfinite()
    assert kl >= 0
    assert no_more_than(kl, two_point + 1e-15)
    assert no_more_than(two_point, torch.minimum(shift.u, kl_bennett(shift.s, shift.u)))
    assert no_more_than(kl, kl_range(shift.r) + 1e-15)
    assert no_more_than(kl_lower(shift.s, shift.b), kl + 1e-15)


def test_a_shift_of_probabilities_that_underflow_is_not_lost():
    logits, skipped = tensor(2000.0, 0.0), tensor(0.0, 0.0)
    shift = logit_shift(logits, skipped)
    assert kl_exact(logits, skipped).item() == pytest.approx(math.log(2))
    assert math.log(2) <= kl_two_point(shift.s, shift.u) <= shift.u
    assert kl_two_point(1e-200, 1e4) > 9000


@pytest.mark.parametrize("dtype", DRAWN_DTYPES)
@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0, 30.0])
def test_half_precision_logits_are_read_in_float64(dtype, scale):
    generator = torch.Generator().manual_seed(2)
    logits = (20 * torch.randn(500, 40, generator=generator)).to(dtype)
    skipped = (logits.float() + scale * torch.randn(500, 40, generator=generator)).to(dtype)
    shift, kl = logit_shift(logits, skipped), kl_exact(logits, skipped)
    assert kl.dtype == shift.s.dtype == F64
    torch.testing.assert_close(kl, kl_exact(logits.double(), skipped.double()), rtol=0, atol=0)
    assert no_more_than(kl, kl_two_point(shift.s, shift.u))
    if scale == 0:
        assert not any(x.any() for x in (kl, shift.r, shift.s, shift.u, shift.b))


@pytest.mark.parametrize("scale", [1e-9, 1e-5, 1e-2, 1.0, 30.0, 300.0])
@pytest.mark.parametrize("sharpness", [0.1, 5.0, 200.0])
def test_kl_exact_matches_sixty_digit_arithmetic(scale, sharpness):
    generator = torch.Generator().manual_seed(3)
    logits = sharpness * torch.randn(5, 7, generator=generator)
    skipped = logits.double() + scale * torch.randn(5, 7, generator=generator)
    expected = tensor(*(kl_reference(z, z2) for z, z2 in zip(logits, skipped, strict=True)))
    torch.testing.assert_close(kl_exact(logits, skipped), expected, rtol=1e-5, atol=1e-25)


def test_kl_exact_is_the_integral_of_the_tilted_variance():
    logits, dz = tensor(1.0, -2.0, 0.5, 0.0), tensor(-1.0, 2.0, 3.0, 0.3)
    t = torch.linspace(0, 1, 20_001, dtype=F64).unsqueeze(-1)
    p = torch.softmax(logits + t * dz, -1)
    variance = (p * dz**2).sum(-1) - (p * dz).sum(-1) ** 2
    integral = torch.trapezoid((1 - t.squeeze(-1)) * variance, t.squeeze(-1))
    assert kl_exact(logits, logits + dz).item() == pytest.approx(integral.item(), rel=1e-7)


@settings(deadline=None)
@given(st.floats(1e-6, 1 - 1e-6), st.floats(1e-6, 1 - 1e-6))
def test_kl_exact_of_two_classes_is_the_textbook_formula(p, q):
    expected = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    found = kl_exact(tensor(p, 1 - p).log(), tensor(q, 1 - q).log() + 5.0)
    assert found.item() == pytest.approx(expected, rel=1e-6, abs=1e-13)


def test_kl_exact_has_the_gradient_of_a_cross_entropy():
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(3, 5, generator=generator, dtype=F64) * 3
    skipped = (torch.randn(3, 5, generator=generator, dtype=F64) * 1e3).requires_grad_()
    kl_exact(logits, skipped).sum().backward()
    torch.testing.assert_close(skipped.grad, torch.softmax(skipped.detach(), -1) - torch.softmax(logits, -1))


def test_words_outside_the_vocabulary_change_nothing():
    logits, skipped = tensor(3.0, 1.0, 0.0), tensor(9.0, 9.0, 8.0)
    absent = tensor(-math.inf, -math.inf)
    wide, wide_skipped = torch.cat([logits, absent]), torch.cat([skipped, absent])
    assert kl_exact(wide, wide_skipped) == kl_exact(logits, skipped)
    assert logit_shift(wide, wide_skipped) == logit_shift(logits, skipped)
    assert argmax_certified_margin(wide, wide_skipped) == argmax_certified_margin(logits, skipped)
    assert kl_exact(logits, tensor(0.0, 0.0, -math.inf)).isnan()


@pytest.mark.parametrize("function", [logit_shift, kl_exact, argmax_certified_margin])
def test_logits_of_two_shapes_are_refused(function):
    with pytest.raises(DataError, match=r"of one shape, got \(2, 5\) and \(2, 6\)"):
        function(torch.zeros(2, 5), torch.zeros(2, 6))


GRID = [0.0, 1e-12, 1e-8, 1e-5, 1e-3, 0.03, 0.3, 0.49, 0.51, 1.0, 3.0, 20.0, 300.0, 1e4]


@pytest.mark.parametrize(("s", "u"), [(s, u) for s in GRID[1:] for u in GRID[1:]])
def test_two_point_matches_sixty_digit_arithmetic(s, u):
    assert kl_two_point(s, u).item() == pytest.approx(two_point_reference(s, u), rel=1e-11, abs=0)


@pytest.mark.parametrize("bound", [kl_two_point, kl_bennett, kl_lower])
def test_bounds_are_finite_with_finite_gradients(bound):
    s, u = (x.clone().requires_grad_() for x in torch.cartesian_prod(tensor(*GRID), tensor(*GRID)).unbind(-1))
    value = bound(s, u)
    value.sum().backward()
    assert value.isfinite().all()
    assert s.grad.isfinite().all()
    assert u.grad.isfinite().all()
    assert not value[s == 0].any()


def test_two_point_is_zero_without_spread_or_reach_and_never_above_u():
    grid = tensor(*GRID)
    assert not kl_two_point(grid, 0.0).any()
    assert not kl_two_point(0.0, grid).any()
    s, u = torch.cartesian_prod(grid, grid).unbind(-1)
    assert (kl_two_point(s, u) <= u).all()
    assert kl_two_point(math.inf, 2.0).item() == pytest.approx(2.0)
    assert kl_two_point(2.0, math.inf).item() == math.inf
    assert kl_bennett(2.0, math.inf).item() == math.inf
    assert kl_two_point(math.nan, 1.0).isnan()
    assert kl_two_point(1.0, math.nan).isnan()


def test_two_point_increases_in_both_arguments():
    grid = torch.logspace(-6, 4, 120, dtype=F64)
    value = kl_two_point(grid.unsqueeze(1), grid.unsqueeze(0))
    assert no_more_than(value[:-1], value[1:])
    assert no_more_than(value[:, :-1], value[:, 1:])


def test_two_point_gradient_agrees_with_differences():
    s, u = (tensor(0.02, 0.7, 5.0, 2.0, 0.3).requires_grad_(), tensor(0.5, 0.3, 2.0, 60.0, 900.0).requires_grad_())
    assert torch.autograd.gradcheck(kl_two_point, (s, u), eps=1e-7, atol=1e-5)


@settings(deadline=None)
@given(st.floats(0.001, 0.999), st.floats(1e-3, 30))
def test_two_point_is_attained_by_two_classes(p, change):
    logits, skipped = tensor(p, 1 - p).log(), tensor(p, 1 - p).log() + tensor(change, 0.0)
    shift = logit_shift(logits, skipped)
    assert kl_two_point(shift.s, shift.u).item() == pytest.approx(kl_exact(logits, skipped).item(), rel=1e-9)


@settings(deadline=None)
@given(st.floats(1e-3, 30))
def test_total_variation_bound_is_attained_by_two_classes(r):
    logits, skipped = tensor(-r / 4, r / 4), tensor(r / 4, -r / 4)
    tv = (torch.softmax(logits, -1) - torch.softmax(skipped, -1)).abs().sum() / 2
    assert tv_from_range(logit_shift(logits, skipped).r).item() == pytest.approx(tv.item(), rel=1e-9)


@pytest.mark.parametrize("n", MASS)
def test_risk_moves_no_further_than_total_variation(n):
    generator = torch.Generator().manual_seed(5)
    for logits, skipped in draw_batches(n, seed=5):
        p, q = torch.softmax(logits, -1), torch.softmax(skipped, -1)
        tv, gap = (p - q).abs().sum(-1) / 2, p - q
        worst = torch.where(gap > 0, 3.0, 0.0)  # the loss in [0, 3] that feels the change most attains the bound
        anyhow = 3.0 * torch.rand(p.shape, generator=generator, dtype=F64)
        assert no_more_than((gap * anyhow).sum(-1).abs(), risk_shift(tv, 3.0) + 1e-14)
        torch.testing.assert_close((gap * worst).sum(-1), risk_shift(tv, 3.0), rtol=1e-9, atol=1e-14)


# Link 3d


@pytest.mark.parametrize("dtype", DRAWN_DTYPES)
@pytest.mark.parametrize("n", MASS)
def test_certified_argmax_never_moves(n, dtype):
    margin_count = kl_count = moved_count = 0
    for logits, skipped in draw_batches(n, seed=6):
        logits, skipped = logits.to(dtype), skipped.to(dtype)
        finite = logits.isfinite().all(-1) & skipped.isfinite().all(-1)
        logits, skipped = logits[finite], skipped[finite]
        best = logits.argmax(-1, keepdim=True)
        # a rival at least as high as the old top, so a tie counts as moved
        rivals = skipped.scatter(-1, best, -math.inf).amax(-1)
        moved = rivals >= skipped.gather(-1, best).squeeze(-1)
        by_margin = argmax_certified_margin(logits, skipped)
        by_kl = argmax_certified_kl(logits, kl_exact(logits, skipped))
        assert not (moved & (by_margin | by_kl)).any()
        margin_count, kl_count = margin_count + int(by_margin.sum()), kl_count + int(by_kl.sum())
        moved_count += int(moved.sum())
    assert min(margin_count, kl_count, moved_count) > n / 10  # certificates are given, and there was something to catch


@settings(deadline=None)
@given(vectors)
def test_margin_certificate_on_adversarial_logits(pair):
    logits, skipped = pair
    if argmax_certified_margin(logits, skipped):
        top = logits.argmax()
        assert (skipped >= skipped[top]).sum() == 1


@settings(deadline=None)
@given(st.floats(-50, 0), st.floats(1e-6, 40), st.floats(-60, 0))
def test_certificates_are_tight(second, gap, third):
    logits = torch.tensor([second + gap, second, second + third], dtype=F64)
    p = torch.softmax(logits, -1)
    tie = logits.clone()
    tie[:2] = ((p[0] + p[1]) / 2).log() + torch.logsumexp(
        logits, -1
    )  # the nearest p' whose argmax is not the dense one
    kl = kl_exact(logits, tie)
    assert not argmax_certified_kl(logits, kl)
    assert argmax_certified_kl(logits, kl * (1 - 1e-5))
    lift = logits + tensor(0.0, gap, 0.0)
    assert not argmax_certified_margin(logits, lift)
    assert argmax_certified_margin(logits, logits + tensor(0.0, gap * (1 - 1e-6), 0.0))


def test_rounding_never_certifies_a_tie():
    generator = torch.Generator().manual_seed(10)
    logits = torch.randn(100_000, 3, generator=generator, dtype=F64)
    skipped = torch.randn(100_000, 3, generator=generator, dtype=F64)
    top, second = logits.topk(2).indices.unbind(-1)
    skipped[range(100_000), second] = skipped[range(100_000), top]
    assert not argmax_certified_margin(logits, skipped).any()


def test_ties_and_unknown_kl_are_never_certified():
    tie = tensor(1.0, 1.0, 0.0)
    assert not argmax_certified_margin(tie, tie)
    assert not argmax_certified_kl(tie, 0.0)
    assert not argmax_certified_kl(tensor(9.0, 0.0), math.nan)


# Links 4 and 5


@settings(deadline=None)
@given(st.integers(1, 12), st.integers(2, 6), st.integers(1, 4), st.integers(0, 10**6))
def test_functional_cost_splits_into_information_and_a_remainder(n, labels, n_cells, seed):
    generator = torch.Generator().manual_seed(seed)
    p = torch.softmax(4 * torch.randn(n, labels, generator=generator, dtype=F64), -1)
    cells = torch.randint(n_cells, (n,), generator=generator) * 7 - 3
    q = torch.softmax(4 * torch.randn(n_cells, labels, generator=generator, dtype=F64), -1)[(cells + 3) // 7]
    mean = torch.stack([p[cells == c].mean(0) for c in cells])
    functional, remainder = (kl_exact(a.log(), q.log()).mean() for a in (p, mean))
    information = information_lost(p, cells)
    assert information.item() == pytest.approx((functional - remainder).item(), rel=1e-9, abs=1e-13)
    assert no_more_than(information, functional)


def test_information_lost_in_closed_form():
    p = tensor(0.9, 0.1)
    entropy = -(p * p.log()).sum().item()
    channel = torch.stack([p, p.flip(0)])  # binary symmetric, uniform input: log 2 - h_b(0.1)
    assert information_lost(channel, torch.tensor([5, 5])).item() == pytest.approx(math.log(2) - entropy)
    assert information_lost(channel, torch.tensor([0, 1])).item() == 0.0
    assert information_lost(torch.eye(4), torch.zeros(4, dtype=torch.long)).item() == pytest.approx(math.log(4))


@settings(deadline=None)
@given(st.integers(2, 6), st.integers(0, 10**6), st.floats(0.05, 3))
def test_fano_bounds_the_quantised_entropy(codes, seed, sharpness):
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(codes, codes, generator=generator, dtype=F64) + sharpness * 4 * torch.eye(codes, dtype=F64)
    joint = torch.softmax(table.flatten(), 0).reshape(codes, codes)
    entropy = -(joint * (joint / joint.sum(1, keepdim=True)).log()).sum()
    assert no_more_than(entropy, fano(1 - joint.trace(), codes))


@pytest.mark.parametrize("codes", [2, 3, 10])
def test_fano_is_attained_by_a_symmetric_channel(codes):
    channel = torch.full((codes, codes), 0.3 / (codes - 1), dtype=F64).fill_diagonal_(0.7)
    entropy = -(channel[0] * channel[0].log()).sum().item()
    assert fano(0.3, codes).item() == pytest.approx(entropy)
    assert fano(0.0, codes).item() == 0.0
    with pytest.raises(ConfigError, match="expected K >= 2 codes, got 1"):
        fano(0.3, 1)


# Link 6a


@pytest.mark.parametrize("n", MASS)
def test_increments_along_a_path_bound_the_whole(n):
    generator = torch.Generator().manual_seed(7)
    for logits, first in draw_batches(n, seed=7):
        path = [logits, first]
        for _ in range(2):
            path.append(path[-1] + (first - logits).roll(1, -1) * torch.randn(1, generator=generator, dtype=F64))
        steps = [logit_shift(a, b, reference=logits) for a, b in itertools.pairwise(path)]
        total, whole = compose(steps), logit_shift(logits, path[-1])
        for name in "rsub":
            # rounding in the centred dz is relative to its size, not to a small u or s
            assert no_more_than(getattr(whole, name), getattr(total, name) + 1e-14 * total.r)
        kl = kl_exact(logits, path[-1])
        assert no_more_than(kl, kl_two_point(total.s, total.u) + 1e-20)
        assert no_more_than(kl, kl_range(total.r) + 1e-20)


def test_increments_under_the_wrong_reference_or_from_single_layers_break():
    path = [tensor(0.0, 0.0), tensor(20.0, 0.0), tensor(40.0, 0.0)]
    whole = logit_shift(path[0], path[2])
    moving = compose([logit_shift(a, b) for a, b in itertools.pairwise(path)])
    fixed = compose([logit_shift(a, b, reference=path[0]) for a, b in itertools.pairwise(path)])
    assert moving.s < 0.6 * whole.s
    assert fixed.s == whole.s
    alone = logit_shift(path[0], path[1])  # two interacting layers: each alone moves 20, both together 60
    assert kl_exact(path[0], tensor(60.0, 0.0)) > kl_two_point(*(getattr(compose([alone, alone]), x) for x in "su"))


def test_compose_needs_increments():
    with pytest.raises(ConfigError, match="expected at least one LogitShift, got none"):
        compose([])


# The redundancy bound


def test_joint_shift_is_the_mean_square_over_hard_gates():
    generator = torch.Generator().manual_seed(8)
    gates, costs = torch.rand(4, 6, generator=generator, dtype=F64), torch.rand(4, 6, generator=generator, dtype=F64)
    mean_square = torch.zeros(4, dtype=F64)
    for hard in itertools.product([0.0, 1.0], repeat=6):
        keep = tensor(*hard)
        chance = torch.where(keep == 1, gates, 1 - gates).prod(-1)
        mean_square += chance * ((1 - keep) * costs).sum(-1) ** 2
    torch.testing.assert_close(joint_shift(gates, costs), mean_square.sqrt())


def test_hard_gates_give_the_bound_of_the_skipped_layers():
    gates = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    s, u = torch.tensor([0.4, 0.2, 0.1]).expand(3, 3), torch.tensor([2.0, 3.0, 4.0]).expand(3, 3)
    expected = kl_two_point(tensor(0.3, 0.0, 0.7), tensor(7.0, 0.0, 9.0)).float()
    torch.testing.assert_close(redundancy_bound(gates, s, u), expected)
    torch.testing.assert_close(redundancy_bound(gates, s), torch.tensor([0.045, 0.0, 0.245]))


@pytest.mark.parametrize("with_u", [True, False])
def test_redundancy_bound_gradient_agrees_with_differences(with_u):
    generator = torch.Generator().manual_seed(9)
    gates = (0.05 + 0.9 * torch.rand(5, 4, generator=generator, dtype=F64)).requires_grad_()
    s = torch.rand(5, 4, generator=generator, dtype=F64)
    u = s * (1 + torch.rand(5, 4, generator=generator, dtype=F64)) if with_u else None
    assert torch.autograd.gradcheck(lambda g: redundancy_bound(g, s, u), gates)
    assert torch.autograd.gradcheck(lambda g: joint_shift(g, s), gates)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_u", [True, False])
def test_a_closed_router_has_no_bound_but_feels_each_skip(dtype, with_u):
    gates = torch.ones(2, 3, dtype=dtype, requires_grad=True)
    s = torch.tensor([[0.5, 2.0, 0.0], [1e-9, 1e4, 3.0]], requires_grad=True)
    u = torch.tensor([[1.0, 5.0, 0.0], [1e-9, 1e4, 0.0]], requires_grad=True)
    bound = redundancy_bound(gates, s, u if with_u else None)
    assert bound.tolist() == [0.0, 0.0]
    bound.sum().backward()
    torch.testing.assert_close(gates.grad.float(), -(s.detach() ** 2) / 2, rtol=1e-2, atol=1e-15)
    assert s.grad is None
    assert u.grad is None


def test_joint_shift_has_a_finite_gradient_where_nothing_is_skipped():
    gates = torch.ones(1, 3, requires_grad=True)
    joint_shift(gates, torch.ones(1, 3)).sum().backward()
    assert gates.grad.tolist() == [[0.0, 0.0, 0.0]]


@pytest.mark.parametrize("extreme", [0.0, 1e-12, 1e4])
def test_redundancy_bound_has_finite_gradients_at_extreme_gates_and_costs(extreme):
    corners = tensor(0.0, 1e-30, 1e-7, 0.5, 1 - 1e-15, 1.0)
    gates = torch.cartesian_prod(corners, corners, corners).requires_grad_()
    s, u = tensor(extreme, 1.0, 1e-6).expand_as(gates), tensor(1.0, extreme, 1e-8).expand_as(gates)
    bound = redundancy_bound(gates, s, u)
    bound.sum().backward()
    assert bound.isfinite().all()
    assert (bound >= 0).all()
    assert gates.grad.isfinite().all()


@settings(deadline=None)
@given(hnp.arrays("float64", (1, 4), elements=st.floats(0, 1)), st.integers(0, 3))
def test_keeping_a_layer_for_certain_never_raises_the_bound(gates, layer):
    gates = torch.from_numpy(gates)
    s, u = tensor(0.3, 1.0, 0.05, 2.0), tensor(1.0, 1.5, 0.4, 2.0)
    opened = gates.clone()
    opened[:, layer] = 1.0
    assert no_more_than(redundancy_bound(opened, s, u), redundancy_bound(gates, s, u))


def test_half_precision_gates_get_a_float32_bound():
    gates = torch.tensor([[0.25, 0.5]], dtype=torch.bfloat16)
    bound = redundancy_bound(gates, torch.ones(1, 2), torch.ones(1, 2))
    assert bound.dtype == torch.float32
    expected = redundancy_bound(gates.double(), torch.ones(1, 2), torch.ones(1, 2))
    assert bound.item() == pytest.approx(expected.item(), rel=1e-6)
