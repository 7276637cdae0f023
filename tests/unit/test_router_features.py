"""What routers read: directions beside means, an early layer for all behind it, and features that are standardised."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import adaskip
from adaskip.errors import ConfigError
from adaskip.policies.features import directions, mean_weights, pool, without_first
from adaskip.policies.learned.heads import Standard
from adaskip.policies.learned.routers import Learned
from adaskip.recipe import load
from adaskip.runtime.attach import RoutedModel
from adaskip.survey.standardise import see, standardise
from adaskip.verbs.train import train
from tests import toys
from tests.tuning import batches


def attached(**fields: object) -> RoutedModel:
    return adaskip.attach(toys.make("llama").model, adaskip.RouterConfig(**fields))  # type: ignore[arg-type]


def test_the_first_token_and_lengths_do_not_count_and_the_last_one_stands_alone() -> None:
    """By hand; catches a mean over states as long as they come, and a last token that is padding."""
    prompt = torch.tensor([[False, True, True, True], [True, False, False, False]])
    masks = without_first(prompt[:, None], prompt)
    assert masks[0].tolist() == [[False, False, True, True], [False, False, False, True]]
    assert masks[1].tolist() == [[True, False, False, False]] * 2
    states = torch.tensor([[[9.0, 9.0], [50.0, 0.0], [0.0, 2.0], [3.0, 0.0]], [[4.0, 0.0], *[[torch.nan] * 2] * 3]])
    pooled = pool(directions(states), mean_weights(masks))
    assert pooled[0].tolist() == [[0.5, 0.5], [1.0, 0.0]]
    assert pooled[1].tolist() == [[1.0, 0.0], [1.0, 0.0]]


def test_routers_of_directions_read_them() -> None:
    """The last token's stands alone, so it has norm 1; catches states as they come."""
    for seen in see(attached(features="directions").eval(), batches(1)):
        torch.testing.assert_close(seen[:, -1].norm(dim=-1), torch.ones(len(seen)))


def test_an_entry_decides_the_layers_behind_it() -> None:
    """Every router from the entry on reads what the entry's does, those before it their own."""
    seen = see(attached(entry=1).eval(), batches(1))
    own = see(attached().eval(), batches(1))
    assert torch.equal(seen[0], own[0])
    assert all(torch.equal(later, own[1]) for later in seen[1:])
    assert not torch.equal(own[2], own[1])


def test_an_entry_reads_each_request_anew() -> None:
    """Catches notes of the request before, and of the chunk before under scope token."""
    model, inputs = attached(entry=0, scope="token").eval(), batches(2)
    both = see(model, inputs)
    assert torch.equal(both[2], torch.cat([see(model, [batch])[2] for batch in inputs]))


@pytest.mark.parametrize("features", ["mean", "directions", "standardised"])
def test_each_kind_trains_saves_and_loads(features: str, tmp_path: Path) -> None:
    """Catches statistics that are no part of the file."""
    model, inputs = attached(features=features, entry=1), batches(3)
    with torch.no_grad():
        for index, head in enumerate(model.routers):  # type: ignore[arg-type]
            head.outer.weight.normal_(std=2.0, generator=torch.Generator().manual_seed(index))  # type: ignore[union-attr, operator]
    standardise(model.eval(), inputs)
    model.train()(**inputs[0].arguments()).logits.sum().backward()
    assert all(head.inner.weight.grad.abs().sum() > 0 for head in list(model.routers)[:3])  # type: ignore[union-attr, arg-type]
    model.eval()(**inputs[0].arguments())
    logits = model.routing.logits
    model.save_pretrained(tmp_path)
    loaded = RoutedModel.from_pretrained(tmp_path, model.detach()).eval()
    loaded(**inputs[0].arguments())
    assert torch.equal(loaded.routing.logits, logits)
    assert loaded.policy.config.features == features


