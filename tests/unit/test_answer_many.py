"""`adaskip generate RUN --many FILE`: answers in the file's order, those of one path together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from adaskip.cli import main
from adaskip.demo.backbone import load
from adaskip.demo.digits import examples
from adaskip.runtime.attach import attach


def test_many(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    base, _ = load()
    attach(base).save_pretrained(tmp_path / "router")
    lines = []
    for number, record in enumerate(examples("test", per_kind=1, seed=0)[:3]):
        record["image"].save(tmp_path / f"{number}.png")
        lines.append(json.dumps({"prompt": record["prompt"], "image": f"{number}.png"}))
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(lines), encoding="utf-8")
    singles = []
    words = ["generate", str(tmp_path / "router"), "--max-new-tokens", "4", "--json"]
    for number, line in enumerate(lines):
        one = [*words, "--prompt", json.loads(line)["prompt"], "--image", str(tmp_path / f"{number}.png")]
        with pytest.raises(SystemExit, match="0"):
            main(one)
        singles.append(json.loads(capfd.readouterr().out))
    with pytest.raises(SystemExit, match="0"):
        main([*words, "--many", str(file), "--paths", "1"])
    found = json.loads(capfd.readouterr().out)
    assert [row["answer"] for row in found["answers"]] == [one["answer"] for one in singles]
    assert [row["route"] for row in found["answers"]] == [one["route"] for one in singles]
    assert (found["groups"], found["added"], found["changed"], found["keep"]) == (1, 0, 0, 1)
    file.write_text('{"prompt": "x"}\n{"image": 3}', encoding="utf-8")
    with pytest.raises(SystemExit, match="2"):
        main([*words, "--many", str(file)])
    assert 'line 2: expected an object such as {"prompt": "..."}' in json.loads(capfd.readouterr().out)["error"]
    with pytest.raises(SystemExit, match="2"):
        main([*words, "--many", str(file), "--prompt", "x"])
    assert "--many FILE takes no other question" in json.loads(capfd.readouterr().out)["error"]
