"""The command line: what each verb calls and prints, exit statuses, error texts, and pure JSON."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from adaskip import __version__, cli
from adaskip.errors import DataError
from adaskip.recipe import load, recipes

ROOT = Path(__file__).parents[2]
FIVE = """\
backbone: {path: digits-vlm, dtype: floot32}
router: {group: visoin, hiden: 8}
data: {source: digits-vlm}
objective: {keep: 2}
trainer: {steps: 1.5, batch_size: 2, learning_rate: 1e-3, validate_every: 5, checkpoint_every: 5}
"""
TOLD = [
    "backbone.dtype: expected auto | float32 | bfloat16 | float16, got 'floot32'; did you mean 'float32'?",
    "router.group: expected all | vision, got 'visoin'; did you mean 'vision'?",
    "router.hiden: no such key, got 8; did you mean 'hidden'?",
    "trainer.steps: expected a valid integer, got 1.5",
    "objective.keep: expected a share in (0, 1], got 2.0",
]


@pytest.fixture
def adaskip(capfd):
    """Run the command line in this process; returns (exit status, standard output, standard error)."""

    def run(*words: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            cli.main([str(word) for word in words])
        return int(stop.value.code or 0), *capfd.readouterr()

    return run


@pytest.fixture
def fake(monkeypatch):
    """Put a module with the given functions in the place of a heavy one; each call's arguments are noted."""

    def put(module: str, **results: object) -> list[tuple]:
        calls: list[tuple] = []
        stand_in = ModuleType(module)
        for name, result in results.items():

            def function(*args, _name=name, _result=result, **kwargs):
                calls.append((_name, args, kwargs))
                print("library noise")
                os.system("echo child noise")
                if isinstance(_result, Exception):
                    raise _result
                return _result

            setattr(stand_in, name, function)
        monkeypatch.setitem(sys.modules, module, stand_in)
        return calls

    return put


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a-run").mkdir()
    return tmp_path / "a-run"


