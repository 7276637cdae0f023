"""A recipe from end to end, on a short schedule: the run folder, W&B, resuming, answering, exporting."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path

import pytest
import torch

import adaskip
from adaskip.backbone.load import load_backbone
from adaskip.errors import BackboneError, CheckpointError, DataError
from adaskip.recipe import load
from adaskip.training.checkpoints import newest_checkpoint
from adaskip.verbs.check import check
from adaskip.verbs.evaluate import evaluate
from adaskip.verbs.export import export
from adaskip.verbs.generate import answer
from adaskip.verbs.train import train
from tests import wandb_file

SHORT = [
    "trainer.steps=12",
    "trainer.batch_size=16",
    "trainer.checkpoint_every=4",
    "trainer.validate_every=4",
    "trainer.progress=false",
    "conditions.every=6",
    "conditions.examples=36",
    "data.examples.train=480",
    "data.examples.validation=60",
    "data.examples.calibration=72",
    "data.examples.test=60",
    "objective.warmup=0.1",
    "static.fallback=false",  # router/ holds the routers, which after so few steps beat no plan
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short, whole run of the shipped recipe."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    train(load("digits-vlm", [*SHORT, f"output={folder}"]))
    return folder


def numbers(run: Path) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    with (run / "metrics.csv").open() as file:
        for row in csv.DictReader(file):
            found.setdefault(row["name"], []).append((int(row["step"]), float(row["value"])))
    return found


def test_the_run_folder_is_complete(run: Path) -> None:
    assert load(run / "recipe.resolved.yaml").trainer.steps == 12
    environment = json.loads((run / "env.json").read_text())
    assert environment["packages"]["torch"] == torch.__version__.split("+")[0] or environment["packages"]["torch"]
    found = numbers(run)
    for name in ("train/loss", "train/kl", "train/task", "train/bound", "train/budget", "router/multiplier"):
        assert found[name], name
    assert len([name for name in found if name.startswith("router/keep/layer_")]) == 12
    assert [step for step, _ in found["val/keep"]][:3] == [3, 7, 11]
    looks = [json.loads(line) for line in (run / "conditions.jsonl").read_text().splitlines()]
    assert [look["step"] for look in looks] == [6, 12, 12]
    assert {f["notion"] for f in looks[0]["findings"]} == {"geometric", "proximal", "functional"}
    assert all(f["low"] is None or f["low"] <= f["estimate"] for f in looks[0]["findings"])
    rates = json.loads((run / "keep_rates.json").read_text())
    assert set(rates) == {"digit", "sum", "count", "max", "arithmetic", "repeat"}
    assert all(len(row) == 12 for row in rates.values())
    assert (run / "report.md").stat().st_size > 500
    summary = json.loads((run / "summary.json").read_text())
    assert summary["val"]["keep"] <= load("digits-vlm").objective.keep + 1e-6


def test_checkpoints_hold_no_backbone(run: Path) -> None:
    newest, step = newest_checkpoint(run)
    assert step == 12
    checkpoint = torch.load(newest, weights_only=True)
    assert {name.split(".")[0] for name in checkpoint["state_dict"]} >= {"multiplier", "model"}
    assert not any("backbone" in name for name in checkpoint["state_dict"])
    assert not list(run.rglob("*.pkl"))


def test_wandb_has_the_same(run: Path) -> None:
    found = wandb_file.read(run)
    assert found["config"]["objective"]["keep"] == load("digits-vlm").objective.keep
    history = found["history"]
    keys = {key for row in history for key in row}
    assert {"train/loss", "train/kl", "train/task", "train/bound", "theory/joint_kl", "theory/coverage"} <= keys
    assert {f"router/keep/layer_{i:02d}" for i in range(12)} <= keys
    verdicts = [row for row in history if "conditions/_type" in row]
    assert [(row["conditions/_type"], row["conditions/nrows"]) for row in verdicts] == [("table-file", 36)] * 3
    picture = next(row for row in history if "keep_rates/_type" in row)
    assert picture["keep_rates/_type"] == "image-file"
    assert list(run.glob(f"wandb/offline-run-*/files/{picture['keep_rates/path']}"))
    table = next(row["keep_rate_table/path"] for row in history if "keep_rate_table/path" in row)
    stored = json.loads(next(iter(run.glob(f"wandb/offline-run-*/files/{table}"))).read_text())
    rates = json.loads((run / "keep_rates.json").read_text())
    assert {(k, layer): rate for k, layer, rate in stored["data"]} == {
        (k, layer): rate for k, row in rates.items() for layer, rate in enumerate(row)
    }
    ladder = stored_table(run, history, "bound_ladder_table")
    assert ladder["columns"] == ["layer", "exact KL", "two-point bound", "Bennett bound"]
    assert [row[0] for row in ladder["data"]] == [str(layer) for layer in range(12)]
    assert all(exact <= tight <= loose for _, exact, tight, loose in ladder["data"])
    assert any("bound_ladder/path" in row for row in history)
    shown = stored_table(run, history, "answers")
    answers = [dict(zip(shown["columns"], row, strict=True)) for row in shown["data"]]
    assert len({row["kind"] for row in answers}) == len(answers) == 4
    for row in answers:
        assert row["keep"] == pytest.approx(row["route"].count("#") / 12)
        assert row["prompt"]
        assert row["dense_answer"]
    artifact = next(a for a in found["artifacts"] if a.type == "model")
    assert artifact.name == "router-digits-vlm"
    made_of = json.loads(artifact.metadata)
    stored = json.loads((run / "router" / "adaskip_config.json").read_text())
    assert made_of["backbone"]["weights"] == stored["backbone"]["weights"]
    assert made_of["content"] == stored["content"]
    splits = json.loads((run / "data.json").read_text())["splits"]
    assert {name: made_of["data"][name] for name in splits} == splits
    assert {entry.path for entry in artifact.manifest.contents} >= {"adaskip_config.json", "router.safetensors"}
    logged = {row["train/loss"] for row in history if "train/loss" in row}
    assert logged == {value for _, value in numbers(run)["train/loss"]}


def stored_table(run: Path, history: list[dict], name: str) -> dict:
    """What a table of W&B's holds, read from the disk."""
    path = next(row[f"{name}/path"] for row in history if f"{name}/path" in row)
    return json.loads(next(iter(run.glob(f"wandb/offline-run-*/files/{path}"))).read_text())


