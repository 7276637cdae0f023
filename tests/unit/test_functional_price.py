"""Price functional: what it is fitted on, what it ranks, what it costs, and that it comes back as it was."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from torch import Tensor

import adaskip
from adaskip.batch import Batch
from adaskip.errors import DataError
from adaskip.plan import SkipPlan
from adaskip.survey.calibration import price_layers
from adaskip.survey.dense_costs import price_dense, price_inputs
from adaskip.survey.firstorder import first_order_of
from adaskip.survey.record import record
from adaskip.theory.conditions import judge_joint
from adaskip.theory.conformal import beta_binomial_pvalue
from adaskip.theory.measures import spearman
from adaskip.theory.prices import Functional, Prices, calibrate_functional, fewest_inputs
from adaskip.theory.sureness import describe_sureness
from adaskip.training.pricing import from_state, same, to_state
from adaskip.verbs.prices import read_prices, write_prices
from tests import toys
from tests.tuning import batches, loader, trainer

LAYERS = 4


def exchangeable(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Features, and costs of two layers that follow them up to noise with a long tail."""
    draw = torch.Generator().manual_seed(seed)
    features = torch.randn(count, 6, generator=draw)
    noise = torch.randn(count, 2, generator=draw)
    return features, (features[:, :2] + noise * noise.abs() - 3).double().exp()


def test_the_predictor_never_sees_what_its_factor_is_calibrated_on() -> None:
    """Every third input calibrates: dearer and stranger ones may move the factor and nothing else."""
    features, costs = exchangeable(60, seed=0)
    found = calibrate_functional(features, costs, 0.1)
    strange, dear = features.clone(), costs.clone()
    strange[::3] += 5.0
    dear[::3] *= 100.0
    for other in (calibrate_functional(features, dear, 0.1), calibrate_functional(strange, costs, 0.1)):
        for name in ("centre", "weight", "bias", "highest"):
            assert torch.equal(getattr(found, name), getattr(other, name)), name
        assert not torch.equal(found.factor, other.factor)
    torch.testing.assert_close(calibrate_functional(features, dear, 0.1).factor, 100 * found.factor)


def test_its_factor_covers_as_split_conformal_promises() -> None:
    """A factor calibrated on the predictor's own inputs covers too few, one of the wrong rank too few or too many."""
    covered, tested, scored = [0, 0], 0, 20
    for seed in range(25):
        features, costs = exchangeable(60, seed=seed)
        fresh, real = exchangeable(40, seed=1000 + seed)
        found = calibrate_functional(features, costs, 0.1)
        hit = real <= found.factor * found.predict(fresh)
        assert beta_binomial_pvalue(int(hit[:, 0].sum()), 40, scored, 0.1) > 1e-4
        covered = [sum(pair) for pair in zip(covered, hit.sum(0).tolist(), strict=True)]
        tested += 40
    # k / (n + 1) = 19 / 21 = .905; the mean of 25 draws has a standard error of .015
    assert all(0.86 < layer / tested < 0.95 for layer in covered), covered


def planted() -> tuple[adaskip.RoutedModel, list[Batch]]:
    """A model whose last token says how sure the answer is, in a dimension that no layer reads or writes."""
    toy = toys.make("llama", seed=3)
    sure = torch.linspace(0.0, 0.3, toys.VOCABULARY)[torch.randperm(toys.VOCABULARY)]
    with torch.no_grad():
        toy.model.get_input_embeddings().weight[:, 0] = sure
        toy.model.lm_head.weight[:, 0] = 0.0
        toy.model.lm_head.weight[7, 0] = 200.0
        for layer in toy.model.model.layers:
            for reads in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
                reads.weight[:, 0] = 0.0
            layer.mlp.gate_proj.weight[:, 0] = layer.mlp.up_proj.weight[:, 0] = 0.0
            layer.self_attn.o_proj.weight[0] = layer.mlp.down_proj.weight[0] = 0.0
    return adaskip.attach(toy.model), batches(24)