def parsed(out: str) -> dict:
    """The one JSON object that standard output holds."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    assert out.count("\n") == 1
    return json.loads(out, parse_constant=refuse)


def test_help_is_instant_and_nothing_imports_torch():
    code = (
        "import sys, adaskip; assert 'torch' not in sys.modules\n"
        "from adaskip import cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit as stop: assert not stop.code\n"
        "assert not {'torch', 'transformers', 'lightning', 'pydantic'} & set(sys.modules)"
    )
    seconds = []
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert all(verb in done.stdout for verb in ("ls", "cp", "validate", "train", "eval", "check", "generate", "export"))
    assert min(seconds) < 1  # processor time: what else the machine does must not fail the test


def test_version_and_usage(adaskip):
    assert adaskip("--version") == (0, f"adaskip {__version__}\n", "")
    assert adaskip()[0] == 2
    status, out, err = adaskip("tran", "digits-vlm")
    assert (status, out) == (2, "")
    assert "No such command 'tran'" in err
    status, out, err = adaskip("check", "--json")
    assert status == 2
    assert "Missing argument" in parsed(out)["error"]
    assert "RUN" in err


def test_five_faults_at_once_without_a_traceback(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(FIVE)
    command = [sys.executable, "-m", "adaskip.cli", "train", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    head, *lines = done.stderr.splitlines()
    assert head == f"adaskip: recipe {path}: 5 faults"
    assert sorted(line.strip() for line in lines) == sorted(TOLD)


def test_validate(adaskip, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(FIVE)
    status, out, _ = adaskip("validate", path, "--json")
    found = parsed(out)
    assert (status, found["ok"], sorted(found["faults"])) == (2, False, sorted(TOLD))
    status, out, _ = adaskip("validate", "digits-vlm", "objective.keep=0.25", "--json")
    found = parsed(out)
    assert (status, found["ok"], found["faults"]) == (0, True, [])
    assert found["recipe"]["objective"]["keep"] == 0.25
    assert found["sources"]["objective.keep"] == "override"
    assert found["estimate"]["gpu_gb"] == 16
    status, out, _ = adaskip("validate", "digits-vlm", "objective.keep=0.25")
    assert status == 0
    lines = [line.split() for line in out.splitlines()]
    assert ["objective.keep", "0.25", "override"] in lines
    assert ["backbone.path", "digits-vlm", "digits-vlm.yaml:6"] in lines
    assert ["objective.alpha", "0.1", "default"] in lines
    assert out.endswith("no faults\n")


def test_the_schema_of_recipes(adaskip):
    """Every key of a resolved recipe stands in it and no other may; catches a section that is left open."""
    status, out, _ = adaskip("validate", "--schema")
    schema = json.loads(out)
    assert (status, schema["$schema"]) == (0, "https://json-schema.org/draft/2020-12/schema")
    assert schema["required"] == ["backbone", "data", "trainer"]

    def walk(values: dict[str, object], part: dict[str, object]) -> None:
        part = next((each for each in part.get("anyOf", ()) if "$ref" in each), part)
        part = schema["$defs"][part["$ref"].rpartition("/")[2]] if "$ref" in part else part
        assert part["additionalProperties"] is False
        assert part["properties"].keys() == values.keys()
        for name, value in values.items():
            if isinstance(value, dict):
                walk(value, part["properties"][name])

    walk(load("llama3-lora").model_dump(), schema)
    status, _, err = adaskip("validate")
    assert status == 2
    assert "expected a recipe, or --schema" in err


def test_unknown_recipe(adaskip):
    status, out, err = adaskip("validate", "digit-vlm")
    assert (status, out) == (2, "")
    assert "did you mean 'digits-vlm'?" in err
    assert "adaskip ls" in err
    status, out, _ = adaskip("validate", "digit-vlm", "--json")
    assert status == 2
    assert parsed(out)["faults"][0].startswith("recipe 'digit-vlm': no such file")


def test_ls(adaskip):
    status, out, _ = adaskip("ls", "--json")
    rows = parsed(out)["recipes"]
    assert status == 0
    assert [row["name"] for row in rows] == list(recipes())
    row = next(row for row in rows if row["name"] == "digits-vlm-vision")
    assert row | {"sentence": ""} == {
        "name": "digits-vlm-vision",
        "backbone": "digits-vlm",
        "group": "vision",
        "sentence": "",
    }
    status, out, _ = adaskip("ls")
    assert status == 0
    assert all(name in out for name in recipes())


def test_cp_copies_and_never_overwrites_unasked(adaskip, tmp_path):
    status, out, _ = adaskip("cp", "digits-vlm", tmp_path, "--json")
    target = tmp_path / "digits-vlm.yaml"
    assert (status, parsed(out)) == (0, {"file": str(target)})
    assert load(target) == load("digits-vlm")
    target.write_text("mine")
    status, _, err = adaskip("cp", "digits-vlm", target)
    assert (status, target.read_text()) == (2, "mine")
    assert f"{target} exists; overwrite it with --force" in err
    status, out, _ = adaskip("cp", "digits-vlm", target, "--force")
    assert status == 0
    assert f"next: adaskip train {target}" in out
    assert load(target).name == "digits-vlm"
    status, _, err = adaskip("cp", "digits-vlm", tmp_path / "no" / "where.yaml")
    assert status == 2
    assert "No such file or directory" in err


def test_data_exits_1_where_too_much_is_bad(adaskip, fake):
    """Counts, faults and the first example for people; the exit status that a script needs before it trains."""
    lengths = {"median": 3, "p95": 9, "most": 12}
    row = {"split": "train", "records": 40, "pictured": 20, "kinds": {"k0": 40}, "digest": "0" * 32}
    found = {
        "ok": False,
        "splits": [row | {"prompt_tokens": lengths, "answer_tokens": lengths}],
        "padding": {"batch_size": 8, "as_they_come": 0.25, "by_length": 0.05},
        "pictures": {"count": 20, "width": lengths, "height": lengths},
        "bad": 1,
        "bad_limit": 0,
        "faults": ["my.jsonl, line 7: answer is empty; expected text"],
        "first": {"where": "my.jsonl, line 1", "parts": [{"part": "scored", "tokens": 2, "text": "w1 </s>"}]},
    }
    calls = fake("adaskip.verbs.data", data=found)
    status, out, _ = adaskip("data", "causal-lm", "data.source=my.jsonl")
    assert status == 1
    assert calls[0][1][0].data.source == "my.jsonl"
    for shown in (
        "1 bad records (data.bad_limit=0)",
        "line 7: answer is empty",
        "scored      2 tokens | w1 </s>",
        "padding of training batches of 8: 25.0% of their tokens; 5.0% with data.group_by_length=true",
        "k0",
    ):
        assert shown in out, shown
    assert parsed(adaskip("data", "causal-lm", "--json")[1])["bad"] == 1


def test_train(adaskip, fake):
    calls = fake("adaskip.verbs.train", train={"folder": "runs/x", "val": {"keep": 0.6123456, "kl": float("nan")}})
    status, out, err = adaskip("train", "digits-vlm", "seed=3", "--resume", "--json")
    assert (status, parsed(out)) == (0, {"folder": "runs/x", "val": {"keep": 0.6123456, "kl": None}})
    assert sorted(err.split("\n")) == ["", "child noise", "library noise"]
    ((name, args, options),) = calls
    assert (name, args, options["resume"]) == ("train", (load("digits-vlm", ["seed=3"]),), True)
    status, out, _ = adaskip("train", "digits-vlm")
    assert status == 0
    assert "val.keep                     0.6123\n" in out
    assert "next: adaskip eval runs/x, adaskip check runs/x" in out
    assert calls[1][2]["resume"] is False


def test_eval(adaskip, fake, folder):
    row = {"kind": "sum", "dense_accuracy": 0.9, "routed_accuracy": 0.875, "keep": 0.6}
    mean = {name: value for name, value in row.items() if name != "kind"}
    calls = fake("adaskip.verbs.evaluate", evaluate={"kinds": [row], "mean": mean, "prefill": {"speedup": 1.5}})
    status, out, _ = adaskip("eval", folder, "--examples", 7, "--split", "validation", "--json")
    assert (status, parsed(out)["kinds"]) == (0, [row])
    ((name, args, options),) = calls
    assert (name, args, options["split"], options["per_kind"]) == ("evaluate", (folder,), "validation", 7)
    assert (options["max_new_tokens"], options["static"]) == (None, None)
    status, out, _ = adaskip("eval", folder)
    assert status == 0
    for word in ("routed", "accuracy", "0.875", "sum", "mean", "prefill.speedup", "1.5"):
        assert word in out


@pytest.mark.parametrize("static", [True, False])
def test_eval_shows_every_figure_whole(adaskip, fake, folder, static):
    """Would catch: a figure that no table shows, or one cut off at the screen's edge; columns without a plan."""
    from adaskip.verbs.evaluate import KindFigures

    names = [field.name for field in dataclasses.fields(KindFigures)]
    counts, shares = ("n", "cut"), ("accuracy", "agreement", "keep", "saved")
    row = {name: 0.0001234 + i * 1e-7 for i, name in enumerate(names)}
    row |= {name: 0.5 + i / 1000 for i, name in enumerate(names) if name.endswith(shares)}
    row |= {name: 0.01234 + i / 1000 for i, name in enumerate(names) if name.endswith("_s")}
    row |= {name: 100 + i for i, name in enumerate(names) if name.endswith(counts)}
    row |= {"kind": "arithmetic"} | ({} if static else {name: None for name in names if name.startswith("static_")})
    duel = {"skip": [4, 5], "source": "--static", "kl_difference": {}, "sentence": "routed - static: " + "far " * 30}
    fake("adaskip.verbs.evaluate", evaluate={"kinds": [row], "mean": row, "static": duel if static else None})
    status, out, _ = adaskip("eval", folder, *(["--static", "4,5"] if static else []))
    assert status == 0
    assert max(map(len, out.splitlines())) <= 100
    assert "…" not in out
    cells = out.split()
    for name, value in row.items():
        assert value is None or cells.count("arithmetic" if name == "kind" else f"{value:.4g}") >= 1, name
    assert ("static" in out) is static
    assert ("the static plan leaves out layers 4, 5 (--static)" in out) is static


