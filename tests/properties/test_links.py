"""Attempts to break the links that speak of states, attention, information and many layers; closed forms."""

import itertools
import math

import pytest
import torch

from adaskip.errors import DataError
from adaskip.theory.bounds import (
    argmax_kl_limit,
    distance_sq,
    fano,
    fisher_form,
    gate_matrix,
    geometric_from_proximal,
    information_lost,
    joint_quadratic,
    key_removal,
    kl_exact,
    kl_lower,
    kl_quadratic,
    kl_sequence,
    kl_two_point,
    logit_shift,
    proximal_from_geometric,
)
from adaskip.theory.conformal import conformal_quantile, conformal_rank, safe_ratio
from adaskip.theory.measures import token_cosine_distance
from tests.properties.inequalities import F64, no_more_than

MASS = [pytest.param(20_000, id="2e4"), pytest.param(1_000_000, id="1e6", marks=pytest.mark.slow)]


def first_order(readout, states, change):
    """Logits and their derivative along a change of the states."""
    return torch.func.jvp(readout, (states,), (change,))


def generator(seed):
    return torch.Generator().manual_seed(seed)


def wild(shape, draw):
    """Vectors of norms from 1e-8 to 1e12; a third of them float16 values, a fifth equal to their neighbour."""
    x = torch.randn(shape, generator=draw, dtype=F64)
    x = x * 10 ** (torch.rand((*shape[:-1], 1), generator=draw, dtype=F64) * 20 - 8)
    halves = torch.rand(shape[:-1], generator=draw) < 1 / 3
    x[halves] = x[halves].clamp(-6e4, 6e4).half().double()
    equal = torch.rand(shape[:-1], generator=draw) < 1 / 5
    return torch.where(equal.unsqueeze(-1), x.roll(1, 0), x)


# Links 1 and 2


