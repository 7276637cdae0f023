"""Alarms of collapsed routers: each with a planted collapse, none where routers do what they should."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.loggers import Logger, WandbLogger
from torch import Tensor

import adaskip
from adaskip.training import callbacks
from adaskip.training.alarms import MANY, deaf, dear, describe, find_alarms, saturated
from adaskip.training.callbacks import OnViolation
from adaskip.training.tracking import Board
from tests.tuning import GREEDY, batches, eager, loader

TOLERANCE = 0.05
COSTS = torch.tensor([3.0, 0.2, 0.01, 0.1])  # dear, in between, cheap, in between
EACH = COSTS[:, None].expand(-1, 32)  # the same for every input


def logits(rows: int = 32) -> Tensor:
    """Logits (l n) of routers that look at their input, and run the dear layer."""
    draw = torch.Generator().manual_seed(0)
    found = torch.randn(4, rows, generator=draw)
    found[0] = 3.0
    return found


def test_routers_that_look_raise_none() -> None:
    assert find_alarms(logits(), logits() > 0, EACH, TOLERANCE) == ()
    assert describe(logits(), logits() > 0).paths > 4
    assert describe(logits(), logits() > 0).logit_std == pytest.approx(0.7, abs=0.1)


# -- saturated gates ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [9.0, -9.0])
def test_a_gate_without_slope_is_an_alarm(value: float) -> None:
    """Layer 1 is certain for every input and should not be."""
    found = logits()
    found[1] = value
    alarm = saturated(found, COSTS, TOLERANCE)
    assert alarm is not None
    assert (alarm.name, alarm.layers) == ("saturated", (1,))
    assert f"layer 1 ({'runs' if value > 0 else 'skips'}, 0.2 nats) lies more than 8 from" in alarm.sentence
    assert find_alarms(found + 20, found > 0, EACH, TOLERANCE, threshold=20.0)[0] == alarm


@pytest.mark.parametrize(
    ("layer", "value", "held", "alarmed"),
    [
        (2, -9.0, (), False),  # cheap, and left out
        (0, 9.0, (), False),  # dear, and run
        (0, -9.0, (), True),
        (1, 9.0, (1,), False),  # held: its router decides nothing
        (1, 7.0, (), False),
    ],
)
def test_who_may_be_certain(layer: int, value: float, held: tuple[int, ...], alarmed: bool) -> None:
    found = logits()
    found[layer] = value
    assert (saturated(found, COSTS, TOLERANCE, held) is not None) == alarmed
    found[layer, 5] = 0.5  # one input about which it is not
    assert saturated(found, COSTS, TOLERANCE, held) is None


# -- dear layers that most inputs leave out ----------------------------------------------------------------------------


def test_a_dear_layer_that_most_inputs_leave_out_is_an_alarm() -> None:
    """Also where a few run it: a training collapsed at 1.5 nats with 9 of 128 inputs running its layer 0, unalarmed."""
    keep = logits() > 0
    keep[0] = False
    keep[0, 3] = True
    alarm = dear(keep, EACH, TOLERANCE)
    assert alarm is not None
    assert alarm.layers == (0,)
    assert alarm.sentence == (
        "most inputs leave out layer 0 (by 31 of 32 inputs, 3 nats), though skipping one alone costs them more than "
        "10 tolerances (0.5 nats)"
    )
    assert dear(keep, EACH, TOLERANCE, held=[0]) is None
    keep[0, :16] = True  # half of them run it
    assert dear(keep, EACH, TOLERANCE) is None
    keep[2] = False  # cheap
    assert dear(keep, EACH, TOLERANCE) is None


def test_a_layer_is_dear_to_those_that_leave_it_out() -> None:
    """Routers may rightly leave out, for the inputs that do not need it, what costs the others dearly."""
    keep = torch.ones(4, 32).bool()
    keep[0, 12:] = False
    costs = EACH.clone()
    costs[0, 12:] = 0.01
    assert costs[0].mean() > 10 * TOLERANCE
    assert dear(keep, costs, TOLERANCE) is None
    costs[0, 12:] = 0.6
    assert dear(keep, costs, TOLERANCE) is not None


# -- routers that ignore their input -----------------------------------------------------------------------------------


def one_path(rows: int = 32) -> Tensor:
    return torch.tensor([[True], [False], [False], [True]]).expand(-1, rows)


def test_one_path_for_all_is_an_alarm() -> None:
    alarm = deaf(logits(), one_path(), COSTS, TOLERANCE)
    assert alarm is not None
    assert alarm.layers == (1, 2, 3)
    assert "all 32 inputs take one path, without layers 1, 2; logits differ by 0.7" in alarm.sentence
    other = one_path().clone()
    other[1, 4] = True
    assert deaf(logits(), other, COSTS, TOLERANCE) is None


def test_where_one_path_is_no_wonder() -> None:
    """Few inputs, a budget still on its way, nothing left out yet, everything left out, one free layer."""
    assert deaf(logits(), one_path(MANY - 1), COSTS, TOLERANCE) is None
    assert deaf(logits(), torch.ones(4, 32).bool(), COSTS, TOLERANCE) is None
    every = torch.tensor([[True], [False], [False], [False]]).expand(-1, 32)
    assert deaf(logits(), every, COSTS, TOLERANCE) is None
    assert deaf(logits(), one_path(), COSTS, TOLERANCE, held=(1, 3)) is None
    assert [alarm.name for alarm in find_alarms(logits(), one_path(), EACH, TOLERANCE)] == ["deaf"]
    assert find_alarms(logits(), one_path(), EACH, TOLERANCE, settled=False) == ()


# -- in training -------------------------------------------------------------------------------------------------------


class Numbers(Logger):
    """Keep what is logged."""

    name, version = "numbers", 0

    def __init__(self) -> None:
        super().__init__()
        self.logged: dict[str, list[float]] = {}

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        for name, value in metrics.items():
            self.logged.setdefault(name, []).append(value)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


def collapsed(tmp_path: Path, on_violation: OnViolation) -> tuple[adaskip.RoutedModel, Numbers]:
    """Train routers that skip the dearest layer for every input, hardly at all."""
    model = eager({1: GREEDY})
    goal = adaskip.Objective(keep=0.5, warmup=0.0)
    tuner = adaskip.RouterTuner(model, goal, calibration=batches(14)[12:], steps=6, learning_rate=1e-6)
    check = adaskip.ConditionCheck(every=2, tolerance=0.01, on_violation=on_violation, folder=tmp_path)
    numbers = Numbers()
    trainer = lightning.Trainer(
        max_steps=6, accelerator="cpu", callbacks=[check], logger=numbers, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(tuner, loader(batches(8)), loader(batches(12)[8:]))
    return model, numbers


def test_a_router_that_skips_the_dearest_layer_is_alarmed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the log once, in every look's record, in the metrics, and to W&B; catches a collapse that nobody is told."""
    sent: list[tuple[str, str]] = []
    monkeypatch.setattr(Board, "alarm", lambda self, name, text: sent.append((name, text)))
    with caplog.at_level(logging.WARNING, "adaskip"):
        _, numbers = collapsed(tmp_path, "warn")
    told = [record.getMessage() for record in caplog.records if "most inputs leave out" in record.getMessage()]
    assert len(told) == 1
    assert told[0].startswith("step 2: most inputs leave out layer 1 (by 32 of 32 inputs, ")
    assert ("dear", told[0]) in sent
    looks = [json.loads(line) for line in (tmp_path / "conditions.jsonl").read_text().splitlines()]
    assert len(looks) == 3
    for look in looks:
        assert {alarm["name"] for alarm in look["alarms"]} >= {"dear"}
        assert look["routers"]["paths"] == 1
    assert numbers.logged["router/paths"] == [1, 1, 1]
    assert numbers.logged["router/alarms"] == [len(look["alarms"]) for look in looks]
    assert len(numbers.logged["router/logit_std"]) == 3