def test_inputs_are_ranked_where_their_costs_depend_on_them() -> None:
    """Layers move every input's states alike and cost some of them a thousand times more: rho cannot tell which."""
    model, rows = planted()
    ranks = {}
    for kind in ("calibrated", "functional"):
        prices = price_layers(model, rows[:12], None, 0.1, kind)  # type: ignore[arg-type]
        kl = []
        for batch in rows[12:]:
            dense = record(model, batch)
            kl.append(dense.compare(dense.rerun(dense.skipping([1, 2])))["kl"])
        gates = torch.ones(96, LAYERS)
        gates[:, 1:3] = 0.0
        ranks[kind] = spearman(price_inputs(model, rows[12:], prices).bound(gates), torch.cat(kl))
    assert ranks["functional"] > 0.8
    assert abs(ranks["calibrated"]) < 0.4


def test_costs_are_nats_and_add_up_as_they_correlate() -> None:
    """B of a layer alone is its calibrated cost; only the gates get a gradient."""
    model = adaskip.attach(toys.make("llama").model)
    prices = price_layers(model, batches(5), None, 0.1, "functional")
    batch = batches(6)[5]
    logits, costs = price_dense(model, batch, prices, "functional", torch.Generator())
    assert costs is not None
    assert prices.functional is not None
    with torch.no_grad(), model.dense():
        assert torch.equal(logits, model(**batch.arguments()).logits)
    alone = torch.ones(8, LAYERS)
    alone[:, 2] = 0.0
    torch.testing.assert_close(costs.bound(alone).double(), costs.s[:, 2] ** 2 / 2, rtol=1e-5, atol=0)
    gates = torch.full((8, LAYERS), 0.5, requires_grad=True)
    costs.bound(gates).sum().backward()
    assert (gates.grad < 0).all()  # type: ignore[operator]
    assert not costs.s.requires_grad
    assert (prices.functional.predict(1e6 * torch.randn(3, len(prices.functional.centre))) <= 1e3).all()


def test_each_price_is_read_as_it_was_calibrated() -> None:
    """What `ConditionCheck` and `check` judge by is the price's own; fisher's runs were judged by rho."""
    model, rows = adaskip.attach(toys.make("llama").model), batches(5)
    for kind in ("calibrated", "gates", "fisher", "functional"):
        prices = price_layers(model, rows, None, 0.1, kind)  # type: ignore[arg-type]
        found = price_inputs(model, rows, prices, seed=4)
        assert (found.u is None) == (kind == "functional")
        assert (found.correlation is None) == (kind in ("calibrated", "fisher"))
        if kind == "fisher":
            expected = prices.first_order_costs(first_order_of(model, rows, seed=4))
            assert found.u is not None
            assert torch.equal(torch.stack([found.s, found.u]), torch.stack(expected))


def test_training_takes_its_features_from_the_dense_pass(tmp_path: Path) -> None:
    """A step is one dense and one soft pass, as without a bound: features at a pass of their own would double that."""
    model = adaskip.attach(toys.make("llama").model)
    prices = price_layers(model, batches(5), None, 0.1, "functional")
    goal = adaskip.Objective(keep=0.5, price="functional", bound_weight=1.0)
    tuner, ran = adaskip.RouterTuner(model, goal, prices, steps=2), []
    model.backbone.register_forward_pre_hook(lambda *_: ran.append(model.runtime.mode))
    trainer(tmp_path).fit(tuner, loader(batches(2)))
    assert ran == ["dense", "soft"] * 2


def test_a_row_without_a_token_of_the_group_costs_nothing() -> None:
    """A text-only row of a run that routes vision: no skip of it does anything."""
    toy = toys.make("llava")
    model = adaskip.attach(toy.model, adaskip.RouterConfig(group="vision", kv="kept"))
    inputs = toy.batch([3, 5, 4, 6] * 8, seed=1)
    inputs["input_ids"][1][inputs["input_ids"][1] == toys.IMAGE] = 11
    inputs["pixel_values"] = torch.cat([inputs["pixel_values"][:1], inputs["pixel_values"][2:]])
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -1] = inputs["input_ids"][:, -1]
    batch = Batch(inputs, labels, inputs["attention_mask"].bool() & (labels == -100))
    found = price_inputs(model, [batch], price_layers(model, [batch], None, 0.1, "functional"))
    assert not found.s[1].any()
    assert (found.s[0] > 0).any()


