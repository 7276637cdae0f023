"""The report says what the run folder's files say, links pictures that exist, and names the line of a damaged file."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from adaskip import report
from adaskip.errors import DataError

LAYERS = 6
ESTIMATES = {"functional": 0.0213, "geometric": 0.0071, "proximal": 0.031, "cross-modal": 0.412}
FINDING = {"low": 0.005, "high": 0.045, "threshold": 0.05, "n": 128, "margin": 0.03, "verdict": "admissible"}
JOINT = {"kl": 0.0314, "bound": 0.1271, "kappa": 0.3937, "coverage": 0.9063, "coverage_p": 0.4311}
JOINT |= {"skips": 617, "admissible_skips": 0.8123, "recall": 0.6414, "n": 129}
LOOK = {
    "step": 400,
    "group": "vision",
    "tolerance": 0.05,
    "findings": [
        {"layer": layer, "group": "vision", "notion": notion, "estimate": estimate} | FINDING
        for layer in range(LAYERS)
        for notion, estimate in ESTIMATES.items()
    ],
    "layers": {str(layer): "admissible" if layer else "inadmissible" for layer in range(LAYERS)},
    "rank_correlation": {"cosine": 0.93, "rho": 0.81, "s": 0.95, "mass": -0.12},
    "joint": JOINT,
}
ROW = {"n": 211, "dense_accuracy": 0.957, "routed_accuracy": 0.931, "keep": 0.613, "flops_saved": 0.387}
ROW |= {"static_accuracy": 0.812, "kl": 0.05, "static_kl": 0.0417, "token_agreement": 0.911, "routed_perplexity": 3.21}
ROW |= {"dense_edit_distance": 0.0187, "routed_edit_distance": 0.0291, "routed_hallucinated": None}
ROW |= {"dense_s": 1.37, "routed_s": 0.91, "prefill_dense_s": 0.4, "prefill_routed_s": 0.32}
EVALUATION = {
    "split": "test",
    "kinds": [{"kind": "sum"} | ROW, {"kind": "a|b"} | ROW | {"routed_accuracy": 0.777}],
    "mean": {key: value for key, value in ROW.items() if key != "n"} | {"routed_accuracy": 0.854},
    "example": {"prompt": "<image> digit ?", "answer": "7", "dense_answer": "3", "expected": "7", "keep": 0.583}
    | {"route": [True, True, False, True, False, False]},
}
FILES = {
    "env.json": {"python": "3.11.9", "platform": "Linux", "packages": {"torch": "2.13.0"}, "device": "cpu", "seed": 3},
    "keep_rates.json": {"sum": [1.0, 0.9, 0.7, 0.5, 0.3, 0.1], "repeat": [1.0, 0.8, 0.6, 0.4, 0.2, 0.0]},
    "summary.json": {"val": {"kl": 0.0523, "accuracy": 0.934, "keep": 0.612}, "steps": 400, "seconds": 312.4},
    "evaluation.json": EVALUATION,
}
RECIPE = """\
name: digits
seed: 3
backbone: {path: digits-vlm}
data: {source: digits-vlm}
router: {group: vision}
objective: {keep: 0.6, alpha: 0.1}
"""


def make_run(folder: Path) -> Path:
    """A whole run folder of made-up numbers."""
    (folder / "recipe.resolved.yaml").write_text(RECIPE)
    for name, values in FILES.items():
        (folder / name).write_text(json.dumps(values))
    (folder / "conditions.jsonl").write_text(
        json.dumps(LOOK | {"step": 200}) + "\n" + json.dumps(LOOK | {"final": True}) + "\n"
    )
    names = ("train/kl", "train/task", "train/bound", "router/keep_soft", "router/target", "router/multiplier")
    lines = [f"{step},{name},{0.2 + step / 1000}" for step in range(0, 400, 2) for name in names]
    (folder / "metrics.csv").write_text(
        "\n".join(["step,name,value", *lines, "200,val/kl,0.07", "399,val/kl,0.0523\n"])
    )
    return folder


@pytest.fixture
def run(tmp_path) -> Path:
    return make_run(tmp_path)


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """The run folder after its report was written; tests only read it."""
    folder = make_run(tmp_path_factory.mktemp("written"))
    assert report.write(folder) == folder / "report.md"
    return folder


@pytest.fixture
def told(monkeypatch) -> Callable[[Path], str]:
    """Write a report without its pictures, which take long, and return its text."""
    for builder in ("keep_heat_map", "training_plot", "conditions_plot"):
        monkeypatch.setattr(report, builder, lambda data, path, **named: Figure())
    return lambda run: report.write(run).read_text(encoding="utf-8")


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_links_pictures_that_exist(written):
    text = (written / "report.md").read_text(encoding="utf-8")
    links = re.findall(r"!\[[^]]+\]\(([^)]+)\)", text)

    assert links == ["plots/keep_by_layer.png", "plots/training.png", "plots/conditions.png"]
    for link in links:
        assert (written / link).read_bytes().startswith(b"\x89PNG")
        assert (written / link).stat().st_size > 10_000
    assert "Not measured" not in text
    assert "nan" not in text.lower().split()


def test_every_table_and_picture_names_its_file(written):
    blocks = (written / "report.md").read_text(encoding="utf-8").split("\n\n")
    for index, block in enumerate(blocks):
        if block.startswith(("| ", "!")):
            after = next(text for text in blocks[index + 1 :] if text.startswith(("Source: ", "| ", "!")))
            assert after.startswith("Source: "), block
            files = re.findall(r"`([^`]+)`", after)
            assert files
            assert all((written / name).is_file() for name in files)


@pytest.mark.parametrize(
    "said",
    [
        "# Run report: digits",
        "| tokens that may leave a layer | vision |",
        "| target keep rate | 0.6 |",
        "| seed | 3 |",
        "| packages | torch 2.13.0 |",
        "| accuracy | 0.934 |",
        "| sum | 211 | 95.7 % | 93.1 % | 81.2 % | 0.613 | 38.7 % | 1.37 → 0.91 (1.51×) | 0.4 → 0.32 (1.25×) |",
        "| a\\|b | 211 | 95.7 % | 77.7 % |",
        "| **mean** |  | 95.7 % | 85.4 % |",
        "| prompt | &lt;image> digit ? |",
        "`##.#..`",
        "layer 5 runs least (0.05) and layer 0 most (1)",
        "| `train/kl` | 398 | 0.598 |",
        "| `val/kl` | 399 | 0.0523 |",
        "group `vision`? One skip may cost 0.05 nats per predicted token; n = 128 inputs.",
        "| 0 | inadmissible | 0.0213 [0.005, 0.045] / 0.05 ✓ | 0.0071 [0.005, 0.045] / 0.05 ✓ |",
        "81.2 % of the router's 617 skips are on admissible layers; of all skips that admissible layers allow, it",
        "| mean joint KL (nats) | 0.0314 |",
        "| mean κ·B (nats) | 0.1271 |",
        "at least 90.0 % asked for | 90.6 % |",
        "| p-value of that coverage (beta-binomial) | 0.4311 |",
        "129 (64 + 65)",
        "Nothing speaks against the coverage",
        "cosine (0.93), rho (0.81), s (0.95) predict; mass (-0.12) does not predict the order of the layers'",
        "| 200 | 5 | 1 | 0 | 81.2 % | 0.0314 | 0.1271 | 90.6 % |",
        "| 400 (end) | 5 | 1 | 0 |",
    ],
)
def test_says_what_the_files_say(written, said):
    assert said in (written / "report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        ("recipe.resolved.yaml", "keep: 0.6", "keep: 0.47", "| target keep rate | 0.47 |"),
        ("summary.json", "0.0523", "0.0987", "| KL to the dense model (nats) | 0.0987 |"),
        ("keep_rates.json", "0.1]", "0.9]", "layer 4 runs least (0.25)"),
        ("metrics.csv", "399,val/kl,0.0523", "399,val/kl,0.0711", "| `val/kl` | 399 | 0.0711 |"),
        ("evaluation.json", "0.777", "0.666", "66.6 %"),
        ("evaluation.json", '"static_accuracy": 0.812', '"static_accuracy": 0.823', "82.3 %"),
        ("evaluation.json", '"static_kl": 0.0417', '"static_kl": 0.0428', "0.0428"),
        ("evaluation.json", '"token_agreement": 0.911', '"token_agreement": 0.922', "0.922"),
        ("evaluation.json", '"routed_perplexity": 3.21', '"routed_perplexity": 3.32', "3.32"),
        ("evaluation.json", '"routed_edit_distance": 0.0291', '"routed_edit_distance": 0.0307', "| 0.0187 | 0.0307 |"),
        ("evaluation.json", '"routed_hallucinated": null', '"routed_hallucinated": 0.0345', "| routed hallucinated |"),
        ("conditions.jsonl", "0.0213", "0.0345", "0.0345 [0.005, 0.045] / 0.05"),
        ("conditions.jsonl", '"coverage_p": 0.4311', '"coverage_p": 0.0123', "does not hold here (p < 0.05)"),
        ("conditions.jsonl", '"kappa": 0.3937', '"kappa": null', "could not be tested: too few inputs"),
        ("conditions.jsonl", '"mass": -0.12', '"mass": 0.88', "s (0.95), mass (0.88) predict the order"),
        ("conditions.jsonl", '"s": 0.95', '"s": NaN', "| s | n/a |"),
        ("conditions.jsonl", '"high": 0.045', '"high": null', "0.0213 [0.005, open] / 0.05"),
        ("conditions.jsonl", '"recall": 0.6414', '"recall": null', "on admissible layers; no layer is admissible."),
        ("conditions.jsonl", '"skips": 617', '"skips": 0', "The router skipped nothing; "),
        ("conditions.jsonl", json.dumps(JOINT), "null", "`conditions.jsonl` holds no `joint`."),
        ("metrics.csv", "0,train/kl,0.2", "0,train/kl,nan", "1 of 200 values not finite, first at step 0."),
    ],
)
def test_a_changed_number_changes_the_report(run, told, file, old, new, said):
    assert said not in told(run)
    if file == "metrics.csv":
        new, old = f"\n{new}\n", f"\n{old}\n"
    change(run / file, old, new)
    assert said in told(run)


def test_a_changed_number_changes_the_picture(run, written):
    before = {path.name: path.read_bytes() for path in (written / "plots").iterdir()}
    change(run / "keep_rates.json", "0.1]", "0.9]")
    change(run / "metrics.csv", "val/kl,0.07\n", "val/kl,0.9\n")
    change(run / "conditions.jsonl", "0.0213", "0.0345")
    report.write(run)
    assert len(before) == 3
    assert all((run / "plots" / name).read_bytes() != old for name, old in before.items())


@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize(
    ("file", "picture"),
    [
        ("evaluation.json", None),
        ("keep_rates.json", "keep_by_layer.png"),
        ("conditions.jsonl", "conditions.png"),
    ],
)
def test_what_is_missing_or_empty_is_not_measured(run, told, file, picture, empty):
    if empty:
        (run / file).write_text("")
    else:
        (run / file).unlink()
    text = told(run)
    assert text.count("Not measured") == 1
    assert f"Not measured: `{file}` is missing or empty." in text
    assert picture is None or picture not in text


def test_metrics_alone_make_a_report(run, told):
    for path in run.iterdir():
        if path.name != "metrics.csv":
            path.unlink()
    (run / "metrics.csv").write_text("step,name,value\n")
    text = told(run)
    files = ("recipe.resolved.yaml", "evaluation.json", "keep_rates.json", "metrics.csv", "conditions.jsonl")
    assert [f"Not measured: `{file}`" in text for file in files] == [True] * 5
    assert "![" not in text


def test_a_resumed_run_reports_the_later_value(run, told):
    with (run / "metrics.csv").open("a") as lines:
        lines.write("399,val/kl,0.0444\n")
    assert "| `val/kl` | 399 | 0.0444 |" in told(run)


@pytest.mark.parametrize(
    ("file", "text", "says"),
    [
        ("metrics.csv", "step,metric,value\n", r"line 1: expected the header step,name,value, got 'step,metric,value'"),
        ("metrics.csv", "step,name,value\n1,a,0.5\n2,a,x\n", r"line 3: expected a step, a name and a number.*'2,a,x'"),
        ("metrics.csv", "step,name,value\n1,a\n", r"line 2: expected a step, a name and a number"),
        ("conditions.jsonl", json.dumps(LOOK) + '\n{"step": 4', r"line 2: expected one JSON object.*delete that line"),
        ("conditions.jsonl", "\n[1]\n", r"line 2: expected an object with `step` and `findings`, got \[1\]"),
        (
            "conditions.jsonl",
            '{"step": 1, "findings": [{"layer": 0}]}',
            r"line 1: `findings`: expected float `estimate`",
        ),
        ("summary.json", '{\n"val": }', r"line 2: expected valid JSON"),
        ("env.json", "[]", r"expected a mapping of keys, got \[\]"),
        ("recipe.resolved.yaml", "a: 1\nb: [\n", r"line 3: expected valid YAML"),
        ("keep_rates.json", '{"sum": [1, 0.5], "max": [1]}', r"'sum' has 2 layers but 'max' has 1"),
        ("keep_rates.json", '{"sum": 0.5}', r"'sum': expected one number per layer, got 0.5"),
        ("evaluation.json", '{"kinds": [3]}', r"`kinds`: expected a list of objects, got \[3\]"),
    ],
)
def test_a_damaged_file_is_named_with_its_line(run, file, text, says):
    (run / file).write_text(text)
    with pytest.raises(DataError, match=f"{re.escape(file)}.*{says}"):
        report.write(run)


def test_bytes_that_are_no_text_are_named(run):
    (run / "conditions.jsonl").write_bytes(json.dumps(LOOK).encode() + b"\n\xff")
    with pytest.raises(DataError, match=r"conditions\.jsonl, line 2: expected UTF-8 text, got byte 0xff"):
        report.write(run)


def test_no_metrics_or_no_folder_is_an_error(run, tmp_path):
    (run / "metrics.csv").unlink()
    with pytest.raises(DataError, match=r"metrics\.csv is missing; expected the folder of a training run"):
        report.write(run)
    with pytest.raises(DataError, match="nowhere is no folder; expected the folder that `adaskip train` made"):
        report.write(tmp_path / "nowhere")


def test_builders_return_figures_and_save_only_when_asked(tmp_path):
    figure = report.keep_heat_map({"sum": [0.25, 1.0]})
    assert isinstance(figure, Figure)
    assert [text.get_text() for text in figure.axes[0].texts] == ["0.25", "1.00"]
    assert isinstance(report.conditions_plot(LOOK, tmp_path / "a.png"), Figure)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_conditions_plot_draws_each_estimate_and_threshold():
    axes = report.conditions_plot(LOOK).axes
    assert [panel.get_title(loc="left").split(":")[0] for panel in axes] == list(ESTIMATES)
    for panel, estimate in zip(axes, ESTIMATES.values(), strict=True):
        assert panel.lines[0].get_xydata()[:, 1].tolist() == [estimate] * LAYERS
        drawn = [segment[:, 1].tolist() for lines in panel.collections for segment in lines.get_segments()]  # type: ignore[attr-defined]
        assert drawn == [[0.005, 0.045]] * LAYERS + [[0.05, 0.05]] * LAYERS


def test_builders_refuse_what_holds_nothing():
    with pytest.raises(DataError, match="the look holds no findings"):
        report.conditions_plot({"findings": []})
    for rates in ({}, {"sum": [1.0], "max": [1.0, 0.5]}):
        with pytest.raises(DataError, match="expected one rate per layer for every kind"):
            report.keep_heat_map(rates)


def test_needs_neither_torch_nor_pyplot():
    code = (
        "import sys, adaskip.report; sys.exit(any(m in sys.modules for m in ('torch', 'wandb', 'matplotlib.pyplot')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_the_plan_and_the_alarms_are_told():
    """Catches a report that shows the routers alone, and one that keeps a collapse to itself."""
    from adaskip.report.markdown import alarms, beside_static

    comparison = {"difference": -0.01, "low": None, "high": -0.005, "n": 60, "winner": "static"}
    found = {"skip": [4, 5], "keep": 0.58, "kl": 0.02, "accuracy": 0.9, "comparison": comparison, "router": "static"}
    found |= {"routers": {"keep": 0.6, "kl": 0.03, "accuracy": 0.8}, "sentence": "the routers do not beat it"}
    text = "\n".join(beside_static({"static": found}))
    assert "| static: without 4, 5 | 0.58 | 0.02 | 90.0 % |" in text
    assert "| routers | 0.6 | 0.03 | 80.0 % |" in text
    assert "The plan costs -0.01 nats a token more than the routers (95 %: n/a to -0.005, n = 60, paired)" in text
    assert "**the routers do not beat it.**" in text
    assert beside_static({}) == []
    look = {
        "step": 200,
        "findings": [],
        "routers": {"paths": 1, "logit_std": 0.0},
        "alarms": [{"sentence": "one path"}],
    }
    text = "\n".join(alarms([look, {"step": 400, "final": True, "routers": {"paths": 9, "logit_std": 2.0}}]))
    assert "| 200 | 1 | 0 | one path |" in text
    assert "| 400 (end) | 9 | 2 | none |" in text
    assert alarms([{"step": 200, "findings": []}]) == []
