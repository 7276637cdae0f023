"""`adaskip eval` puts the routers beside the best static plan: the same figures, and who is closer to dense."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from adaskip.errors import ConfigError, DataError
from adaskip.plan import SkipPlan
from adaskip.runtime.attach import RoutedModel
from adaskip.stages import LineStages
from adaskip.training.data import Collator
from adaskip.verbs.evaluate import evaluate
from adaskip.verbs.rival import Rival, duel, find_rival
from adaskip.verbs.run import Run
from adaskip.verbs.splits import split_of
from adaskip.verbs.teacher import ROWS, Forced, read_answers, rows_at_once
from tests.faults.finished import copy_of

PLAN = (2, 9)


@pytest.fixture(scope="module")
def copied(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose routers decide differently, and whose training found a plan."""
    folder = copy_of(run, tmp_path_factory.mktemp("static") / "run", spread=0.3)
    summary = json.loads((folder / "summary.json").read_text())
    summary["static"] = {"skip": [*PLAN], "keep": 0.8, "kl": 0.1, "accuracy": 0.9}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def whole_passes(run: Run, records: list[dict]) -> dict[str, list[torch.Tensor]]:
    """Log-probabilities, float64 (tokens v), of each record's answer tokens, one record at a time, and its tokens."""
    layers = len(run.model.spec.layers)
    found: dict[str, list[torch.Tensor]] = {name: [] for name in ("dense", "routed", "static", "targets")}
    for record in records:
        batch = Collator(run.processor)([record])
        place = batch.supervised[0]
        with run.model.dense():
            passes = {"dense": run.model(**batch.arguments())}
        passes["routed"] = run.model(**batch.arguments())
        passes["static"] = run.model(**batch.arguments(), routing=SkipPlan.static(PLAN).keep(layers)[:, None])
        for side, output in passes.items():
            found[side].append(output.logits[0, :-1][place].double().log_softmax(-1))
        found["targets"].append(batch.labels[0, 1:][place])
    return found


@torch.no_grad()
def test_every_figure_is_what_whole_passes_give(copied: Path) -> None:
    """Would catch: a mean over inputs where one over tokens is promised, a side that is read under another's layers,
    or a KL in the other direction.
    """
    result = evaluate(copied, per_kind=6)
    loaded = Run.open(copied)
    records = split_of(loaded.recipe, "test", 6)
    for row in result.kinds:
        found = whole_passes(loaded, [record for record in records if record["kind"] == row.kind][:6])
        dense, targets = found["dense"], found["targets"]
        tokens = sum(map(len, targets))
        for side, prefix in (("routed", ""), ("static", "static_")):
            pairs = list(zip(dense, found[side], strict=True))
            kl = [float((p.exp() * (p - q)).sum(-1).mean()) for p, q in pairs]
            assert getattr(row, f"{prefix}kl") == pytest.approx(sum(kl) / len(kl), abs=1e-5, rel=1e-4)
            same = sum(int((p.argmax(-1) == q.argmax(-1)).sum()) for p, q in pairs)
            assert getattr(row, f"{prefix}token_agreement") == pytest.approx(same / tokens)
        for side in ("dense", "routed", "static"):
            each = [q.gather(1, y[:, None]) for q, y in zip(found[side], targets, strict=True)]
            nll = -float(torch.cat(each).mean())
            assert getattr(row, f"{side}_perplexity") == pytest.approx(torch.tensor(nll).exp().item(), rel=1e-4)
            mean = sum(float(x.mean()) for x in each) / len(each)
            assert getattr(row, f"{side}_log_likelihood") == pytest.approx(mean, abs=1e-5, rel=1e-4)
        assert row.static_keep == pytest.approx(10 / 12)
    assert result.mean["routed_perplexity"] == pytest.approx(
        torch.tensor([row.routed_perplexity for row in result.kinds]).log().mean().exp().item()
    ), "perplexities multiply"