def test_prices_come_back_to_the_bit(tmp_path: Path) -> None:
    """From prices.json and from a checkpoint that nobody has to trust; a layer that costs nothing has no infinities."""
    features, costs = exchangeable(40, seed=2)
    costs[:, 1] = 0.0
    functional = calibrate_functional(features, costs, 0.1)
    assert functional.bias.isfinite().all()
    assert not functional.costs(features)[:, 1].any()
    one = torch.ones(2, dtype=torch.float64)
    prices = Prices(one, one, one, 0.1, correlation=torch.eye(2).double(), functional=functional)
    write_prices(tmp_path, prices)
    assert same(read_prices(tmp_path), prices)
    file = io.BytesIO()
    torch.save(to_state(prices), file)
    file.seek(0)
    assert same(from_state(torch.load(file, weights_only=True)), prices)
    other = Functional(**to_state(prices)["functional"] | {"factor": 2 * functional.factor})
    assert not same(prices, Prices(one, one, one, 0.1, correlation=torch.eye(2).double(), functional=other))


def test_too_few_inputs_are_said() -> None:
    features, costs = exchangeable(13, seed=0)
    with pytest.raises(DataError, match=r"expected at least 14 inputs for price functional and alpha=0.1, got 13"):
        calibrate_functional(features, costs, 0.1)
    for alpha in (0.4, 0.1, 0.03):
        count = fewest_inputs(alpha, "functional")
        assert calibrate_functional(*exchangeable(count, seed=0), alpha).factor.isfinite().all()


def test_sureness_is_read_at_predicted_tokens_alone() -> None:
    """Of a wide and of a tiny vocabulary, with entries outside of it, and where the model is certain."""
    logits = torch.tensor([[0.0, 0.0, -torch.inf], [3.0, 0.0, -torch.inf], [900.0, 0.0, 0.0]])
    where = torch.tensor([[True, True, False], [False, False, True]])
    found = describe_sureness(logits, where)
    assert found.isfinite().all()
    entropy = torch.distributions.Categorical(logits=logits[:2, :2].double()).entropy()
    assert found[0, :2].tolist() == pytest.approx([float(entropy.mean().log()), float(entropy.max().log())])
    assert found[0, 4:].tolist() == pytest.approx([1.5, 0.0])
    assert (found[1, :4] < -27).all()


def test_a_look_says_how_the_bound_ranks_and_how_loose_it_is() -> None:
    """Inputs that skip nothing have KL and B 0: counted, they would make any bound rank."""
    kl = torch.tensor([0.0] * 40 + [4.0, 3.0, 2.0, 1.0])
    bound = torch.tensor([0.0] * 40 + [1.0, 2.0, 3.0, 4.0])
    keep = torch.ones(2, 44).bool()
    keep[0, 40:] = False
    order = torch.arange(44).view(11, 4).T.flatten()
    joint = judge_joint(kl[order], bound[order], keep[:, order], {}, 0.1)
    assert joint.spearman == pytest.approx(-1.0)
    tested = order[22:]
    paid = tested[kl[tested] > 0]
    slack = (joint.kappa * bound[paid].double() / kl[paid].double()).quantile(torch.tensor([0.5, 0.9]).double())
    assert (joint.slack_median, joint.slack_90) == pytest.approx(tuple(slack.tolist()))
    nothing = judge_joint(torch.zeros(20), torch.zeros(20), torch.ones(2, 20).bool(), {}, 0.1).to_dict()
    assert [nothing[name] for name in ("spearman", "slack_median", "slack_90")] == [None] * 3


def test_a_plan_is_judged_by_predicted_costs(tmp_path: Path) -> None:
    """A static plan has no routers, and every input skips alike: B must still differ from input to input."""
    model = adaskip.attach(toys.make("llama").model, SkipPlan.static([1]))
    prices = price_layers(model, batches(5), None, 0.1, "functional")
    check = adaskip.ConditionCheck(0, batches=batches(8)[5:])
    look = check.inspect(model, prices, 0)
    assert look.joint.n == 24
    assert -1 <= look.joint.spearman <= 1
    assert look.to_dict()["joint"]["slack_median"] > 0