def test_evaluate_answer_and_check(run: Path) -> None:
    found = evaluate(run, per_kind=4, batch_size=4).to_dict()
    assert [row["kind"] for row in found["kinds"]] == ["digit", "sum", "count", "max", "arithmetic", "repeat"]
    for row in found["kinds"]:
        assert row["n"] == 4
        assert 0 < row["keep"] <= 1
        assert row["flops_saved"] == pytest.approx(1 - row["keep"])
        assert min(row["dense_s"], row["routed_s"], row["prefill_dense_s"], row["prefill_routed_s"]) > 0
    told = answer(run, example=5).to_dict()
    assert len(told["route"]) == told["layers"] == 12
    assert told["keep"] == pytest.approx(sum(told["route"]) / 12)
    verdicts = check(run).to_dict()
    assert isinstance(verdicts["ok"], bool)
    assert verdicts["summary"]["n"] == 60
    assert json.loads((run / "evaluation.json").read_text())["example"]["prompt"] == told["prompt"]
    with pytest.raises(DataError, match=r"--example 99: expected 0 to 59"):
        answer(run, example=99)


def test_export_and_load(run: Path, tmp_path: Path) -> None:
    exported = export(run, tmp_path / "out").to_dict()
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(exported["files"])
    assert "library_name: adaskip" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(CheckpointError, match="already holds something"):
        export(run, tmp_path / "out")
    shutil.rmtree(run / "not-there", ignore_errors=True)
    model = adaskip.RoutedModel.from_pretrained(tmp_path / "out")
    assert model.policy.threshold == json.loads((run / "summary.json").read_text())["threshold"]
    picture = tmp_path / "picture.png"
    from adaskip.demo.digits import examples

    example = examples("test", 1, seed=3)[0]
    example["image"].save(picture)
    told = answer(tmp_path / "out", image=picture, prompt=example["prompt"].removeprefix("<image> ")).to_dict()
    assert told["prompt"].startswith("<image>")
    assert told["route"] == model_route(model, example)


def model_route(model: adaskip.RoutedModel, example: dict) -> list[bool]:
    from adaskip.demo.backbone import load as load_demo

    batch = adaskip.Collator(load_demo()[1], answers=False)([example])
    model(**batch.inputs)
    return model.routing.keep[:, 0].tolist()


def test_routers_refuse_another_backbone(run: Path, tmp_path: Path) -> None:
    other = load_backbone("digits-vlm")
    with torch.no_grad():
        for weight in other.parameters():
            weight.add_(0.01)
    with pytest.raises(BackboneError, match=r"another backbone: weights: \d+ of \d+ differ, such as"):
        adaskip.RoutedModel.from_pretrained(run / "router", other)
    assert "forward" not in other.model.language_model.layers[0].__dict__
    with pytest.warns(UserWarning, match="another backbone"):
        adaskip.RoutedModel.from_pretrained(run / "router", other, strict=False).detach()
    from tests.toys import llama

    with pytest.raises(
        BackboneError, match=r"class: 'LlavaForConditionalGeneration' expected, 'LlamaForCausalLM' found"
    ):
        adaskip.RoutedModel.from_pretrained(run / "router", llama())


@pytest.mark.parametrize("fault", ["truncated weights", "broken json", "missing weights", "newer format"])
def test_damaged_routers_are_told(run: Path, tmp_path: Path, fault: str) -> None:
    folder = Path(shutil.copytree(run / "router", tmp_path / "router"))
    weights, config = folder / "router.safetensors", folder / "adaskip_config.json"
    if fault == "truncated weights":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif fault == "broken json":
        config.write_text(config.read_text()[:50])
    elif fault == "missing weights":
        weights.unlink()
    else:
        config.write_text(re.sub(r'"format": \d+', '"format": 99', config.read_text()))
    expected = {
        "truncated weights": "damaged",
        "broken json": "damaged",
        "missing weights": "missing",
        "newer format": "upgrade",
    }
    with pytest.raises(CheckpointError, match=expected[fault]):
        adaskip.RoutedModel.from_pretrained(folder)


def test_vision_recipe(tmp_path: Path) -> None:
    folder = tmp_path / "vision"
    summary = train(load("digits-vlm-vision", [*SHORT, "tracking.wandb=disabled", f"output={folder}"])).to_dict()
    looks = [json.loads(line) for line in (folder / "conditions.jsonl").read_text().splitlines()]
    assert {f["notion"] for f in looks[0]["findings"]} == {"geometric", "proximal", "functional", "cross-modal"}
    assert not (folder / "wandb").exists()
    assert summary["val"]["keep"] < 1
    with pytest.raises(DataError, match=r"pass a picture with --image"):
        answer(folder, prompt="digit top left ?")