def test_the_words_of_generated_answers(copied: Path) -> None:
    """Against answers generated one prompt at a time; catches figures of teacher forcing, of another side's answers,
    and kinds that do not say what is there, counted as honest.
    """
    skip = (1, 4, 5, 6, 7, 8, 9, 10)
    result = evaluate(copied, per_kind=6, static=skip)
    loaded = Run.open(copied)
    for row in result.kinds:
        asked = [record for record in split_of(loaded.recipe, "test", 6) if record["kind"] == row.kind][:6]
        said, collate = [], Collator(loaded.processor, answers=False)
        for record in asked:
            inputs = collate([record]).inputs
            keep = SkipPlan.static(skip).keep(len(loaded.model.spec.layers))[:, None]
            answer = loaded.model.generate(
                **inputs, routing=keep, max_new_tokens=result.max_new_tokens, do_sample=False
            )[:, inputs["input_ids"].shape[1] :]
            said += loaded.processor.batch_decode(answer, skip_special_tokens=True)
        wrong = [float(text.strip() != record["answer"]) for text, record in zip(said, asked, strict=True)]
        assert row.static_accuracy == pytest.approx(1 - sum(wrong) / 6)
        assert (row.static_edit_distance > 0) == any(wrong)
        if row.kind in ("digit", "max", "repeat"):
            absent = [{*text.split()} & {*"0123456789"} - {*r["present"]} for text, r in zip(said, asked, strict=True)]
            assert row.static_hallucinated == pytest.approx(sum(map(bool, absent)) / 6)
        else:
            assert (row.dense_hallucinated, row.static_hallucinated) == (None, None)
    assert result.mean["static_hallucinated"] > 0, "the plan is so rough that digits are made up"
    assert result.mean["static_edit_distance"] > result.mean["dense_edit_distance"]
    assert "| static hallucinated |" in (copied / "report.md").read_text()


def test_what_counts_inputs_and_what_counts_tokens() -> None:
    """An answer of one token and one of three; would catch a perplexity or an agreement that averages over inputs."""
    tokens = torch.tensor([1.0, 3.0]).double()
    forced = Forced(tokens, torch.tensor([-2.0, -1.5]).double(), torch.tensor([0.1, 0.3]).double(), tokens - 1)
    figures = forced.figures()
    assert figures["kl"] == pytest.approx(0.2)
    assert figures["log_likelihood"] == pytest.approx(-(2.0 + 0.5) / 2)
    assert figures["token_agreement"] == 0.5
    assert figures["perplexity"] == pytest.approx(math.exp(3.5 / 4))


def test_the_difference_is_paired_over_all_inputs(copied: Path) -> None:
    """Would catch: an interval of one kind's inputs, or of two unpaired means; and a report or file without it."""
    result = evaluate(copied, per_kind=2)
    found = result.to_dict()["static"]
    routed, static = (sum(getattr(row, name) for row in result.kinds) / 6 for name in ("kl", "static_kl"))
    assert found["skip"] == [*PLAN]
    assert found["source"].endswith("summary.json, static.skip")
    assert found["kl_difference"]["n"] == 12
    assert found["kl_difference"]["estimate"] == pytest.approx(routed - static)
    assert json.loads((copied / "evaluation.json").read_text())["static"] == found
    report = (copied / "report.md").read_text()
    assert f"{found['sentence']}. The static plan leaves out layers 2, 9 (" in report
    assert "| static accuracy |" in report
    assert "| static perplexity |" in report


def test_generation_shows_what_likelihoods_hide(copied: Path) -> None:
    """Would catch: static answers that are the dense ones, for want of the plan in generation: all layers are out."""
    result = evaluate(copied, per_kind=2, static=range(12))
    assert result.mean["static_keep"] == 0
    assert result.mean["static_agreement"] < 0.5 < result.mean["dense_accuracy"]
    assert result.static.source == "--static"


