"""`adaskip compare`: cells are stored one by one and never measured twice, rows by hand, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

import adaskip
from adaskip.demo.backbone import load
from adaskip.errors import AdaSkipError, CheckpointError, ConfigError
from adaskip.methods.names import METHODS
from adaskip.recipe import Trainer
from adaskip.survey.skips import measure_skips
from adaskip.training.data import load_records
from adaskip.verbs import cells, subject
from adaskip.verbs import filling as verb
from adaskip.verbs.cells import Cell
from adaskip.verbs.entries import FOUND_BY, name_found
from adaskip.verbs.standings import standings
from adaskip.verbs.trained import TRAINED
from tests import toys, tuning, wandb_file

SMALL: dict[str, Any] = {
    "budgets": (0.8, 0.5), "examples": 24, "fit": 24, "seeds": 2, "batch_size": 24, "new_tokens": 1,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _seconds_are_taken_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells, "ROUNDS", 1)


def cell(
    policy: str,
    keep: float,
    kl: list[float],
    hit: list[float],
    seed: int = 0,
    budget: float = 0.5,
    prefill: float = 1.0,
) -> Cell:
    count = len(kl)
    return Cell(
        policy, budget, seed, [1], [keep] * count, kl, hit, [1.0] * count, hit, ["a", "b"] * (count // 2), [1.0, 0.0],
        {"prefill": prefill, "dense_prefill": 2.0, "generate": 3.0, "dense_generate": 4.0},
    )  # fmt: skip


def test_rows_by_hand() -> None:
    """Seeds are averaged input by input; catches a rival that keeps less, and a front that ignores what is kept."""
    cells = [
        cell("random", 0.5, [1.0, 3.0], [0.0, 0.0], seed=0),
        cell("random", 0.5, [3.0, 5.0], [1.0, 0.0], seed=1),
        cell("greedy", 0.5, [0.5, 1.0], [1.0, 0.0]),
        cell("mean", 0.3, [0.1, 0.2], [1.0, 1.0]),
        cell("dear", 0.6, [0.4, 0.4], [1.0, 1.0]),
        cell("dear", 0.9, [0.0, 0.1], [1.0, 1.0], budget=0.9),
        cell("none", 1.0, [0.0, 0.0], [1.0, 1.0], budget=1.0),
    ]
    rows = {row["policy"]: row for row in standings(cells) if row["budget"] == 0.5}
    assert [row["policy"] for row in standings(cells)] == ["none", "dear", "mean", "dear", "greedy", "random"]
    drawn = rows["random"]
    assert (drawn["seeds"], drawn["n"], drawn["kl"], drawn["accuracy"]) == (2, 2, 3.0, 0.25)
    assert (drawn["prefill_ratio"], drawn["generate_ratio"]) == (0.5, 0.75)
    kind = drawn["kinds"]["a"]
    assert {name: kind[name] for name in ("hit", "dense_hit", "kl", "keep")} == {
        "hit": 0.5, "dense_hit": 1.0, "kl": 2.0, "keep": 0.5,
    }  # fmt: skip
    assert (kind["keep_by_seed"], kind["keep_interval"]["estimate"]) == ([0.5, 0.5], 0.5)
    assert drawn["by_seed"] == [
        {"seed": 0, "keep": 0.5, "hit": 0.0, "kl": 2.0}, {"seed": 1, "keep": 0.5, "hit": 0.5, "kl": 4.0},
    ]  # fmt: skip
    assert drawn["loss_to_dense"]["estimate"] == 0.75
    assert (drawn["dense_interval"]["low"], drawn["dense_interval"]["high"]) == (1, 1)
    assert rows["greedy"]["rival"] == "dear"  # its plan that keeps .6; `mean` keeps less, so it is no measure
    assert rows["greedy"]["kl_less"]["estimate"] == pytest.approx(-0.35)
    assert rows["mean"]["rival"] == "dear"
    assert rows["mean"]["accuracy_more"]["estimate"] == 0
    assert [row["policy"] for row in standings(cells) if row["front"]] == ["none", "dear", "mean"]


def test_the_front_by_seconds_is_not_the_front_by_flops() -> None:
    """Catches a front that takes FLOPs for seconds: `light` keeps least of all, and is slower than `fast`."""
    cells = [
        cell("none", 1.0, [0.0, 0.0], [1.0, 1.0], prefill=2.0),
        cell("fast", 0.8, [0.1, 0.1], [1.0, 1.0], prefill=1.0),
        cell("light", 0.5, [0.2, 0.2], [1.0, 1.0], prefill=1.5),
        cell("slow", 0.4, [0.3, 0.3], [1.0, 1.0], prefill=3.0),
    ]
    rows = standings(cells)
    assert [row["policy"] for row in rows if row["front"]] == ["none", "fast", "light", "slow"]
    assert [row["policy"] for row in rows if row["front_prefill"]] == ["none", "fast"]
    assert [row["policy"] for row in rows if row["front_generate"]] == ["none"]  # all generate alike


def test_dense_logits_are_computed_once_as_far_as_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches logits of another batch, a cell's own logits in the dense place, and memory without an end."""
    model, inputs = adaskip.attach(toys.make("llama").model, adaskip.SkipPlan.static([1])), tuning.batches(2, rows=2)
    passes: list[int] = []
    real = cells.record
    monkeypatch.setattr(cells, "record", lambda *args, **named: passes.append(1) or real(*args, **named))
    exact = [real(model, batch).logits for batch in inputs]
    dense = cells.DenseLogits(inputs, room=exact[0].numel() * 4)
    for _ in range(2):
        assert all(torch.equal(dense(place, model), exact[place]) for place in (0, 1))
    assert len(passes) == 3


