"""Answers of more than sixteen tokens: `eval`, `generate` and `calibrate` take the length from the data and say so."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BloomConfig, LlamaConfig, PreTrainedTokenizerFast

from adaskip.backbone.inspect import count_positions
from adaskip.errors import CheckpointError, ConfigError, DataError
from adaskip.recipe import load
from adaskip.runtime.attach import RoutedModel
from adaskip.stages import LineStages
from adaskip.verbs.calibrate import calibrate
from adaskip.verbs.evaluate import evaluate
from adaskip.verbs.generate import answer, answer_many
from adaskip.verbs.lengths import check_room, longest_answer
from adaskip.verbs.run import Run
from adaskip.verbs.train import train
from tests import toys
from tests.faults.finished import copy_of

SHORTEST = 20  # from here on the model is pushed to end its answer, sooner or later


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a tiny Llama whose data's answers are those that it generates itself, most of them of 20 words or more.

    No record has a kind.
    """
    root = tmp_path_factory.mktemp("long")
    torch.manual_seed(0)
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(92))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    model = toys.llama().eval()
    model.generation_config.update(
        eos_token_id=2, suppress_tokens=[0, 1, 3], exponential_decay_length_penalty=(SHORTEST, 1.5)
    )
    fast.save_pretrained(root / "llama")
    model.save_pretrained(root / "llama")
    data = root / "data"
    data.mkdir()
    for split, count in (("train", 8), ("validation", 8), ("calibration", 30), ("test", 8)):
        lines = []
        for i in range(count):
            prompt = f"w{i} w{(7 * i) % 90} w{(3 * i) % 90}"
            ids = torch.tensor([fast(prompt, add_special_tokens=False)["input_ids"]])
            told = model.generate(ids, max_new_tokens=80, do_sample=False)[0, 3:]
            assert told[-1] == 2
            lines.append(json.dumps({"prompt": prompt, "answer": fast.decode(told[:-1])}))
        (data / f"{split}.jsonl").write_text("\n".join(lines))
    settings = [
        *("trainer.steps=1", "trainer.batch_size=8", "trainer.checkpoint_every=1", "trainer.validate_every=1"),
        *("static.width=0", "conditions.hold_above=null"),  # the routers of one step beat no plan
        *("trainer.progress=false", "conditions.every=0", "conditions.examples=8", "tracking.wandb=disabled"),
        *("backbone.dtype=float32", f"backbone.path={root / 'llama'}", f"data.source={data}", f"output={root / 'run'}"),
    ]
    train(load("causal-lm", settings))
    return root / "run"


def test_the_dense_model_is_right_about_its_own_answers(own: Path, tmp_path: Path) -> None:
    """Cut at 16 tokens, the dense model scored 0 on longer answers that it had generated itself; now 1."""
    found = evaluate(copy_of(own, tmp_path / "run", threshold=-1e6), batch_size=8).to_dict()
    (row,) = found["kinds"]
    assert found["max_new_tokens"] > SHORTEST
    assert found["warnings"] == []
    assert (row["dense_accuracy"], row["routed_accuracy"], row["agreement"]) == (1, 1, 1)
    assert row["kl"] == pytest.approx(0, abs=1e-6)
    assert row["dense_log_likelihood"] == pytest.approx(row["routed_log_likelihood"], abs=1e-5)
    assert row["dense_log_likelihood"] < 0


def test_what_routing_costs_is_shown_apart(own: Path, tmp_path: Path) -> None:
    """Skipping every layer: agreement falls and KL rises, though accuracy is 0 for another reason, a short limit."""
    found = evaluate(copy_of(own, tmp_path / "run", threshold=1e6), batch_size=8, max_new_tokens=4).to_dict()
    (row,) = found["kinds"]
    assert row["dense_accuracy"] == row["routed_accuracy"] == 0
    assert row["agreement"] < 1
    assert row["kl"] > 0.01
    assert row["dense_cut"] == 8
    assert found["warnings"][0] == "8 of 8 dense answers were cut at 4 tokens; give them room: --max-new-tokens 16"
    report = (tmp_path / "run" / "report.md").read_text()
    assert "KL(dense, routed)" in report
    assert "8 of 8 dense answers were cut" in report


def test_generate_and_calibrate_take_the_length_from_the_data(own: Path, tmp_path: Path) -> None:
    """A certificate about the first 16 tokens says nothing of the other nine."""
    copied = copy_of(own, tmp_path / "run", spread=1.0)
    longest = answer(copied, example=0).max_new_tokens
    assert longest > SHORTEST
    assert answer(copied, prompt="w1 w2 w3").max_new_tokens == longest
    assert answer(copied / "router", prompt="w1 w2 w3").max_new_tokens == 64
    (tmp_path / "many.jsonl").write_text('{"prompt": "w1 w2"}\n\n{"prompt": "w3"}\n')
    found = answer_many(copied, tmp_path / "many.jsonl").to_dict()
    assert (found["max_new_tokens"], len(found["answers"])) == (longest, 2)
    certified = calibrate(copied, risk=0.3, delta=0.3).to_dict()
    assert certified["max_new_tokens"] > SHORTEST
    assert certified["answers_cut"] < certified["n"] == 14
    assert calibrate(copied, risk=0.3, delta=0.3, max_new_tokens=5).answers_cut == 14