def test_compare_shows_rows_agreement_and_what_was_left_out(adaskip, fake, monkeypatch):
    """Would catch: an option that does not arrive, a column that is cut off, budgets that are no numbers."""
    monkeypatch.delenv("COLUMNS", raising=False)
    names = ("budget", "policy", "seeds", "keep", "accuracy", "recovery", "kl", "token_agreement", "prefill_ratio")
    row = dict.fromkeys((*names, "generate_ratio"), 0.1234) | {"policy": "relative_change", "front": True}
    written = ("exact", "edit_distance", "hallucinated", "same", "dense_exact", "dense_edit_distance")
    row |= {"generated": {"n": 24} | dict.fromkeys((*written, "dense_hallucinated"), 0.4321)}
    held = {"policy": "relative_change", "budget": 0.7, "seed": 0, "jaccard": 0.25, "spearman": 0.5, "inside": 0.0625}
    held |= {"outside": 0.125, "difference": {"low": 0.01}, "p": 0.004}
    found = {
        "rows": [row, row | {"generated": {}}],
        "agreement": [held],
        "admitted": [4, 9],
        "oracle": [{"sentence": "oracle, group all"}],
    }
    found |= {"left_out": ["method attention_mass: no"], "picture": "p.png"}
    calls = fake("adaskip.verbs.compare", compare=found, read_budgets=(0.7, 0.5))
    status, out, _ = adaskip("compare", "m", "--policies", "greedy, skip_it", "--run", "a", "--run", "b", "--oracle", 4,
                               "--train", "digits-vlm", "--set", "seed=1", "--generate", 24)  # fmt: skip
    assert status == 0
    assert calls[0][1] == ("0.9,0.8,0.7,0.6,0.5",)
    options = calls[1][2]
    assert (options["policies"], options["budgets"], options["oracle"]) == (["greedy", "skip_it"], (0.7, 0.5), 4)
    assert (options["runs"], options["train"], options["overrides"]) == (["a", "b"], ["digits-vlm"], ["seed=1"])
    assert options["generate"] == 24
    assert max(map(len, out.splitlines())) <= 100
    for said in ("relative_change", "layers 4, 9:", "0.0625", "oracle, group all", "left out: method attention_mass"):
        assert said in out
    assert out.count("0.1234") == 2 * 9 + 1  # the budget of the answers, which one row has
    assert out.count("0.4321") == 7