def test_a_comparison_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped after three cells; catches cells that are measured twice, and a result that depends on the stop."""
    whole = adaskip.compare("digits-vlm", policies=["late_entry"], output=tmp_path / "whole", **SMALL)
    measured: list[str] = []
    real = verb.measure_cell

    def counted(*args: Any, **named: Any) -> Cell:
        if len(measured) == 3:
            raise KeyboardInterrupt
        measured.append(named["policy"])
        return real(*args, **named)

    monkeypatch.setattr(verb, "measure_cell", counted)
    with pytest.raises(KeyboardInterrupt):
        adaskip.compare("digits-vlm", policies=["late_entry"], output=tmp_path / "part", **SMALL)
    assert len([*(tmp_path / "part" / "cells").glob("*.json")]) == 3
    monkeypatch.setattr(verb, "measure_cell", lambda *args, **named: measured.append("again") or real(*args, **named))
    found = adaskip.compare("digits-vlm", policies=["late_entry"], output=tmp_path / "part", **SMALL)
    assert measured.count("again") == 7 - 3  # none, two draws at two budgets, late entry at two
    steady = ("policy", "budget", "seeds", "keep", "accuracy", "kl", "plans", "front")
    assert [[row[name] for name in steady] for row in found.rows] == [
        [row[name] for name in steady] for row in whole.rows
    ]
    stored = json.loads((tmp_path / "part" / "compare.json").read_text())
    assert stored["rows"] == json.loads(json.dumps(found.rows))
    assert (tmp_path / "part" / "compare.png").stat().st_size > 10_000
    assert "| 0.5 | late_entry | 1 | " in (tmp_path / "part" / "compare.md").read_text()


def test_a_sample_is_answered_freely(tmp_path: Path) -> None:
    """Against answers written one prompt at a time along the row's plan; catches figures of teacher forcing, the dense
    model's under the policy's name, and kinds that do not say what is there, counted as honest."""
    small = SMALL | {"budgets": (0.4,), "seeds": 1}
    found = adaskip.compare("digits-vlm", policies=["late_entry"], generate=12, output=tmp_path, **small)
    rows = {row["policy"]: row for row in found.rows}
    (skip,) = rows["late_entry"]["plans"]
    base, processor = load()
    records, said = load_records("digits-vlm", "test", 24, 0)[:12], []
    model = adaskip.attach(base, adaskip.SkipPlan.static(skip))
    for record in records:
        inputs = adaskip.Collator(processor, answers=False)([record]).inputs
        ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        said.append(processor.decode(ids, skip_special_tokens=True).strip())
    figures = rows["late_entry"]["generated"]
    right = [text == record["answer"] for text, record in zip(said, records, strict=True)]
    assert (figures["n"], figures["exact"]) == (12, sum(right) / 12)
    listed = [(text, record["present"]) for text, record in zip(said, records, strict=True) if "present" in record]
    absent = [bool({*text.split()} & {*"0123456789"} - {*present}) for text, present in listed]
    assert len(listed) == 6
    assert figures["hallucinated"] == sum(absent) / 6 > 0
    assert figures["dense_exact"] == rows["none"]["generated"]["exact"] > 0.9
    assert figures["edit_distance"] > figures["dense_edit_distance"]
    assert figures["same"] < 1 == rows["none"]["generated"]["same"]
    table = (tmp_path / "compare.md").read_text()
    assert f"| 0.4 | late_entry | 12 | {figures['exact']:.4f} | " in table.split("Answers written freely")[1]
    with pytest.raises(ConfigError, match="holds a comparison with generate=12"):
        adaskip.compare("digits-vlm", policies=[], output=tmp_path, **small)


def test_cells_of_before_answers_were_written(tmp_path: Path) -> None:
    """Catches a comparison that forgets its older cells, and means over seeds of which one says nothing."""
    older = cell("greedy", 0.5, [1.0, 3.0], [0.0, 0.0])
    older.write(tmp_path)
    file = tmp_path / "greedy-0.5-seed0.json"
    file.write_text(file.read_text().replace(', "generated": {}', ""))
    assert "generated" not in json.loads(file.read_text())
    assert Cell.read(file) == older
    newer = replace(older, seed=1, generated={"exact": [1.0, 0.0], "hallucinated": [None, 1.0], "same": [None, None]})
    (row,) = standings([older, newer])
    assert row["generated"] == {"n": 2, "exact": 0.5, "hallucinated": 1.0, "same": None}
    assert standings([older])[0]["generated"] == {}


def test_weights_and_biases_gets_the_rows_and_the_picture(tmp_path: Path) -> None:
    found = adaskip.compare(
        "digits-vlm", policies=[], output=tmp_path, wandb="offline", **SMALL | {"budgets": (0.8,), "seeds": 1}
    )
    logged = wandb_file.read(tmp_path)
    (row,) = (row for row in logged["history"] if "pareto/_type" in row)
    assert (row["pareto/_type"], row["comparison/nrows"]) == ("image-file", len(found.rows))
    assert logged["config"]["group"] == "all"


def test_a_method_added_later_costs_its_own_cells_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows hold those of before as well; a policy that cannot hold a budget is said and left out."""
    adaskip.compare("digits-vlm", policies=[], output=tmp_path, **SMALL)
    measured: list[str] = []
    real = verb.measure_cell
    monkeypatch.setattr(
        verb, "measure_cell", lambda *args, **named: measured.append(named["policy"]) or real(*args, **named)
    )
    splits: list[tuple[str, int]] = []
    records = subject.read_split
    monkeypatch.setattr(
        subject,
        "read_split",
        lambda *args: splits.append((args[1], args[2])) or records(*args),  # who fits never judges
    )
    found = adaskip.compare("digits-vlm", policies=["early_exit", "attention_mass"], output=tmp_path, **SMALL)
    assert measured == ["early_exit"] * 2
    assert {row["policy"] for row in found.rows} == {"none", "random", "early_exit"}
    assert found.left_out == [
        "attention_mass at keep 0.8, 0.5: method attention_mass: expected group vision, got 'all'; attention mass "
        "speaks of no other tokens"
    ]
    assert {row["policy"] for row in found.agreement} == {"random", "early_exit"}
    assert splits == [("test", 24), ("train", 24)]
    again = adaskip.compare("digits-vlm", policies=[], output=tmp_path, **SMALL)
    assert {row["policy"] for row in again.rows} == {"none", "random", "early_exit"}, "what was compared before stays"