def test_a_run_without_a_plan_says_how_to_get_one(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Would catch: an old run that can no longer be evaluated, or a missing rival without a word."""
    older = copy_of(run, tmp_path / "run")
    summary = json.loads((older / "summary.json").read_text())
    summary.pop("static", None)
    (older / "summary.json").write_text(json.dumps(summary))
    result = evaluate(older, per_kind=1, stages=LineStages())
    assert f"name one that costs as much: adaskip eval {older} --static 4,5,6" in capsys.readouterr().err
    assert result.static is None
    assert {value for name, value in result.mean.items() if name.startswith("static_")} == {None}
    assert "static" not in (older / "report.md").read_text().split("### By kind")[1].split("## Keep")[0]


@pytest.mark.parametrize(
    ("static", "message"),
    [
        ("4,x", "--static: expected the layers to leave out, such as 4,5,6, got '4,x'"),
        ("", "--static: expected the layers to leave out"),
        ([1.5], "--static: expected the layers to leave out"),
        ("3,12", "--static: layer 12 is outside the model: it has 12 layers, 0 to 11"),
        ([-1], "--static: layer -1 is outside the model"),
    ],
)
def test_no_such_layers(copied: Path, static: str | list, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch: a typing slip that is found out after the answers are written, or ends in a traceback."""
    monkeypatch.setattr(RoutedModel, "generate", lambda *_, **__: pytest.fail("an answer was begun"))
    with pytest.raises(ConfigError, match=message):
        evaluate(copied, per_kind=1, static=static)


@pytest.mark.parametrize("damaged", [{}, {"skip": "4,5"}, {"skip": [1.5]}, [4, 5], "4"])
def test_a_damaged_summary_is_named(damaged: object) -> None:
    with pytest.raises(DataError, match=r"runs/x/summary.json: `static`: expected .* name a plan: --static 4,5,6"):
        find_rival({"static": damaged}, None, Path("runs/x"))
    assert find_rival({"static": damaged}, "3", Path("runs/x")) == Rival((3,), "--static")


def test_the_verdict_follows_the_interval() -> None:
    """Would catch: a winner named where the interval holds 0, or the two sides confused."""
    draw = torch.Generator().manual_seed(0)
    noise = torch.randn(60, generator=draw, dtype=torch.float64)
    rival, base = Rival((1,), "--static"), torch.full((60,), 1.0, dtype=torch.float64)

    def said(routed: torch.Tensor) -> str:
        return duel(rival, routed, base, (0.5, 0.6)).sentence

    assert said(base - 0.5 + 0.1 * noise).endswith("the routers are closer to the dense model than the static plan")
    assert said(base + 0.5 + 0.1 * noise).endswith("the static plan is closer to the dense model than the routers")
    assert said(base + noise).endswith("these inputs do not tell the routers from the static plan")
    assert said(base).endswith("at keep 0.500 beside 0.600: the run decides as the static plan does")
    assert "not finite" in said(base * torch.inf)
    assert duel(rival, base * torch.inf, base, (0.5, 0.6)).kl_difference is None


@torch.no_grad()
def test_a_wide_head_reads_the_answers_alone(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch: a vocabulary of 150,000 for every token of every prompt, or 64 answers of three sides at once."""
    loaded = Run.open(copied)
    batch = Collator(loaded.processor)(split_of(loaded.recipe, "test", 2))
    narrow = read_answers(loaded.model, [batch], PLAN)
    assert rows_at_once(loaded.model, 64) == 64
    for module in ("survey.record", "theory.costs", "verbs.teacher"):
        monkeypatch.setattr(f"adaskip.{module}.WIDE", 8)
    assert (rows_at_once(loaded.model, 64), rows_at_once(loaded.model, 3)) == (ROWS, 3)
    widths: list[int] = []
    head = loaded.model.backbone.get_output_embeddings()
    head.register_forward_hook(lambda module, inputs, output: widths.append(output.shape[1]))
    wide = read_answers(loaded.model, [batch], PLAN)
    longest = int(batch.supervised.sum(1).max())
    assert len(widths) == 3
    assert max(widths) <= longest + 1 < batch.labels.shape[1]
    for side, figures in wide.items():
        for name, value in figures.figures().items():
            assert value == pytest.approx(narrow[side].figures()[name], rel=1e-3, abs=1e-6)