class OwnLogger(WandbLogger):
    """Lightning's, as in a training loop of the user's own; asks W&B for nothing."""

    experiment = SimpleNamespace()  # type: ignore[assignment]


def test_an_alarm_goes_to_every_wandb_run() -> None:
    """Would catch: a board that knows the logger of `adaskip train` alone, and none of a loop of one's own."""
    sent: list[dict[str, str]] = []
    logger = OwnLogger(mode="offline")
    logger.experiment.alert = lambda **alert: sent.append(alert)
    Board([logger]).alarm("dear", "step 2: ...")
    assert sent == [{"title": "routers: dear", "text": "step 2: ..."}]


@pytest.mark.parametrize(
    ("act", "words"), [("warn", "step 4: layer 1 costs"), ("stop", "conditions violated at step 4")]
)
def test_violated_conditions_are_alerts(monkeypatch: pytest.MonkeyPatch, act: OnViolation, words: str) -> None:
    """Would catch: a violation that stands in the log of a machine nobody looks at, and that W&B does not mail."""
    monkeypatch.setattr(callbacks, "describe_skip", lambda look, layer: f"layer {layer} costs")
    sent: list[dict[str, str]] = []
    logger = OwnLogger(mode="offline")
    logger.experiment.alert = lambda **alert: sent.append(alert)
    trainer, look = (
        SimpleNamespace(is_global_zero=True, loggers=[logger]),
        SimpleNamespace(step=4, violations={1: None}),
    )
    watch = callbacks.ConditionCheck(on_violation=act)
    for _ in range(2):
        watch._act(trainer, SimpleNamespace(), look)  # type: ignore[arg-type]
    assert len(sent) == (1 if act == "warn" else 2)  # a warning once, until it is over
    assert sent[0]["title"] == "routers: conditions"
    assert words in sent[0]["text"]


def test_hold_recovers_from_it(tmp_path: Path) -> None:
    """The layer is held at the first look, and the alarm is over at the next."""
    model, _ = collapsed(tmp_path, "hold")
    assert 1 in model.policy.held
    looks = [json.loads(line) for line in (tmp_path / "conditions.jsonl").read_text().splitlines()]
    raised = [[alarm["name"] for alarm in look["alarms"] if alarm["name"] == "dear"] for look in looks]
    assert raised == [["dear"], [], []]