def test_a_budget_that_cannot_be_held_leaves_the_others(tmp_path: Path) -> None:
    """The lowest comes first; catches a method that is given up at its first budget."""
    found = adaskip.compare(
        "digits-vlm", policies=["uniform"], output=tmp_path, **SMALL | {"budgets": (0.01, 0.8), "seeds": 1}
    )
    assert [(row["policy"], row["budget"]) for row in found.rows if row["policy"] == "uniform"] == [("uniform", 0.8)]
    assert [text[:10] for text in found.left_out] == ["uniform at"]


def test_agreement_is_of_what_a_policy_skips(tmp_path: Path) -> None:
    """Against exact costs of the judged inputs; catches the layers that run in the place of those that do not."""
    found = adaskip.compare("digits-vlm", policies=[], output=tmp_path, **SMALL | {"budgets": (0.8,), "seeds": 1})
    (row,) = found.agreement
    (plan,) = next(each["plans"] for each in found.rows if each["policy"] == "random")
    base, processor = load()
    model = adaskip.attach(base, adaskip.SkipPlan())
    cost = measure_skips(model, [adaskip.Collator(processor)(load_records("digits-vlm", "test", 24, 0))]).kl.mean(0)
    admitted = [layer for layer in plan if layer in found.admitted]
    total = (row["inside"] or 0) * len(admitted) + (row["outside"] or 0) * (len(plan) - len(admitted))
    assert total == pytest.approx(float(cost[plan].sum()), rel=1e-4)


