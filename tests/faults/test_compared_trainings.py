"""`adaskip compare` trains by itself: each budget and seed once, whatever was stopped, under no other run's name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import adaskip
from adaskip.demo.backbone import load as load_demo
from adaskip.errors import ConfigError
from adaskip.recipe import load
from adaskip.survey import bank
from adaskip.training.data import Collator, load_records
from adaskip.verbs import cells, trained
from tests.faults.finished import SHORT
from tests.own_data import data, language_model  # noqa: F401  (fixtures)

SMALL: dict[str, Any] = {"examples": 24, "fit": 24, "batch_size": 24, "new_tokens": 1}
QUICK = [
    *SHORT, "tokens.examples=12", "tokens.prompt=2", "tokens.answer=1", "tokens.band=4", "tokens.width=2",
    "bank.examples=24", "bank.sample=12", "bank.paths=2", "bank.groups=1", "bank.width=2",
    "fit.rounds=1", "fit.examples=24", "fit.steps=4",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _seconds_are_taken_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells, "ROUNDS", 1)


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """The folders that were trained in, and whether training went on there."""
    seen: list[tuple[str, bool]] = []
    real = trained.train

    def noted(recipe: Any, **options: Any) -> Any:
        seen.append((Path(recipe.output).name, options["resume"]))
        return real(recipe, **options)

    monkeypatch.setattr(trained, "train", noted)
    return seen


def test_every_policy_that_training_finds(tmp_path: Path, trainings: list[tuple[str, bool]]) -> None:
    """Each by its own method at the budget asked for; catches a plan under a trained policy's name, the recipe's own
    keep rate, and a second training of what has finished."""
    names = ["learned", "from_bounds", "path_bank", "token_plan"]
    given: dict[str, Any] = SMALL | {"budgets": (0.8,), "seeds": 1, "output": tmp_path, "overrides": QUICK}
    found = adaskip.compare("digits-vlm", policies=names, **given)
    assert found.left_out == []
    assert trainings == [(f"{name}-0.8-seed0", False) for name in names]
    rows = {row["policy"]: row for row in found.rows}
    assert {*rows} == {"none", "random", *names}
    methods = {name: load(tmp_path / "runs" / f"{name}-0.8-seed0" / "recipe.resolved.yaml").method for name in names}
    assert methods == {name: method for method, name in trained.FOUND_BY.items()}
    collate = Collator(load_demo()[1])
    batch = collate(load_records("digits-vlm", "test", 24, 0))
    for name in names:
        folder = tmp_path / "runs" / f"{name}-0.8-seed0" / "router"
        model = adaskip.RoutedModel.from_pretrained(folder, load_demo()[0])
        with torch.no_grad():
            model(**batch.arguments())
        assert float(model.routing.keep_rate.double().mean()) == pytest.approx(rows[name]["keep"]), name
    (tmp_path / "cells" / "path_bank-0.8-seed0.json").unlink()  # stopped between a training and its cell
    again = adaskip.compare("digits-vlm", policies=names, **given)
    assert len(trainings) == 4
    assert [row["kl"] for row in again.rows] == [row["kl"] for row in found.rows]


def test_trainings_go_on_where_they_were_stopped(
    tmp_path: Path, trainings: list[tuple[str, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped before the second seed's end; catches a first one that is trained again, and a second from the start."""
    given: dict[str, Any] = SMALL | {"budgets": (0.7,), "seeds": 2, "output": tmp_path, "overrides": QUICK}
    real = adaskip.verbs.train.finish

    def stopped(ending: Any, *rest: Any) -> Any:
        if ending.recipe.seed == 1 and len(trainings) == 2:
            raise KeyboardInterrupt
        return real(ending, *rest)

    monkeypatch.setattr(adaskip.verbs.train, "finish", stopped)
    with pytest.raises(KeyboardInterrupt):
        adaskip.compare("digits-vlm", policies=["learned"], **given)
    found = adaskip.compare("digits-vlm", policies=["learned"], **given)
    assert trainings == [("learned-0.7-seed0", False), ("learned-0.7-seed1", False), ("learned-0.7-seed1", True)]
    (row,) = (row for row in found.rows if row["policy"] == "learned")
    assert row["seeds"] == 2