def test_profile_says_what_ranks_where_sinks_are_and_what_is_to_gain(adaskip, fake, tmp_path, monkeypatch):
    """Would catch: an option that does not arrive, a table that is cut off, or a sentence that is not said."""
    monkeypatch.delenv("COLUMNS", raising=False)  # a width that somebody set is heeded, by processes of a test run too
    groups = {"all": {"ranks": "ranks layers: cosine .73", "sinks": "sinks after layers 12 to 29"}}
    found = {"groups": groups, "chain_violations": 0, "picture": "p.png", "oracle": {"sentence": "oracle, group all"}}
    calls = fake("adaskip.verbs.profile", profile_model=found, summary=[[{"": "undecided", "claim": "x" * 80}], []])
    status, out, _ = adaskip("profile", "m", "--data", "d", "--oracle", 4, "--keep", "0.8")
    assert status == 0
    options = calls[0][2]
    assert (options["oracle"], options["keep"], options["batch_size"]) == (4, 0.8, 32)
    for said in ("group all: ranks layers: cosine .73", "group all: sinks after layers 12", "oracle, group all"):
        assert said in out
    assert "x" * 80 in out
    fake("adaskip.verbs.profile", profile_model=found | {"oracle": None}, summary=[])
    assert adaskip("profile", "m", "--data", "d", "--oracle", 0)[0] == 0


@pytest.mark.parametrize(
    ("verdict", "status", "text"),
    [
        ("hold", 0, "the conditions hold\n"),
        ("do not hold", 1, "the conditions DO NOT hold\n"),
        ("undecided", 1, "these inputs do not show that the conditions hold\n"),
    ],
)
def test_check_exits_0_only_when_the_conditions_hold(adaskip, fake, folder, verdict, status, text):
    row = {"layer": 3, "group": "all", "notion": "cost", "low": None, "verdict": "undecided"}
    ok = verdict == "hold"
    found = {"ok": ok, "verdict": verdict, "reasons": ["because"], "rows": [row], "summary": {"coverage": 0.93}}
    fake("adaskip.verbs.check", check=found)
    code, out, _ = adaskip("check", folder)
    assert code == status
    assert text in out
    assert "  because\n" in out
    code, out, _ = adaskip("check", folder, "--json")
    assert (code, parsed(out)["ok"], parsed(out)["rows"]) == (status, ok, [row])


@pytest.mark.parametrize(("threshold", "status"), [(-0.5, 0), (None, 1)])
def test_calibrate_exits_1_when_no_threshold_is_certified(adaskip, fake, folder, threshold, status):
    step = {"threshold": -0.5, "loss": 0.01, "p_value": 0.03, "keep": 0.6}
    found = {"ok": threshold is not None, "threshold": threshold, "steps": [step]}
    calls = fake("adaskip.verbs.calibrate", calibrate=found)
    code, out, _ = adaskip("calibrate", folder, "--risk", 0.05, "--delta", 0.2, "--json")
    assert (code, parsed(out)) == (status, found)
    ((_, args, _),) = calls
    assert args[:4] == (folder, 0.05, 0.2, None)
    code, out, _ = adaskip("calibrate", folder)
    assert code == status
    assert ("with probability 0.9" in out) is (threshold is not None)
    assert ("now runs every layer" in out) is (threshold is None)


