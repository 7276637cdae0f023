"""`adaskip check` on routers that skip what may not be skipped: it must not say that the conditions hold."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch

from adaskip.cli import main
from adaskip.errors import CheckpointError, DataError
from adaskip.theory.conditions import Finding, SkipFinding, conclude, judge_joint
from adaskip.verbs.check import check
from tests.faults.finished import copy_of

ALPHA, TOLERANCE = 0.1, 0.05


def joint(kl: float, skips: int = 3, admissible: bool = True, n: int = 60, uncovered: int = 0, share: float = 0.0):
    """What is found of ``n`` inputs that each skip the first ``skips`` of six layers at a joint cost around ``kl``."""
    spread = 1 + 0.1 * torch.sin(torch.arange(n).float())
    cost = kl * spread
    bound = 2 * cost
    bound[n // 2 : n // 2 + uncovered] /= 100
    keep = torch.ones(6, n, dtype=torch.bool)
    keep[:skips] = False
    verdicts = dict.fromkeys(range(6), "admissible" if admissible else "undecided")
    shares = keep.float().clamp(min=share) if share else None
    return judge_joint(cost, bound, keep, verdicts, ALPHA, TOLERANCE, share=shares)  # type: ignore[arg-type]


def skip(verdict: str) -> dict[int, SkipFinding]:
    low, high = {"admissible": (0.0, 0.01), "inadmissible": (0.2, 0.4), "undecided": (0.0, 0.3)}[verdict]
    return {1: SkipFinding(1, 40, (Finding(1, "all", "functional", (low + high) / 2, low, high, TOLERANCE, 40),))}


@pytest.mark.parametrize(
    ("found", "skips", "verdict", "reason"),
    [
        (joint(0.02), skip("admissible"), "hold", "cost 0.0201 nats a token, 0.15 tolerated"),
        (joint(0.02), skip("undecided"), "hold", "3.0 skips an input at 0.05"),
        (joint(3.2), {}, "do not hold", "cost 3.21 nats a token, 0.15 tolerated"),
        (joint(3.2, admissible=False), {}, "do not hold", "none of the 180 skips lies on a layer that was found"),
        (joint(0.02, admissible=False), {}, "undecided", "none of the 180 skips lies on a layer that was found"),
        (joint(0.02), skip("inadmissible"), "do not hold", "skips of layer 1 are inadmissible on the 40 inputs"),
        (joint(0.02, uncovered=20), {}, "do not hold", "covers 33% of fresh inputs, 90% are promised"),
        (joint(0.15), {}, "undecided", "too close to tell on 60 inputs"),
        (joint(0.02, n=12), {}, "undecided", "12 inputs are too few at alpha=0.1, 18 are needed"),
        (joint(0.0, skips=0), {}, "hold", "the routers skip nothing"),
        # scope token: no layer is left by most tokens, yet two thirds of three layers run
        (joint(0.5, skips=3, share=0.6), {}, "do not hold", "1.2 skips an input"),
    ],
)
def test_what_holds(found: object, skips: dict, verdict: str, reason: str) -> None:
    """Undecided is not holding, and one clear failure is enough, whichever it is; each says why."""
    concluded = conclude(found, skips, TOLERANCE, ALPHA)  # type: ignore[arg-type]
    assert concluded.verdict == verdict
    assert any(reason in text for text in concluded.reasons), concluded.reasons


def test_routers_that_skip_everything_do_not_hold(run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Every layer skipped for every input, KL of whole nats: exit 1 and the reasons, where it said that they hold."""
    bad = copy_of(run, tmp_path / "bad", threshold=1e6)
    with pytest.raises(SystemExit) as stop:
        main(["check", str(bad), "--json"])
    found = json.loads(capfd.readouterr().out)
    assert stop.value.code == 1
    assert (found["ok"], found["verdict"]) == (False, "do not hold")
    assert found["summary"]["kl"] > 1
    assert found["summary"]["tolerance"] == 0.05
    assert found["summary"]["tolerated"] == pytest.approx(12 * 0.05)
    assert any("all skips of an input together cost" in reason for reason in found["summary"]["reasons"])


def test_routers_that_skip_nothing_hold(run: Path, tmp_path: Path) -> None:
    """A check that says no to everything is useless too: dense decisions hold."""
    found = check(copy_of(run, tmp_path / "dense", threshold=-1e6)).to_dict()
    assert (found["ok"], found["reasons"]) == (True, ["the routers skip nothing on these inputs"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.unlink(), "prices.json: missing, and the bound's constants are in it; train the run again"),
        (lambda path: path.write_text("{"), "prices.json: missing or damaged"),
        (lambda path: path.write_text("[]"), "prices.json: missing or damaged"),
        (lambda path: path.write_text('{"shift": "x"}'), "prices.json: missing or damaged"),
        (lambda path: _poison(path, math.nan), "expected one number for every layer"),
        (lambda path: _poison(path, None), "prices.json: missing or damaged"),
        (lambda path: path.write_bytes(b"\xff\xfe"), "prices.json: missing or damaged"),
        (lambda path: _shorten(path), "expected prices of 12 layers, found 11; it belongs to another run"),
    ],
)
def test_damaged_prices_are_named(run: Path, tmp_path: Path, change: object, message: str) -> None:
    """A run folder that was edited, half copied or mixed up with another: the file is named, nothing is judged."""
    bad = copy_of(run, tmp_path / "bad")
    change(bad / "prices.json")  # type: ignore[operator]
    with pytest.raises(CheckpointError, match=re.escape(message)):
        check(bad)


def _poison(path: Path, value: float | None) -> None:
    stored = json.loads(path.read_text())
    stored["shift"][3] = value
    path.write_text(json.dumps(stored))


def _shorten(path: Path) -> None:
    """Write the prices that a model of one layer less would have, each of the shape that is right for it."""
    stored = json.loads(path.read_text())
    stored |= {name: stored[name][:-1] for name in ("shift", "peak", "mass")}
    stored["correlation"] = [row[:-1] for row in stored["correlation"][:-1]]
    functional = stored["functional"]
    functional |= {name: functional[name][:-1] for name in ("bias", "highest", "factor")}
    functional["weight"] = [row[:-1] for row in functional["weight"]]
    path.write_text(json.dumps(stored))


def test_a_damaged_test_split_is_not_replaced_silently(run: Path, tmp_path: Path) -> None:
    """A broken line in test.jsonl was taken for "no test split", and calibration inputs were judged instead."""
    data = tmp_path / "data"
    data.mkdir()
    row = json.dumps({"prompt": "<image> digit top left ?", "answer": "1"})
    for split in ("train", "validation", "calibration"):
        (data / f"{split}.jsonl").write_text(f"{row}\n" * 60)
    (data / "test.jsonl").write_text("{broken\n")
    moved = copy_of(run, tmp_path / "moved")
    path = moved / "recipe.resolved.yaml"
    path.write_text(path.read_text().replace("source: digits-vlm", f"source: {data}"))
    with pytest.raises(DataError, match=r"test.jsonl, line 1: not JSON"):
        check(moved)