@pytest.mark.parametrize("scope", ["prompt", "token"])
def test_without_a_hidden_layer_the_logit_is_linear_in_the_normalised_features(scope: str, tmp_path: Path) -> None:
    """By hand on what the routers see; catches an activation, and a file that is read as another."""
    model, inputs = attached(hidden=0, scope=scope), batches(2)
    assert all(head.inner is None for head in model.routers)  # type: ignore[union-attr]
    model.eval()(**inputs[0].arguments())
    assert model.routing.share.min() == 1  # untrained, every layer runs
    with torch.no_grad():
        for index, head in enumerate(model.routers):  # type: ignore[arg-type]
            head.outer.weight.normal_(std=0.5, generator=torch.Generator().manual_seed(index))  # type: ignore[union-attr, operator]
    seen = see(model, inputs)[1]
    head = model.routers[1]  # type: ignore[index]
    centred = (seen - seen.mean(-1, keepdim=True)) / (seen.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    expected = centred.flatten(1) @ head.outer.weight[0] + 2.0  # type: ignore[union-attr, index]
    torch.testing.assert_close(head(seen), expected, atol=1e-4, rtol=1e-4)  # type: ignore[operator]
    model.train()(**inputs[0].arguments()).logits.sum().backward()
    assert all(head.outer.weight.grad.abs().sum() > 0 for head in list(model.routers)[:3])  # type: ignore[union-attr, arg-type]
    model.eval()(**inputs[0].arguments())
    logits = model.routing.logits
    model.save_pretrained(tmp_path)
    loaded = RoutedModel.from_pretrained(tmp_path, model.detach()).eval()
    loaded(**inputs[0].arguments())
    assert torch.equal(loaded.routing.logits, logits)
    assert loaded.policy.config.hidden == 0


def test_a_file_without_features_holds_routers_that_read_the_mean() -> None:
    """Files of before there was a choice; catches them being read as the default of today."""
    assert Learned.from_dict({"hidden": 8}).config.features == "mean"
    assert Learned(hidden=8).config.features == "directions"


def test_standardised_features_have_mean_0_and_variance_1_over_what_they_were_measured_on() -> None:
    model, inputs = attached(features="standardised").eval(), batches(5)
    before = see(model, inputs)
    standardise(model, inputs)
    for head, seen in zip(model.routers, before, strict=True):  # type: ignore[arg-type]
        found = head.norm(seen)  # type: ignore[operator]
        torch.testing.assert_close(found.mean(0), torch.zeros_like(found[0]), atol=1e-3, rtol=0)
        assert float(found.std(0).median()) == pytest.approx(1.0, abs=1e-3)
        assert found.isfinite().all()


def test_a_run_standardises_on_calibration_inputs(tmp_path: Path) -> None:
    """Catches a run that trains on features as they come."""
    short = ["trainer.steps=2", "trainer.validate_every=2", "trainer.checkpoint_every=2", "trainer.batch_size=8"]
    short += [f"data.examples.{split}=24" for split in ("train", "validation")] + ["data.examples.calibration=30"]
    short += ["conditions.examples=8", "conditions.every=0", "static.width=0", "tracking.wandb=disabled"]
    recipe = load("digits-vlm", [*short, "router.features=standardised", "router.entry=2", f"output={tmp_path / 'r'}"])
    folder = train(recipe).folder
    model = adaskip.RoutedModel.from_pretrained(folder / "router", adaskip.demo.backbone.load()[0])
    norms = [head.norm for head in model.routers]  # type: ignore[union-attr]
    assert all(isinstance(norm, Standard) and float(norm.centre.abs().sum()) > 0 for norm in norms)
    assert torch.equal(norms[2].centre, norms[5].centre)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"features": "direction"}, "features: expected mean | directions | standardised, got 'direction'; did you"),
        ({"features": "standardised", "scope": "token"}, "features: expected directions with scope token"),
        ({"entry": -1}, "entry: expected a layer >= 0 or none, got -1"),
        ({"entry": "two"}, "entry: expected an integer, got 'two'"),
        ({"entry": 99}, "entry: expected a layer 0 to 3, got 99"),
    ],
)
def test_wrong_values_are_said(fields: dict[str, object], text: str) -> None:
    with pytest.raises(ConfigError) as error:
        attached(**fields)
    assert text in str(error.value)