@pytest.mark.parametrize("tokens", [100000, 2046])
def test_an_answer_longer_than_the_positions_is_refused(
    own: Path, tmp_path: Path, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Would catch: hours of silent writing past what the backbone can tell apart, for one zero too many."""
    (tmp_path / "many.jsonl").write_text('{"prompt": "w1 w2 w3"}\n{"prompt": "w3"}\n')
    for name in ("generate", "generate_many"):
        monkeypatch.setattr(RoutedModel, name, lambda *_, **__: pytest.fail("an answer was begun"))
    verbs: list[Callable[..., Any]] = [
        evaluate,
        partial(calibrate, risk=0.3, delta=0.3),
        partial(answer, prompt="w1 w2 w3"),
        partial(answer_many, file=tmp_path / "many.jsonl"),
    ]
    message = (
        f"--max-new-tokens {tokens}: the backbone has 2048 positions for prompt and answer, and the longest prompt "
        "takes 3; expected at most 2045"
    )
    for verb in verbs:
        with pytest.raises(ConfigError, match=message):
            verb(own, max_new_tokens=tokens)


def test_what_fits_exactly_is_taken(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch: a limit that is one too low, or one for a model that states no number of positions."""
    model = Run.open(own).model
    prompts = [torch.zeros(2, 3), torch.zeros(1, 8)]
    check_room(model, 2040, prompts)
    with pytest.raises(ConfigError, match="expected at most 2040"):
        check_room(model, 2041, prompts)
    with pytest.raises(ConfigError, match="takes 2048; no answer has room behind it, shorten the prompt"):
        check_room(model, 1, [torch.zeros(1, 2048)])
    check_room(model, None, [torch.zeros(1, 2048)])
    assert count_positions(BloomConfig()) is None
    monkeypatch.setattr("adaskip.verbs.lengths.count_positions", lambda _: None)
    check_room(model, 100000, prompts)


@pytest.mark.parametrize(("stated", "original", "positions"), [(64, None, 256), (64, 64, 256), (256, 64, 256)])
def test_stretched_positions_count(stated: int, original: int | None, positions: int) -> None:
    """Would catch: a refusal of what a configuration with rotary scaling allows, in whichever way it states it."""
    rope = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    rope |= {} if original is None else {"original_max_position_embeddings": original}
    config = LlamaConfig(max_position_embeddings=stated, rope_parameters=rope)
    assert count_positions(config) == positions


def test_a_model_that_never_ends_an_answer_is_told(
    own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Would catch: rows that are all written to the limit, without a word of how many tokens that is."""
    endless = shutil.copytree(own.parent / "llama", tmp_path / "endless")
    (endless / "generation_config.json").write_text("{}")
    copied = copy_of(own, tmp_path / "run", spread=1.0)
    recipe = copied / "recipe.resolved.yaml"
    recipe.write_text(recipe.read_text().replace(str(own.parent / "llama"), str(endless)))
    (tmp_path / "many.jsonl").write_text('{"prompt": "w1 w2 w3"}\n')
    told = "names no end token (eos_token_id): 5 tokens are written for every prompt"
    verbs: list[Callable[..., Any]] = [
        evaluate,
        partial(calibrate, risk=0.3, delta=0.3),
        partial(answer, prompt="w1 w2 w3"),
        partial(answer_many, file=tmp_path / "many.jsonl"),
    ]
    for verb in verbs:
        verb(copied, max_new_tokens=5, stages=LineStages())
        assert capsys.readouterr().err.count(told) == 1
    answer(own, prompt="w1 w2 w3", max_new_tokens=5, stages=LineStages())
    assert "end token" not in capsys.readouterr().err


def test_no_answer_at_all_has_length_one(own: Path) -> None:
    """Empty answers leave room for the end token."""
    processor = Run.open(own).processor
    assert longest_answer([{"answer": ""}], processor) == 1
    assert longest_answer([], processor) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file is empty"),
        ('{"prompt": "w1"}\n\n[1]', "line 3: expected an object"),
        ('{"prompt": "w1", "image": 3}', "line 1: image is 3; expected a path"),
        ('{"prompt": "w1"}\n{"prompt": " "}', "line 2: .*prompt is empty"),
        (b"\xff\xfe", "is UTF-16; expected UTF-8"),
    ],
)
def test_many_prompts_with_a_bad_line(own: Path, tmp_path: Path, text: str | bytes, message: str) -> None:
    """A file of prompts with a bad line is named with the line; blank lines are no fault."""
    file = tmp_path / "many.jsonl"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=message):
        answer_many(own, file)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("evaluation.json", "{", "evaluation.json, line 1: expected valid JSON"),
        ("evaluation.json", '{"kinds": [{"kind": "a", "keep": "b"}]}', "`keep` of kind 'a': expected a number"),
        ("metrics.csv", "x\n", "metrics.csv, line 1: expected the header"),
        ("metrics.csv", None, "metrics.csv is missing"),
    ],
)
def test_what_the_report_cannot_read_is_said_before_the_work(
    own: Path, tmp_path: Path, file: str, text: str | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An hour of answering must not end in an error about a file that was damaged before it began."""
    copied = copy_of(own, tmp_path / "run")
    (copied / file).unlink(missing_ok=True)
    if text is not None:
        (copied / file).write_text(text)
    monkeypatch.setattr("adaskip.verbs.evaluate.Run.open", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(DataError, match=message):
        evaluate(copied)


def test_routers_inside_a_run_are_no_run(own: Path) -> None:
    """RUN/router instead of RUN: the text names the folder to pass."""
    with pytest.raises(CheckpointError, match=f"expected the folder of a run: pass {own}$"):
        evaluate(own / "router")
