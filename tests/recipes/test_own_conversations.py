"""Conversations of one's own, with pictures and without, some of them broken: from a file to routers."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from adaskip import cli
from adaskip.errors import CheckpointError
from adaskip.recipe import load
from adaskip.runtime.description import CONFIG
from adaskip.verbs.data import data
from adaskip.verbs.generate import answer, answer_many
from adaskip.verbs.train import train
from tests import documents
from tests.own_data import SHORT, conversation

LONG = " ".join(["w1"] * 70)


def spoil(row: dict[str, Any], **fields: Any) -> bytes:
    return json.dumps(row | fields).encode()


def content(row: dict[str, Any], turn: int, value: Any) -> bytes:
    turns = [*row["messages"]]
    turns[turn] = {**turns[turn], "content": value}
    return json.dumps({**row, "messages": turns}).encode()


def pictured(name: str) -> Callable[[dict[str, Any]], bytes]:
    return lambda row: content(row, 0, [{"type": "image", "image": name}, {"type": "text", "text": "w1"}])


FAULTS: list[tuple[Callable[[dict[str, Any]], bytes], str]] = [
    (lambda row: b'{"messages": [', "not JSON"),
    (lambda row: b"[1, 2]", "expected a JSON object, got list"),
    (lambda row: '{"messages": "caf\u00e9"}'.encode("cp1252"), "byte 0xe9 after"),
    (lambda row: spoil(row, messages=row["messages"][:1]), "messages holds no turn of the assistant"),
    (lambda row: content(row, 1, " "), "messages[1].content is empty"),
    (lambda row: content(row, 1, 7), "messages[1].content is 7 (a number)"),
    (lambda row: content(row, 0, [{"type": "audio"}]), "is a part of type 'audio' (text); expected text | image"),
    (pictured("none.png"), "none.png does not exist"),
    (pictured("text.png"), "text.png: cannot be read"),
    (pictured("cut.png"), "truncated"),
    (pictured("bomb.png"), "decompression bomb"),
    (lambda row: content(row, 1, LONG), "tokens with its answer, more than 64 (data.max_tokens); shorten it"),
    (lambda row: content(row, 0, "<image> w1"), "1 <image> in the prompt and no picture"),
]


def write(folder: Path, count: int, spoilt: int = 0) -> tuple[Path, dict[int, str]]:
    """A file of conversations, the first ``spoilt`` tenth lines of it broken in turn; and the fault of each line."""
    folder.mkdir()
    Image.effect_noise((64, 64), 99).save(folder / "whole.png")
    (folder / "cut.png").write_bytes((folder / "whole.png").read_bytes()[:-900])
    (folder / "text.png").write_text("no picture")
    Image.new("1", (14_000, 14_000)).save(folder / "bomb.png")
    lines, faults = [], {}
    for number in range(count):
        row = conversation(number, folder)
        line = json.dumps(row).encode()
        if number % 10 == 5 and len(faults) < spoilt:
            broken, fault = FAULTS[len(faults) % len(FAULTS)]
            line, faults[number + 1] = broken(row), fault
        lines.append(line)
    path = folder / "mine.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path, faults


def settings(model: Path, source: Path, output: Path, **more: Any) -> list[str]:
    own = {"backbone.path": model, "data.source": source, "output": output, "trainer.steps": 2} | more
    return [*SHORT, *(f"{key}={value}" for key, value in own.items())]


def test_two_hundred_conversations_of_which_twenty_are_broken(
    vision_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Twenty lines broken in thirteen ways: left out and named under a limit of 20, a list and status 2 under 5.

    Catches a fault that ends training in its middle, one that is named with another line, and one that is counted once
    for every split.
    """
    path, faults = write(tmp_path / "mine", 200, spoilt=20)
    own = settings(vision_model, path, tmp_path / "run", **{"data.bad_limit": 20, "data.max_tokens": 64})
    done = train(load("causal-lm", own))
    assert done.steps == 2
    used = json.loads((tmp_path / "run" / "data.json").read_text())
    assert used["bad"] == 20
    assert sum(split["records"] for split in used["splits"].values()) == 180
    told = {int(text.split("line ")[1].split(":")[0]): text for text in used["faults"]}
    assert told.keys() == faults.keys()
    assert not {line: told[line] for line, fault in faults.items() if fault not in told[line]}
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "causal-lm", *own, "data.bad_limit=5", f"output={tmp_path / 'other'}"])
    assert stop.value.code == 2
    head, *listed = capsys.readouterr().err.split("mine.jsonl: ")[-1].split("\n  ")
    assert head == "20 bad records, and data.bad_limit lets 5 be left out: 20 faults"
    assert len(listed) == 20
    assert not (tmp_path / "other").exists()


def test_the_readmes_ten_lines(vision_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its two lines five times with other words, and its commands as they stand, with what it adds for so few lines.

    Catches a README whose own words lead to no routers; splits that change between verbs; a run that is resumed on
    other data than it was started on.
    """
    section = documents.read("README.md").split("## Your own data")[1].split("\n## ")[0]
    shown = [json.loads(line) for line in re.search(r"```json\n(.*?)```", section, re.S)[1].splitlines()]  # type: ignore[index]
    few = re.search(r"with ten, add `([^`]*)`", section)[1].split()  # type: ignore[index]
    commands = re.search(r"```bash\n(.*?)```", section, re.S)[1].splitlines()  # type: ignore[index]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    Path("scans").mkdir()
    lines = []
    for number in range(5):
        Image.new("RGB", (16, 16), (50 * number, 9, 9)).save(f"scans/{number}.png")
        text, picture = (json.dumps(row) for row in shown)
        lines += [text.replace("2 + 3", f"w{number} + w3"), picture.replace("scans/1", f"scans/{number}")]
    Path("my.jsonl").write_text("\n".join(lines))
    for command in commands:
        words = [str(vision_model) if word == "MODEL" else word.replace("=MODEL", f"={vision_model}") for word in
                 shlex.split(command, comments=True)[1:]]  # fmt: skip
        with pytest.raises(SystemExit) as stop:
            cli.main([*words, *(few if words[0] in ("data", "train") else [])])
        assert stop.value.code in (0, None), command
    run = Path("runs/my-recipe")
    assert (run / "router" / CONFIG).is_file()
    recipe = load(run / "recipe.resolved.yaml")
    found = data(recipe).to_dict()
    used = json.loads((run / "data.json").read_text())
    assert used["chat"]
    assert {row["split"]: {"records": row["records"], "digest": row["digest"]} for row in found["splits"]} == used[
        "splits"
    ]
    assert sum(row["records"] for row in found["splits"]) == 10
    assert [part["part"] for part in found["first"]["parts"]] == ["prompt", "scored"]
    assert (
        answer(run, prompt="w1 + w2", max_new_tokens=2).prompt == "<s> w70 w1 + w2\n w71"
    )  # as it has learned to read
    Path("ask.jsonl").write_text(json.dumps({"messages": shown[0]["messages"][:1]}) + '\n{"prompt": "w5"}')
    asked = [row["prompt"] for row in answer_many(run, Path("ask.jsonl"), max_new_tokens=2).rows]
    assert asked == ["<s> w70 What is 2 + 3?\n w71", "<s> w70 w5\n w71"]
    Path("my.jsonl").write_text("\n".join(lines).replace("41.50", "41.51"))
    with pytest.raises(CheckpointError, match=r"the data have changed since the run was started: train \("):
        train(recipe, resume=True)