@pytest.mark.parametrize(
    ("policy", "empty"),
    [
        ("shortv", adaskip.SkipPlan(group="vision", kv="kept")),
        ("ada_skip", adaskip.SkipPlan(group="vision", unit="sublayers")),
    ],
    ids=["keys kept", "halves"],
)
def test_agreement_is_of_what_leaves_and_what_stays(tmp_path: Path, policy: str, empty: adaskip.SkipPlan) -> None:
    """Catches a policy that keeps keys, or leaves out half layers, judged by what whole layers without keys cost."""
    found = adaskip.compare(
        "digits-vlm", policies=[policy], group="vision", output=tmp_path, **SMALL | {"budgets": (0.9,), "seeds": 1}
    )
    (row,) = (each for each in found.agreement if each["policy"] == policy)
    assert (row["unit"], row["kv"]) == (empty.unit, empty.kv)
    (plan,) = next(each["plans"] for each in found.rows if each["policy"] == policy)
    base, processor = load()
    model = adaskip.attach(base, empty)
    batch = adaskip.Collator(processor)(load_records("digits-vlm", "test", 24, 0))
    labels = [*model.sites.labels(range(len(model.sites)))]
    cost = dict(zip(labels, measure_skips(model, [batch]).kl.mean(0).tolist(), strict=True))
    for side, chosen in (
        ("inside", [site for site in plan if site in row["admitted"]]),
        ("outside", [site for site in plan if site not in row["admitted"]]),
    ):
        expected = sum(cost[site] for site in chosen) / len(chosen) if chosen else None
        assert row[side] == (None if expected is None else pytest.approx(expected, rel=1e-4, abs=1e-7))


def test_every_method_of_a_recipe_has_a_name_in_comparisons() -> None:
    """Catches a new way to train that no comparison can name, or that is named like a method."""
    assert {*FOUND_BY} == {*get_args(Trainer)}
    assert {*FOUND_BY.values()} == {*TRAINED}
    assert not {*TRAINED} & {*METHODS}
    assert not {name_found(method) for method in METHODS} & {*TRAINED, *METHODS}


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"policies": ["gredy"]}, "'gredy': no such method, did you mean 'greedy'"),
        ({"budgets": (0.0,)}, r"expected --budgets in \(0, 1\], such as 0.9,0.7, got 0"),
        ({"group": "text"}, "expected --group all or vision, got 'text'"),
        ({"split": "train"}, "plans are chosen by it; judge on test or validation"),
        ({"seeds": 0}, "expected --seeds of at least 1, got 0"),
        ({"wandb": "onlin"}, r"--wandb: expected disabled \| offline \| online, got 'onlin'; did you mean 'online'"),
    ],
)
def test_what_is_refused_before_anything_is_loaded(given: dict[str, Any], text: str, tmp_path: Path) -> None:
    with pytest.raises(AdaSkipError, match=text):
        adaskip.compare("no-such-model", output=tmp_path, **SMALL | given)


def test_another_comparison_and_a_damaged_cell_are_said(tmp_path: Path) -> None:
    adaskip.compare("digits-vlm", policies=[], output=tmp_path, **SMALL)
    with pytest.raises(ConfigError, match=r"holds a comparison with examples=24; choose another folder"):
        adaskip.compare("digits-vlm", policies=[], output=tmp_path, **SMALL | {"examples": 12})
    (tmp_path / "cells" / "none-1-seed0.json").write_text('{"policy": "none"')
    with pytest.raises(CheckpointError, match=r"none-1-seed0\.json: expected a cell .* remove it to measure it anew"):
        adaskip.compare("digits-vlm", policies=[], output=tmp_path, **SMALL)
