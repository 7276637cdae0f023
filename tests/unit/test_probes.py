import math

import numpy as np
import pytest
import torch

from adaskip.errors import DataError
from adaskip.theory import probes
from adaskip.theory.probes import code_entropy, conditional_entropy, probe_loss, usable_information_lost


def gaussian(n, distance, seed=0):
    """Two classes, unit Gaussians ``distance`` apart in one of four directions."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (n,), generator=draw)
    states = torch.randn(n, 4, generator=draw)
    states[:, 0] += distance * labels
    return states, labels


def test_probes_find_the_information_of_gaussian_classes():
    distance, n = 1.5, 2500
    states, labels = gaussian(n, distance)
    x = np.linspace(-9, 11, 40001)
    p0, p1 = (np.exp(-((x - m) ** 2) / 2) / math.sqrt(2 * math.pi) for m in (0.0, distance))
    density = (p0 + p1) / 2
    posterior = np.clip(p1 / (p0 + p1), 1e-300, 1 - 1e-16)
    entropy = -posterior * np.log(posterior) - (1 - posterior) * np.log1p(-posterior)
    truth = math.log(2) - np.trapezoid(density * entropy, x)  # I(Y; H), nats: a linear probe attains it here
    noise = torch.randn(n, 4, generator=torch.Generator().manual_seed(1))
    lost = usable_information_lost(probe_loss(noise, labels), probe_loss(states, labels))
    assert lost.low < truth < lost.high
    assert lost.estimate == pytest.approx(truth, abs=0.03)


def test_overfitting_is_not_information():
    draw = torch.Generator().manual_seed(2)
    noise, labels = torch.randn(60, 100, generator=draw), torch.randint(2, (60,), generator=draw)
    assert probe_loss(noise, labels).mean() > math.log(2)
    same = probe_loss(*gaussian(200, 1.0))
    nothing = usable_information_lost(same, same)
    assert (nothing.estimate, nothing.low, nothing.high) == (0.0, 0.0, 0.0)


def test_rare_labels_are_left_out_and_single_ones_refused():
    states, labels = gaussian(100, 1.0)
    labels[:3] = 7
    loss = probe_loss(states, labels)
    assert loss[:3].isnan().all()
    assert loss[3:].isfinite().all()
    with pytest.raises(DataError, match="expected at least two labels with 5 inputs each, got 0 x 100"):
        probe_loss(states, torch.zeros(100).long())
    with pytest.raises(DataError, match="expected finite states, got 4 values that are not"):
        probe_loss(torch.cat([states[:99], torch.full((1, 4), math.nan)]), labels)
    with pytest.raises(DataError, match="one label per state, got 99 labels for 100 states"):
        probe_loss(states, labels[1:])
    with pytest.raises(DataError, match="losses of the same inputs, got none"):
        usable_information_lost(torch.tensor([math.nan, 1.0]), torch.tensor([1.0, math.nan]))


def test_code_entropy_of_states_that_stay_move_or_scatter():
    draw = torch.Generator().manual_seed(3)
    before = torch.randn(200, 5, 3, generator=draw)
    still = code_entropy(before, before, 4)
    assert (still.entropy, still.changed, still.fano) == (0.0, 0.0, 0.0)
    near = code_entropy(before, before + 0.05 * torch.randn(200, 5, 3, generator=draw), 4)
    far = code_entropy(before, torch.randn(200, 5, 3, generator=draw), 4)
    assert 0 < near.entropy < 0.3 < 1.0 < far.entropy <= math.log(4)
    for found in (near, far):
        assert found.low <= found.entropy <= found.high
        assert found.entropy <= found.fano + 1e-9
        assert found.n == 1000


def test_plug_in_entropy_of_a_known_channel():
    draw = np.random.default_rng(0)
    before = draw.integers(3, size=200_000)
    flip = draw.random(200_000) < 0.2
    after = np.where(flip, (before + 1) % 3, before)
    expected = -0.2 * math.log(0.2) - 0.8 * math.log(0.8)
    assert conditional_entropy(torch.tensor(before), torch.tensor(after), 3) == pytest.approx(expected, rel=0.01)


def test_too_few_states_for_the_codes_are_refused():
    states = torch.randn(30, 5, 3)
    with pytest.raises(DataError, match=r"K=4 codes need at least 10 K\^2 = 160 states, got 150; give more inputs"):
        code_entropy(states, states, 4)
    with pytest.raises(DataError, match=r"expected states of one shape and K >= 2"):
        code_entropy(states, states[1:], 2)
    with pytest.raises(DataError, match="expected finite states, got NaN"):
        code_entropy(states / 0, states, 2)
    assert probes.sizes_for(150) == (2,)