@pytest.mark.parametrize("n", MASS)
def test_geometric_and_proximal_bound_each_other_on_any_sample(n):
    draw = generator(0)
    for _ in range(n // 20_000):
        spread = 10 ** (torch.rand(20_000, 1, generator=draw, dtype=F64) * 6 - 6)
        d = 2 * torch.rand(20_000, 7, generator=draw, dtype=F64) ** (1 / spread.clamp_min(0.05)) * spread
        d = torch.where(torch.rand(d.shape, generator=draw) < 0.1, 2.0, d)  # some tokens turn right round
        delta = 10 ** (torch.rand(20_000, generator=draw, dtype=F64) * 8 - 7.7)
        eps, tau = d.mean(-1), (d > delta.unsqueeze(-1)).double().mean(-1)
        assert no_more_than(tau, proximal_from_geometric(eps, delta))
        assert no_more_than(eps, geometric_from_proximal(delta, tau), 1e-15)


@pytest.mark.parametrize("n", MASS)
def test_the_cosine_rule_holds_for_any_norms(n):
    draw = generator(1)
    for _ in range(n // 20_000):
        u = wild((20_000, 6), draw)
        v = torch.where(torch.rand(20_000, 1, generator=draw) < 0.5, wild((20_000, 6), draw), u * 1.001)
        cosine_distance = token_cosine_distance(u.unsqueeze(0), v.unsqueeze(0))[0]
        found = distance_sq(u.norm(dim=-1), v.norm(dim=-1), 1 - cosine_distance)
        size = (u.norm(dim=-1) + v.norm(dim=-1)) ** 2
        assert ((found - ((u - v) ** 2).sum(-1)).abs() <= 1e-13 * size).all()


# Links 4, 5 and 10


@pytest.mark.parametrize("n", MASS)
def test_information_is_never_more_than_the_functional_cost(n):
    """Distributions over 4 labels from flat to deterministic, cells that merge inputs, any q that sees the cell."""
    draw = generator(2)
    scale = 10 ** (torch.rand(n, 1, generator=draw, dtype=F64) * 4 - 2)
    p = torch.softmax(scale * torch.randn(n, 4, generator=draw, dtype=F64), -1)
    cells = torch.randint(n // 50, (n,), generator=draw)
    q = torch.softmax(2 * torch.randn(n // 50, 4, generator=draw, dtype=F64), -1)[cells]
    functional = kl_exact(p.log(), q.log())
    mean = torch.zeros(n // 50, 4, dtype=F64).index_add(0, cells, p)
    mean = (mean / mean.sum(-1, keepdim=True))[cells]
    remainder = kl_exact(mean.log(), q.log())
    information = information_lost(p, cells)
    assert information.item() == pytest.approx((functional - remainder).mean().item(), rel=1e-9)
    assert information < functional.mean()


@pytest.mark.parametrize("n", MASS)
def test_fano_bounds_any_joint_table(n):
    draw = generator(3)
    for index in range(n // 20_000):
        codes = (2, 3, 6, 12)[index % 4]
        sharp = 10 ** (torch.rand(20_000, 1, generator=draw, dtype=F64) * 3 - 1)
        table = torch.randn(20_000, codes * codes, generator=draw, dtype=F64) * sharp
        diagonal = torch.eye(codes, dtype=F64).flatten() * torch.randn(20_000, 1, generator=draw, dtype=F64) * 20
        joint = torch.softmax(table + diagonal, -1).unflatten(-1, (codes, codes))
        marginal = joint.sum(-1)
        entropy = torch.special.entr(joint).sum((-1, -2)) - torch.special.entr(marginal).sum(-1)
        error = (joint.sum((-1, -2)) - joint.diagonal(dim1=-2, dim2=-1).sum(-1)).clamp(0, 1)
        assert no_more_than(entropy, fano(error, codes), 1e-12)


@pytest.mark.parametrize("n", MASS)
def test_the_kl_of_answers_is_the_mean_of_their_summed_token_kl(n):
    """Two-token chains, by enumerating all answers; token 0 ends an answer."""
    draw, vocab = generator(4), 3
    size = n // 5
    sharp = 10 ** (torch.rand(size, 1, 1, generator=draw, dtype=F64) * 3 - 1.5)
    rows = vocab + 1  # the first token's law, and the second's after each first token
    p, q = (sharp * torch.randn(size, rows, vocab, generator=draw, dtype=F64) for _ in range(2))
    kl, log_p, log_q = kl_exact(p, q), p.log_softmax(-1), q.log_softmax(-1)
    answers, mean = torch.zeros(size, dtype=F64), torch.zeros(size, dtype=F64)
    for first, second in itertools.product(range(vocab), range(vocab)):
        if first == 0 and second > 0:
            continue
        ended = first == 0
        a = log_p[:, 0, first] + (0 if ended else log_p[:, 1 + first, second])
        b = log_q[:, 0, first] + (0 if ended else log_q[:, 1 + first, second])
        answers += a.exp() * (a - b)
        tokens = torch.stack([kl[:, 0], kl[:, 1 + first]], 1)
        mean += a.exp() * kl_sequence(tokens, torch.tensor([[True, not ended]]).expand(size, 2))
    torch.testing.assert_close(mean, answers, rtol=1e-9, atol=1e-12)


# Link 6c


@pytest.mark.parametrize("n", MASS)
def test_the_gate_matrix_gives_the_joint_spread_of_additive_shifts(n):
    draw = generator(5)
    size = 20_000
    for _ in range(n // size):
        sharp = 10 ** (torch.rand(size, 1, generator=draw, dtype=F64) * 4 - 2)
        logits = torch.randn(size, 5, generator=draw, dtype=F64) * sharp
        scale = 10 ** (torch.rand(size, 3, 1, generator=draw, dtype=F64) * 6 - 4)
        dz = torch.randn(size, 3, 5, generator=draw, dtype=F64) * scale
        dz[: size // 10, 1] = -dz[: size // 10, 0]  # two layers that cancel
        G = gate_matrix(logits, logits.unsqueeze(1) + dz)
        keep = torch.randint(2, (size, 3), generator=draw).double()
        alone = logit_shift(logits.unsqueeze(1).expand(size, 3, 5), logits.unsqueeze(1) + dz).s
        joint = logit_shift(logits, logits + ((1 - keep).unsqueeze(-1) * dz).sum(1)).s
        noise = 1e-12 * (alone.sum(-1) ** 2 + (logits.abs().amax(-1) * 1e-3) ** 2)
        assert (G.diagonal(dim1=-2, dim2=-1) - alone**2).abs().le(1e-9 * alone**2 + noise.unsqueeze(-1)).all()
        assert (2 * joint_quadratic(keep, G) - joint**2).abs().le(noise).all()
        assert no_more_than(2 * joint_quadratic(keep, G), ((1 - keep) * alone).sum(-1) ** 2, noise)
        assert torch.equal(G, G.transpose(-1, -2))


def test_the_gate_matrix_sees_cancellations_that_sums_of_costs_do_not():
    logits, change = torch.zeros(3, dtype=F64), torch.tensor([1.0, 0.0, -1.0], dtype=F64)
    G = gate_matrix(logits, torch.stack([logits + change, logits - change]))
    assert joint_quadratic(torch.zeros(2), G).item() == pytest.approx(0, abs=1e-15)
    assert joint_quadratic(torch.tensor([0.0, 1.0]), G).item() == pytest.approx(1 / 3)


def test_the_gate_matrix_is_exact_in_the_limit_and_a_calibrated_rescaling_covers():
    draw = generator(6)
    logits = torch.randn(4000, 6, generator=draw, dtype=F64)
    dz = torch.randn(4000, 4, 6, generator=draw, dtype=F64)
    for scale, tolerance in ((1e-4, 1e-3), (1e-2, 0.1)):
        G = gate_matrix(logits, logits.unsqueeze(1) + scale * dz)
        ratio = kl_exact(logits, logits + scale * dz.sum(1)) / joint_quadratic(torch.zeros(4), G)
        assert (ratio - 1).abs().max() < tolerance
    # layers that interact: the level is off, the rescaled estimate covers at its level
    G = gate_matrix(logits, logits.unsqueeze(1) + dz)
    exact = kl_exact(logits, logits + 1.7 * dz.sum(1))
    score = safe_ratio(exact, joint_quadratic(torch.zeros(4), G))
    assert score.median() > 1.5
    scale = conformal_quantile(score[:2000], 0.1)
    assert 0.87 < (score[2000:] <= scale).double().mean() < 0.93


# Link 7


@pytest.mark.parametrize("n", MASS)
def test_removing_keys_moves_the_output_by_mass_times_the_distance_of_means(n):
    draw = generator(7)
    size = 20_000
    for _ in range(n // size):
        sharp = 10 ** (torch.rand(size, 1, generator=draw, dtype=F64) * 4 - 2)
        scores = torch.randn(size, 5, generator=draw, dtype=F64) * sharp  # up to near-deterministic
        values = wild((size, 5, 3), draw)
        removed = torch.rand(size, 5, generator=draw) < 0.4
        removed[:, 0] &= ~removed.all(-1)
        attention = torch.softmax(scores, -1)
        kept = torch.softmax(scores.masked_fill(removed, -torch.inf), -1)
        brute = ((kept - attention).unsqueeze(-1) * values).sum(1)
        found = key_removal(attention, values, removed)
        felt = (attention * ~removed).sum(-1) > 1e-300  # below, the kept weights themselves have underflowed
        size_of = values.abs().amax((1, 2)).unsqueeze(-1)
        assert ((found - brute).abs() <= 1e-13 * size_of)[felt].all()
        assert found[felt].isfinite().all()


def test_mass_alone_says_nothing():
    values = torch.tensor([[1.0, 2.0], [3.0, 0.0], [2.0, 1.0]])
    removed = torch.tensor([False, False, True])
    attention = torch.tensor([0.05, 0.05, 0.9], dtype=torch.float16)
    assert key_removal(attention, values, removed).abs().max() == 0.0  # 90 % of the attention, no effect
    light = key_removal(torch.tensor([0.98, 0.01, 0.01]), torch.tensor([[0.0], [0.0], [1e4]]), removed)
    assert light.item() == pytest.approx(-100.0, rel=1e-6)  # 1 % of it, a large one
    assert key_removal(torch.tensor([0.0, 0.0, 1.0]), values, removed).isnan().all()
    with pytest.raises(DataError, match=r"of one k, got \(3,\), \(2, 2\) and \(3,\)"):
        key_removal(attention, values[:2], removed)


# Link 8


@pytest.mark.parametrize("n", MASS)
def test_the_fisher_form_is_the_variance_of_the_tangent(n):
    """Scores of labels and the forward-mode tangent tell one spread, for a readout with a norm and a GELU."""
    draw = generator(8)
    size = 20_000
    inner, outer = (torch.randn(shape, generator=draw, dtype=F64) for shape in ((4, 6), (6, 5)))

    def readout(h):
        return torch.nn.functional.gelu(torch.nn.functional.layer_norm(h, (4,)) @ inner) @ outer * sharp

    for _ in range(n // size):
        sharp = 10 ** (torch.rand(size, 1, generator=draw, dtype=F64) * 3 - 1.5)
        h, dh = wild((size, 4), draw) + torch.arange(4.0), wild((size, 4), draw)
        dh = dh / dh.norm(dim=-1, keepdim=True).clamp_min(1e-30) * h.norm(dim=-1, keepdim=True) * 0.1
        logits, tangent = first_order(readout, h, dh)
        h.requires_grad_()
        log_p = torch.log_softmax(readout(h), -1)
        terms = torch.stack([torch.autograd.grad(log_p[:, y].sum(), h, retain_graph=True)[0] * dh for y in range(5)], 1)
        products, size_of = terms.sum(-1), terms.abs().sum(-1).amax(-1) + logits.abs().amax(-1)
        s = logit_shift(logits, logits + tangent).s
        rounding = (tangent.abs().amax(-1) + size_of * 1e-7) ** 2
        assert ((fisher_form(logits, products) - s**2).abs() <= 1e-8 * rounding + 1e-25).all()


def test_first_order_meets_the_exact_spread_as_the_change_shrinks():
    draw = generator(9)
    inner = torch.randn(4, 6, generator=draw, dtype=F64)
    h, dh = (torch.randn(500, 4, generator=draw, dtype=F64) for _ in range(2))

    def readout(x):
        return torch.tanh(x @ inner) * 3

    off = []
    for scale in (1e-1, 1e-2, 1e-3):
        logits, tangent = first_order(readout, h, scale * dh)
        estimate, exact = logit_shift(logits, logits + tangent).s, logit_shift(logits, readout(h + scale * dh)).s
        off.append(((estimate - exact).abs() / exact).median().item())
    assert off[0] > 5 * off[1] > 25 * off[2]
    assert off[2] < 0.01
    assert (readout(h + 3 * dh) - readout(h)).abs().max() < 6.1 < first_order(readout, h, 3 * dh)[1].abs().max()


# Link 9


@pytest.mark.parametrize("n", MASS)
def test_calibrated_constants_cover_as_often_as_they_say(n):
    """Scores of heavy tails, ties and zeros: a fresh one is covered with probability >= 1 - alpha over n draws."""
    draw, calibration, alpha = generator(10), 39, 0.1
    scores = torch.randn(n // 40, calibration + 1, generator=draw, dtype=F64).abs() ** 8
    scores[::3] = scores[::3].round()  # ties
    threshold = conformal_quantile(scores[:, :-1].T, alpha)
    covered = (scores[:, -1] <= threshold).double().mean().item()
    assert covered >= 1 - alpha - 4 * math.sqrt(alpha / len(scores))
    continuous = (scores[1::3, -1] <= threshold[1::3]).double().mean().item()
    expected = conformal_rank(calibration, alpha) / (calibration + 1)
    assert abs(continuous - expected) <= 4 * math.sqrt(alpha / len(scores[1::3]))


# Closed forms within 2 %: Gaussian and discrete


GRID = torch.linspace(-12, 12, 4001, dtype=F64)


@pytest.mark.parametrize(("mean", "deviation"), [(0.3, 1.0), (2.0, 1.0), (0.0, 1.5), (-1.0, 0.7)])
def test_gaussian_kl_in_closed_form(mean, deviation):
    dense, other = -(GRID**2) / 2, -((GRID - mean) ** 2) / (2 * deviation**2)
    expected = math.log(deviation) + (1 + mean**2) / (2 * deviation**2) - 0.5
    assert kl_exact(dense, other).item() == pytest.approx(expected, rel=0.02)
    shift = logit_shift(dense, other)
    if deviation == 1.0:  # dz is linear: s is the shift of the mean, and the estimator is exact
        assert shift.s.item() == pytest.approx(abs(mean), rel=0.02)
        assert kl_quadratic(shift.s).item() == pytest.approx(expected, rel=0.02)
    assert kl_lower(shift.s, shift.b) <= expected <= kl_two_point(shift.s, shift.u)


def test_gaussian_information_fisher_form_and_gate_matrix_in_closed_form():
    power = 3.0
    h = math.sqrt(power) * torch.distributions.Normal(0, 1).icdf((torch.arange(2000, dtype=F64) + 0.5) / 2000)
    y = torch.linspace(-16, 16, 400, dtype=F64)
    channel = torch.softmax(-((y - h.unsqueeze(-1)) ** 2) / 2, -1)
    lost = information_lost(channel, torch.zeros(2000, dtype=torch.long))  # Y = H + noise, H' knows nothing of H
    assert lost.item() == pytest.approx(0.5 * math.log1p(power), rel=0.02)
    kept = information_lost(channel, torch.arange(2000) // 100)  # H' knows H to twenty quantiles
    assert 0 < kept < 0.1 * lost

    logits = -(GRID**2) / 2  # log p(y|h) = -(y-h)^2/2 at h = 0: the score along dh is y dh
    assert fisher_form(logits, 0.3 * GRID).item() == pytest.approx(0.3**2, rel=0.02)
    _, tangent = first_order(lambda m: -((GRID - m) ** 2) / 2, torch.zeros((), dtype=F64), torch.tensor(0.3, dtype=F64))
    assert logit_shift(logits, logits + tangent).s.item() == pytest.approx(0.3, rel=0.02)

    means = torch.tensor([0.5, -0.2, 0.4], dtype=F64).unsqueeze(-1)  # three layers that move the mean
    G = gate_matrix(logits, -((GRID - means) ** 2) / 2)
    expected = means @ means.T
    assert ((G - expected).abs() <= 0.02 * expected.abs()).all()
    assert joint_quadratic(torch.zeros(3), G).item() == pytest.approx(0.7**2 / 2, rel=0.02)


def test_discrete_information_and_limits_in_closed_form():
    erased = torch.tensor([[1.0, 0, 0], [0, 1.0, 0]], dtype=F64) * 0.7 + torch.tensor([0, 0, 0.3], dtype=F64)
    lost = information_lost(erased, torch.tensor([0, 0]))  # binary erasure channel: (1 - e) log 2
    assert lost.item() == pytest.approx(0.7 * math.log(2), rel=1e-9)
    p1, p2 = 0.6, 0.3
    limit = p1 * math.log(2 * p1 / (p1 + p2)) + p2 * math.log(2 * p2 / (p1 + p2))
    assert argmax_kl_limit(torch.tensor([p1, p2, 0.1], dtype=F64).log()).item() == pytest.approx(limit, rel=1e-9)
