"""The certificate of a bank's costs: its factor by hand, its coverage, and what it is taken of."""

from __future__ import annotations

import pytest
import torch

import adaskip
from adaskip.errors import ConfigError
from adaskip.plan import SkipPlan
from adaskip.policies import PathBank
from adaskip.survey import certificate
from adaskip.survey.certificate import certify, price_choices
from adaskip.survey.plans import plan_costs
from tests import toys
from tests.batches_by_number import two_kinds


def model_with(bank: PathBank) -> adaskip.RoutedModel:
    return adaskip.attach(toys.make("llama").model, bank)


def test_the_factor_is_the_conformal_quantile_of_exact_over_predicted(monkeypatch) -> None:
    """Nine ratios 1 to 9 at alpha .2: the eighth. Catches ratios upside down, or one calibrated on what it judges."""
    calibration = torch.ones(9).double(), torch.arange(1.0, 10.0).double()
    judged = torch.tensor([1.0, 2.0, 3.0, 0.0]).double(), torch.tensor([8.5, 2.0, 12.0, 0.0]).double()
    monkeypatch.setattr(certificate, "price_choices", lambda _, which: which)
    model = model_with(PathBank([[1]], entry=1))
    found = certify(model, calibration, judged, alpha=0.2)  # type: ignore[arg-type]
    assert found.kappa == 8.0
    assert float(model.policy.kappa) == 8.0
    assert found.coverage == 0.75
    assert found.slack[0] == pytest.approx(2.0)  # of 8/8.5, 16/2 and 24/12
    assert found.rank == pytest.approx(0.8)


def test_what_is_compared_is_the_chosen_paths_own_cost() -> None:
    """Two paths, told apart by the prompt; catches costs of another path, or predictions of another layer's states."""
    bank = PathBank([[1], [2, 3]], entry=1)
    model = model_with(bank)
    bank.weight.normal_(generator=torch.Generator().manual_seed(0))
    bank.weight *= 3.0
    everyone = two_kinds(toys.make("llama"))(range(24))
    predicted, exact = price_choices(model, everyone)
    model(**everyone[0].arguments())
    taken = (~model.routing.keep[1]).long()
    assert 0 < int(taken.sum()) < 24
    both = plan_costs(model, everyone, [SkipPlan.static(path).keep(4) for path in ([2, 3], [1])]).kl
    assert torch.allclose(exact, both.gather(1, taken[:, None])[:, 0], atol=1e-6)
    assert (predicted > 0).all()


def test_another_policy_has_no_certificate() -> None:
    model = adaskip.attach(toys.make("llama").model, SkipPlan())
    with pytest.raises(ConfigError, match="expected a model with a path bank, got one with policy 'static'"):
        certify(model, [], [])
