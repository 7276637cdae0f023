"""What choosing layers input by input could gain: beside the best static plan, on the same inputs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import pytest
import torch

import adaskip
from adaskip.batch import Batch
from adaskip.demo.backbone import load as load_demo
from adaskip.demo.digits import examples
from adaskip.errors import ConfigError, DataError
from adaskip.plan import SkipPlan
from adaskip.stages import Stages
from adaskip.survey.oracle import find_oracle
from adaskip.survey.plans import plan_costs
from adaskip.theory.prediction import describe_ranks
from adaskip.training.data import Collator, NumberedBatches
from adaskip.verbs.profile import profile_model
from tests import toys
from tests.tuning import with_answers

INPUTS, LAYERS = 6, 4


class Heard(Stages):
    """Keep what was counted up to."""

    def __init__(self) -> None:
        self.counted: dict[str, list[int]] = {}

    def __call__(self, text: str, total: int | None = None):  # type: ignore[no-untyped-def]
        from contextlib import contextmanager

        @contextmanager
        def stage():  # type: ignore[no-untyped-def]
            yield self.counted.setdefault(text, []).append

        return stage()


@pytest.fixture(scope="module")
def subject():  # type: ignore[no-untyped-def]
    """A toy, its inputs one by one, and what every plan of two layers costs each: (n p)."""
    toy = toys.make("llama", seed=3)
    model = adaskip.attach(toy.model)
    rows = [with_answers(toy.batch([4 + i], seed=i)) for i in reversed(range(INPUTS))]

    def batches(numbers: Sequence[int]) -> list[Batch]:
        return [rows[number] for number in numbers]

    pairs = [*combinations(range(LAYERS), 2)]
    plans = [SkipPlan.static(pair).keep(LAYERS) for pair in [*[(i,) for i in range(LAYERS)], *pairs]]
    return model, batches, plan_costs(model, batches(range(INPUTS)), plans).kl


def test_one_layer_is_the_cheapest_of_each(subject) -> None:  # type: ignore[no-untyped-def]
    """Would catch: inputs mixed up, or a static plan chosen by anything but the mean cost."""
    model, batches, costs = subject
    single = costs[:, :LAYERS]
    heard = Heard()
    found = find_oracle(model, batches, INPUTS, skips=1, stages=heard)
    assert found.static == (int(single.mean(0).argmin()),)
    assert found.static_kl == pytest.approx(float(single.mean(0).min()), rel=1e-5)
    assert found.oracle_kl == pytest.approx(float(single.amin(1).mean()), rel=1e-5)
    assert found.paths == len({*single.argmin(1).tolist()})
    assert found.headroom.estimate == pytest.approx(found.static_kl - found.oracle_kl)
    assert found.keep == pytest.approx(0.75)
    each = heard.counted[f"oracle: planning 1 of {LAYERS} layers for each of {INPUTS} inputs"]
    assert each == [1, 2, 3, 4, 5, 6], "it shows how far it is"


def test_more_layers_are_planned_together(subject) -> None:  # type: ignore[no-untyped-def]
    """Would catch: plans that add up what single layers cost."""
    model, batches, costs = subject
    found = find_oracle(model, batches, INPUTS, skips=2)
    own = []
    for row in costs:  # greedy, written out: the cheapest layer, then what is cheapest beside it
        first = int(row[:LAYERS].argmin())
        pairs = [i for i, pair in enumerate(combinations(range(LAYERS), 2)) if first in pair]
        own.append(float(row[LAYERS:][pairs].min()))
    static = [*combinations(range(LAYERS), 2)].index(found.static)
    best = costs[:, LAYERS + static]
    assert found.static_kl == pytest.approx(float(best.mean()), rel=1e-5)
    expected = torch.minimum(torch.tensor(own).double(), best)
    assert found.oracle_kl == pytest.approx(float(expected.mean()), rel=1e-5)
    assert (found.skips, found.n) == (2, INPUTS)
    assert "found on the 6 inputs that they are judged on: on fresh ones a router gains less" in found.sentence
    assert json.loads(json.dumps(found.to_dict()))["static"] == [*found.static]


def test_the_static_plan_is_a_plan_of_ones_own_as_well(subject) -> None:  # type: ignore[no-untyped-def]
    """Would catch: an oracle that loses, because a narrow search finds an input something dearer."""
    model, batches, costs = subject
    pairs = [*combinations(range(LAYERS), 2)]
    found = find_oracle(model, batches, INPUTS, skips=2, width=1)
    static = costs[:, LAYERS + pairs.index(found.static)]
    cheapest = [pairs.index(tuple(sorted(row[:LAYERS].argsort()[:2].tolist()))) for row in costs]  # type: ignore[arg-type]
    own = costs[range(INPUTS), [LAYERS + pair for pair in cheapest]]
    assert (own > static + 1e-9).any(), "the case that this test is about"
    assert found.oracle_kl == pytest.approx(float(torch.minimum(own, static).mean()), rel=1e-5)


@pytest.mark.parametrize(("skips", "inputs", "error"), [(0, 6, ConfigError), (5, 6, ConfigError), (1, 0, DataError)])
def test_what_cannot_be_planned_is_refused(subject, skips: int, inputs: int, error: type) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=r"oracle: .*expected"):
        find_oracle(subject[0], subject[1], inputs, skips=skips)


def test_inputs_with_and_without_pictures_keep_their_order() -> None:
    """Would catch: batches sorted by whether they hold pictures, so that an input gets another's plan."""
    base, processor = load_demo()
    records = examples("test", 1, seed=0)
    for record in records[1::2]:
        record.pop("image")
        record["prompt"] = record["prompt"].replace("<image> ", "")
    made = NumberedBatches(records, Collator(processor), base.device, 4)
    rows = [5, 0, 2, 4, 1, 3]
    assert [answer for batch in made(rows) for answer in batch.answer] == [records[row]["answer"] for row in rows]


def test_a_profile_ends_with_it(tmp_path: Path) -> None:
    """Would catch: an oracle of the wrong group or size, or one that is printed and not stored."""
    found = profile_model("digits-vlm", group="vision", examples=33, tangents=0, oracle=5, keep=0.8, output=tmp_path)
    found = found.to_dict()
    oracle = found["oracle"]
    assert (oracle["group"], oracle["n"], oracle["skips"], len(oracle["static"])) == ("vision", 5, 2, 2)
    assert oracle["oracle_kl"] <= oracle["static_kl"]
    assert json.loads((tmp_path / "profile.json").read_text())["oracle"] == oracle
    assert found["groups"]["vision"]["ranks"].startswith("ranks layers: ")
    assert found["layers"][0]["first_order"] is None


def test_the_sentence_on_ranks() -> None:
    """Would catch: an undecided notion that ranks, the worst named as the best, or a sign that is lost."""
    layers = {"cosine": 0.731, "rho": 0.47, "proximal": 0.74, "score": None, "cka": float("nan"), "bound": 0.7}
    assert describe_ranks(layers, {"cosine": -0.5, "rho": -0.04}) == (
        "ranks layers: proximal .74, cosine .73, bound .70; none ranks inputs (best: rho -.04); cut: .70"
    )
    assert describe_ranks({"cka": float("nan"), "rho": 0.2}, {"rho": 1.0}) == (
        "none ranks layers (best: rho .20); ranks inputs: rho 1.00; cut: .70"
    )
    assert describe_ranks({"rho": None}, {}) == "none ranks layers (undecided); none ranks inputs (undecided); cut: .70"