@pytest.mark.slow
def test_a_search_begins_with_what_another_budget_has_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exact costs do not depend on the budget; catches paths that are priced again for each, and costs that are taken
    over from another seed, whose inputs are others."""
    asked: list[tuple[int, ...]] = []
    real = bank.exact_prices

    def counted(*args: Any) -> Any:
        price = real(*args)
        return lambda paths, rows: asked.extend(paths) or price(paths, rows)

    monkeypatch.setattr(bank, "exact_prices", counted)
    given: dict[str, Any] = SMALL | {"seeds": 1, "output": tmp_path, "overrides": QUICK, "policies": ["path_bank"]}
    adaskip.compare("digits-vlm", budgets=(0.8,), **given)
    before = [*asked]
    assert {(layer,) for layer in range(3, 12)} <= {*before}
    asked.clear()
    found = adaskip.compare("digits-vlm", budgets=(0.7,), **given)
    assert {row["budget"] for row in found.rows if row["policy"] == "path_bank"} == {0.8, 0.7}
    assert not {(layer,) for layer in range(12)} & {*asked}
    assert (tmp_path / "runs" / "path_bank-0.7-seed0" / "env.json").is_file()
    asked.clear()
    adaskip.compare("digits-vlm", budgets=(0.7,), **given | {"seeds": 2})
    assert {(layer,) for layer in range(3, 12)} <= {*asked}


def test_a_recipe_of_ones_own(run: Path, tmp_path: Path, trainings: list[tuple[str, bool]]) -> None:
    """Under its label, beside a finished run of the same method; catches either's figures under the other's name, and
    other settings under a name that is taken."""
    given: dict[str, Any] = SMALL | {"budgets": (0.6,), "seeds": 1, "policies": [], "output": tmp_path}
    longer = [*QUICK, "trainer.steps=3", "trainer.checkpoint_every=3", "trainer.validate_every=3"]
    with pytest.raises(
        ConfigError, match=r"expected another name than learned, which is also trained here, at keep 0\.6"
    ):
        adaskip.compare(run, train=["digits-vlm"], overrides=longer, **given)
    found = adaskip.compare(run, train=["longer=digits-vlm"], overrides=longer, **given)
    assert {row["policy"] for row in found.rows} == {"none", "random", "learned", "longer"}
    assert trainings == [("longer-0.6-seed0", False)]
    assert load(tmp_path / "runs" / "longer-0.6-seed0" / "recipe.resolved.yaml").trainer.steps == 3
    with pytest.raises(
        ConfigError, match=r"holds a run with another trainer\.checkpoint_every \(3, now 2\), .* --train LABEL"
    ):
        adaskip.compare(run, train=["longer=digits-vlm"], overrides=QUICK, **given)
    with pytest.raises(ConfigError, match=r"learned-0\.6-seed0\.json: was measured on another run than that of"):
        adaskip.compare("digits-vlm", train=["digits-vlm"], overrides=QUICK, **given)


def test_a_budget_that_training_cannot_hold(tmp_path: Path) -> None:
    """Said, and the rest goes on; catches a comparison that ends at one policy's refusal."""
    given: dict[str, Any] = SMALL | {"budgets": (0.01,), "seeds": 1, "output": tmp_path, "overrides": QUICK}
    found = adaskip.compare("digits-vlm", policies=["path_bank"], **given)
    assert {row["policy"] for row in found.rows} == {"none", "random"}
    assert any(text.startswith("path_bank at keep 0.01: ") for text in found.left_out)


@pytest.mark.parametrize(
    ("target", "given", "text"),
    [
        (
            "digits-vlm",
            {"train": ["digits-vlm", "digits-vlm-vision"]},
            "expected one recipe for learned, got two; give one",
        ),
        (
            "digits-vlm",
            {"train": ["vision=digits-vlm-vision"], "overrides": QUICK},
            "--train vision: expected a recipe with router.group=all",
        ),
        ("digits-vlm", {"policies": ["lerned"]}, "'lerned': no such method, did you mean 'learned'"),
        ("digits-vlm", {"train": ["digits-vlm"], "overrides": ["trainer.stepz=3"]}, "trainer.stepz: no such key"),
        (
            "digits-vlm",
            {"overrides": ["seed=3"]},
            "--set seed=3: changes recipes that are trained, and none is; name one",
        ),
        ("digits-vlm", {"train": ["greedy=digits-vlm"]}, "greedy is a method; choose another label"),
    ],
)
def test_what_cannot_be_trained(target: str, given: dict[str, Any], text: str, tmp_path: Path) -> None:
    """Before anything is measured; catches an hour of methods in front of a refusal."""
    with pytest.raises(ConfigError, match=text):
        adaskip.compare(target, **{"policies": [], "budgets": (0.7,), "seeds": 1, "output": tmp_path, **SMALL, **given})
    assert not [*tmp_path.glob("cells/*")]


def test_a_model_that_no_recipe_is_known_for(language_model: Path, data: Path, tmp_path: Path) -> None:  # noqa: F811
    """A folder of one's own; catches the demo's recipe for another model."""
    with pytest.raises(
        ConfigError, match=r"--policies learned: no recipe is known for .*llama and group all; name one: --train"
    ):
        adaskip.compare(language_model, str(data), policies=["learned"], output=tmp_path / "out", **SMALL)
