"""The certificate of a bank's costs: its factor by hand, its coverage, and what it is taken of."""

from __future__ import annotations

import warnings

import pytest
import torch

import adaskip
from adaskip.errors import ConfigError
from adaskip.plan import SkipPlan
from adaskip.policies import PathBank
from adaskip.policies.features import describe_prompt
from adaskip.survey import certificate
from adaskip.survey.certificate import certify, price_choices
from adaskip.survey.plans import plan_costs
from adaskip.survey.record import record
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
    """Two paths, told apart by the prompt; catches costs of another path, or predictions of another layer's states.

    The second needs less compute, so that at this price some prompts take it though it costs them more; catches a
    prediction of the cheapest path.
    """
    bank = PathBank([[1], [2, 3]], entry=1, price=2.0)
    model = model_with(bank)
    bank.weight.normal_(generator=torch.Generator().manual_seed(0))
    bank.weight *= 3.0
    bank.share[1] = 0.5
    everyone = two_kinds(toys.make("llama"))(range(24))
    predicted, exact = price_choices(model, everyone)
    model(**everyone[0].arguments())
    taken = model.routing.keep[1].long()
    assert 0 < int(taken.sum()) < 24
    both = plan_costs(model, everyone, [SkipPlan.static(path).keep(4) for path in bank.paths]).kl
    assert torch.allclose(exact, both.gather(1, taken[:, None])[:, 0], atol=1e-6)
    dense = record(model, everyone[0])
    costs = bank.predict(describe_prompt(dense.entered[1], everyone[0].prompt_mask))
    assert torch.allclose(predicted, costs.gather(1, taken[:, None])[:, 0].double())
    assert (costs.argmin(1) != taken).any()


def test_what_costs_nothing_is_covered_however_few_inputs_calibrate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three inputs give no factor at alpha .1, and the dense path is predicted to cost 0; catches infinity times 0."""
    calibration = torch.ones(3).double(), torch.ones(3).double()
    judged = torch.tensor([0.0, 1.0]).double(), torch.tensor([0.0, 7.0]).double()
    monkeypatch.setattr(certificate, "price_choices", lambda _, which: which)
    found = certify(model_with(PathBank([[], [1]], entry=1)), calibration, judged)  # type: ignore[arg-type]
    assert found.kappa == torch.inf
    assert found.coverage == 1.0
    assert found.to_dict()["kappa"] is None


def test_figures_say_how_many_inputs_they_are_of_and_where_nothing_varies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Costs 1, 2, 3 ... all predicted as 1; catches counts that are swapped, and a rank of what is all the same."""

    def priced(_: object, batches: list[range]) -> tuple[torch.Tensor, torch.Tensor]:
        count = sum(map(len, batches))
        return torch.ones(count).double(), torch.arange(1.0, count + 1).double()

    monkeypatch.setattr(certificate, "price_choices", priced)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = model_with(PathBank([[1]], entry=1))
        found = certify(model, [range(12), range(8)], [range(11)])  # type: ignore[list-item]
    assert (found.calibrated, found.judged) == (20, 11)
    assert found.to_dict()["spearman"] is None
    assert found.kappa == 19
    assert found.slack == pytest.approx((19 / 6, 19 / 2))


def test_another_policy_has_no_certificate() -> None:
    model = adaskip.attach(toys.make("llama").model, SkipPlan())
    with pytest.raises(ConfigError, match="expected a model with a path bank, got one with policy 'static'"):
        certify(model, [], [])
