import math

import pytest
import torch
from sklearn.cross_decomposition import CCA

from adaskip.errors import DataError
from adaskip.theory.intervals import jackknife
from adaskip.theory.similarity import Moments, dissimilarity, linear_cka, svcca


@pytest.fixture
def clouds():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(400, 6, generator=draw) * torch.tensor([5.0, 3.0, 2.0, 1.0, 1.0, 0.5])
    return x, 0.7 * x + torch.randn(400, 6, generator=draw) + 3.0


def test_cka_is_that_of_centred_gram_matrices(clouds):
    x, y = (h.double() - h.double().mean(0) for h in clouds)
    left, right = x @ x.T, y @ y.T
    expected = (left * right).sum() / (left.norm() * right.norm())
    assert linear_cka(Moments.of(*clouds)) == pytest.approx(expected.item(), rel=1e-9)


def test_svcca_keeping_everything_is_canonical_correlation(clouds):
    x, y = clouds
    fitted = CCA(n_components=6, max_iter=5000, tol=1e-10).fit(x.double().numpy(), y.double().numpy())
    left, right = fitted.transform(x.double().numpy(), y.double().numpy())
    expected = sum(torch.corrcoef(torch.tensor([left[:, i], right[:, i]]))[0, 1].item() for i in range(6)) / 6
    assert svcca(Moments.of(x, y), kept=1.0 - 1e-12) == pytest.approx(expected, abs=2e-3)


def test_what_each_measure_is_blind_to(clouds):
    x, _ = clouds
    turn = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1))).Q
    turned, stretched = Moments.of(x, 7.0 * x @ turn + 1.0), Moments.of(x, x @ torch.diag(torch.arange(1.0, 7.0)))
    assert linear_cka(turned) == pytest.approx(1.0, abs=1e-6)
    assert svcca(turned) == pytest.approx(1.0, abs=1e-6)
    assert linear_cka(stretched) < 0.99
    assert svcca(stretched, kept=1.0 - 1e-12) == pytest.approx(1.0, abs=1e-6)
    unrelated = Moments.of(x, torch.randn(400, 6, generator=torch.Generator().manual_seed(2)))
    assert linear_cka(unrelated) < 0.05
    assert svcca(unrelated) < 0.2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_masked_parts_add_up_to_one_pass_in_any_precision(clouds, dtype):
    x, y = (h.to(dtype).view(40, 10, 6) for h in clouds)
    mask = torch.rand(40, 10, generator=torch.Generator().manual_seed(3)) > 0.3
    x = x.masked_fill(~mask.unsqueeze(-1), math.nan)
    whole = Moments.of(x, y, mask)
    merged = Moments.of(x[:13], y[:13], mask[:13]) + Moments.of(x[13:], y[13:], mask[13:])
    assert linear_cka(whole) == pytest.approx(linear_cka(merged), rel=1e-12)
    assert svcca(whole) == pytest.approx(svcca(merged), rel=1e-9)
    assert svcca(whole - Moments.of(x[:13], y[:13], mask[:13])) == pytest.approx(
        svcca(Moments.of(x[13:], y[13:], mask[13:])), rel=1e-6
    )
    exact = Moments.of(x.double(), y.double(), mask)
    assert linear_cka(whole) == linear_cka(exact)


def test_intervals_cover_the_value_of_many_inputs():
    draw = torch.Generator().manual_seed(4)

    def sample(n):
        x = torch.randn(n, 4, generator=draw)
        return x, x + torch.randn(n, 4, generator=draw)

    truth = 1.0 - linear_cka(Moments.of(*sample(200_000)))
    hits = 0
    for _ in range(40):
        x, y = sample(1000)
        found = dissimilarity([Moments.of(x[i::10], y[i::10]) for i in range(10)], "cka")
        hits += found.low <= truth <= found.high
        assert found.high - found.low < 0.2
    assert hits >= 32  # 38 expected; fewer than 32 has probability 1e-3


def test_what_cannot_be_told_is_an_error_or_nan():
    x = torch.randn(30, 8, generator=torch.Generator().manual_seed(5))
    with pytest.raises(DataError, match="expected at least 10 tokens for each of 8 directions, got 30 tokens"):
        svcca(Moments.of(x, x))
    with pytest.raises(DataError, match="expected at least 2 tokens, got 0; the token group is empty"):
        linear_cka(Moments.of(x, x, torch.zeros(30).bool()))
    with pytest.raises(DataError, match="the states are not finite"):
        linear_cka(Moments.of(x / 0, x))
    with pytest.raises(DataError, match=r"expected states of one shape .* got \(30, 8\), \(29, 8\)"):
        Moments.of(x, x[1:])
    with pytest.raises(DataError, match="expected at least 3 groups of inputs, got 2"):
        dissimilarity([Moments.of(x, x)] * 2, "cka")
    with pytest.raises(DataError, match="jackknife: expected at least two finite values"):
        jackknife(0.5, torch.tensor([0.5, math.nan]))
    still = Moments.of(torch.ones(100, 2), torch.randn(100, 2))
    assert math.isnan(linear_cka(still))
    assert math.isnan(svcca(still))