def test_generate(adaskip, fake, folder, tmp_path):
    found = {"prompt": "[/b] ?", "answer": "7", "dense_answer": "7", "expected": None, "keep": 0.5}
    calls = fake("adaskip.verbs.generate", answer={**found, "route": [True, False, False, True], "layers": 4})
    status, out, _ = adaskip("generate", folder, "--example", 4)
    assert status == 0
    assert "[/b] ?" in out
    assert "#..#   2 of 4 layers ran" in out
    picture = tmp_path / "a.png"
    picture.touch()
    status, out, _ = adaskip("generate", folder, "--image", picture, "--prompt", "x", "--max-new-tokens", 2, "--json")
    assert (status, parsed(out)["answer"]) == (0, "7")
    asked = [{name: value for name, value in options.items() if name != "stages"} for _, _, options in calls]
    assert asked == [
        {"image": None, "prompt": None, "example": 4, "max_new_tokens": None, "lossless": False},
        {"image": picture, "prompt": "x", "example": None, "max_new_tokens": 2, "lossless": False},
    ]


def test_a_lossless_answer_tells_what_its_drafts_were_worth(adaskip, fake, folder, tmp_path):
    """The path of the drafts is the route that is drawn; many prompts are refused, since each has a path of its own."""
    drafts = {"path": [True, False], "acceptance": 0.75, "answer_s": 1.5}
    told = {"prompt": "x", "answer": "7", "keep": 1.0, "route": [True, False], "layers": 2, "lossless": drafts}
    calls = fake("adaskip.verbs.generate", answer=told)
    status, out, _ = adaskip("generate", folder, "--example", 4, "--lossless")
    assert status == 0
    assert "lossless.acceptance          0.75" in out
    assert "lossless.path" not in out
    assert "#.   1 of 2 layers ran" in out
    assert calls[0][2]["lossless"] is True
    (tmp_path / "many.jsonl").write_text("{}")
    status, _, err = adaskip("generate", folder, "--many", tmp_path / "many.jsonl", "--lossless")
    assert status == 2
    assert "--lossless answers one prompt; leave it or --many FILE out" in err


@pytest.mark.parametrize("words", [[], ["--prompt", "x", "--example", "1"], ["--image", __file__, "--example", "1"]])
def test_generate_needs_one_question(adaskip, folder, words):
    status, out, err = adaskip("generate", folder, *words)
    assert (status, out) == (2, "")
    assert "expected --prompt TEXT (with --image PATH for a picture), --example N or --many FILE, one of them" in err


def test_export(adaskip, fake, folder, tmp_path):
    calls = fake("adaskip.verbs.export", export={"folder": "out", "files": ["a", "b"]})
    status, out, _ = adaskip("export", folder, tmp_path / "out", "--json")
    assert (status, parsed(out)["files"]) == (0, ["a", "b"])
    ((_, given, named),) = calls
    assert (given, named["cut"]) == ((folder, tmp_path / "out"), False)
    adaskip("export", folder, tmp_path / "out", "--cut")
    assert calls[1][2]["cut"] is True


@pytest.mark.parametrize("verb", [["eval"], ["check"], ["calibrate"], ["generate", "--prompt", "x"], ["export", "out"]])
def test_a_missing_run_is_named_with_what_to_type(adaskip, folder, verb):
    name, *rest = verb
    missing = folder.parent / "a-rum"
    status, out, err = adaskip(name, missing, *rest)
    assert (status, out) == (2, "")
    assert err == (
        f"adaskip: {missing}: no such run folder; did you mean 'a-run'? "
        f"Train one with: adaskip train digits-vlm output={missing}\n"
    )


def test_errors_of_the_work_itself(adaskip, fake, folder):
    fake("adaskip.verbs.check", check=DataError("no test split\n  line 3: empty"))
    status, out, err = adaskip("check", folder, "--json")
    assert status == 2
    assert parsed(out) == {"ok": False, "error": "no test split", "faults": ["line 3: empty"]}
    status, _, err = adaskip("check", folder)
    assert status == 2
    assert err == "adaskip: no test split\n  line 3: empty\n"


def test_a_bug_is_not_hidden(fake, folder):
    fake("adaskip.verbs.check", check=ZeroDivisionError("bug"))
    with pytest.raises(ZeroDivisionError):
        cli.main(["check", str(folder)])
