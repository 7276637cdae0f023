"""Recipes: what is shipped loads, every fault is told at once, overrides apply, and a dump reads back equal."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from adaskip.backbone.published import published
from adaskip.errors import ConfigError, DataError
from adaskip.methods.names import METHODS
from adaskip.policies.learned.config import RouterConfig
from adaskip.recipe import Recipe, dump, find, load, origins, recipes, sentence
from adaskip.runtime.lora import Lora
from adaskip.sections import faults
from adaskip.training.data import load_records
from adaskip.training.objective import Objective

ROOT = Path(__file__).parents[2]
MINIMAL = """\
backbone: {path: digits-vlm}
data: {source: digits-vlm}
trainer: {steps: 5, batch_size: 2, learning_rate: 1e-3, validate_every: 5, checkpoint_every: 5}
"""


@pytest.fixture
def write(tmp_path: Path):
    """Write a recipe file; the minimal one unless told otherwise."""

    def write(text: str = MINIMAL, name: str = "mine.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write


def told(path, overrides=()) -> list[str]:
    """The faults that `load` lists."""
    with pytest.raises(ConfigError) as error:
        load(path, overrides)
    head, *lines = str(error.value).splitlines()
    assert head == f"recipe {path}: {len(lines)} fault{'s' * (len(lines) != 1)}"
    return [line.strip() for line in lines]


@pytest.mark.parametrize("name", recipes())
def test_every_shipped_recipe_loads_and_says_what_it_is_and_how_to_launch_it(name):
    recipe, path = load(name), recipes()[name]
    first, second = path.read_text().splitlines()[:2]
    assert recipe.name == path.stem == name
    assert recipe.output == f"runs/{name}"
    assert sentence(path) == first.removeprefix("# ")
    assert sentence(path).endswith(".")
    assert second.startswith(f"#   adaskip train {name}")


MODELS = ["gemma3", "gemma3-vl", "internvl3", "llama3", "llava-1.5", "llava-onevision", "mistral", "mistral3", "olmoe",
          "qwen3", "qwen3-vl", "smolvlm"]  # fmt: skip
VARIANTS = ["llama3-lora", "llava-1.5-vision", "qwen2.5-vl-ddp", "qwen3-from-bounds", "qwen3-tokens"]
CHOICES = [name.replace("_", "-") for name in METHODS if name != "none"]
POLICIES = ["d-llm", "flips", "path-bank", "router-tuning", "token-plan", *CHOICES]


def test_the_shipped_recipes():
    digits = ["digits-vlm", "digits-vlm-from-bounds", "digits-vlm-vision"]
    others = ["causal-lm", *digits, "qwen2.5-vl", "smollm2", "smollm2-bank", "smollm2-routers"]
    assert list(recipes()) == [*sorted(others), *sorted([*MODELS, *VARIANTS, *POLICIES])]
    groups = {name: load(name).router.group for name in recipes()}
    vision = {"digits-vlm-vision", "qwen2.5-vl", "llava-1.5-vision", "qwen2.5-vl-ddp"}
    chosen = {"attention-mass", "early-exit", "fastv", "late-entry", "pyramid-drop", "shortv", "skip-vision"}
    assert {name for name, group in groups.items() if group == "vision"} == vision | chosen
    assert load("qwen2.5-vl").backbone.dtype == "bfloat16"
    assert [load(name).method for name in recipes()].count("from-bounds") == 2
    assert [load(name).method for name in ("smollm2", "smollm2-bank")] == ["token-plan", "path-bank"]


def test_the_recipes_of_models_and_their_variants():
    """Each in its folder, of a model whose sizes are published, each variant with what it is a variant for.

    Catches a recipe that is put elsewhere, and one whose backbone could be neither rehearsed nor estimated offline.
    """
    assert all(find(name).parent.name == "models" for name in MODELS)
    assert all(find(name).parent.name == "variants" for name in VARIANTS)
    for name in [*MODELS, *VARIANTS]:
        assert load(name).backbone.path in published()
        assert (load(name).backbone.dtype, load(name).data.source) == ("bfloat16", "my.jsonl")
    assert load("llama3-lora").lora == Lora(targets=("q_proj", "v_proj"))
    assert load("qwen3-from-bounds").method == "from-bounds"
    assert load("qwen3-tokens").router.scope == "token"
    assert (load("qwen2.5-vl-ddp").trainer.devices, load("qwen2.5-vl-ddp").trainer.strategy) == (4, "ddp")


def test_no_recipe_is_ignored_by_git():
    """A folder's name may stand in .gitignore; catches recipes that lie in one checkout and in no other."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout: an unpacked archive holds what was tracked")
    asked = subprocess.run(
        ["git", "check-ignore", "--no-index", *map(str, recipes().values())], cwd=ROOT, capture_output=True, text=True
    )
    assert (asked.returncode, asked.stdout) == (1, "")


def test_the_recipes_of_policies():
    """They lie in a folder of their own, and each shows another way; catches a folder that nothing looks into."""
    assert all(find(name).parent.name == "policies" for name in POLICIES)
    assert {load(name).backbone.path for name in POLICIES} == {"digits-vlm"}
    tuned, tokens = load("router-tuning").router, load("d-llm").router
    assert (tuned.scope, tuned.unit, tuned.hidden) == ("prompt", "attention", 0)
    assert (tokens.scope, tokens.unit, tokens.kv) == ("token", "block", "absent")
    assert load("flips").objective.gradient == "flips"
    assert [load(name).method for name in ("path-bank", "token-plan")] == ["path-bank", "token-plan"]


def test_a_recipe_is_read_without_transformers():
    """Names of methods are light; catches faults of a recipe that are told after seconds, behind warnings of others."""
    read = "import sys; from adaskip.recipe import load, recipes; [load(name) for name in recipes()]"
    subprocess.run([sys.executable, "-c", f"{read}; assert 'transformers' not in sys.modules"], check=True)


def test_sections_are_the_dataclasses_that_components_take(write):
    recipe = load(write())
    assert (recipe.router, recipe.objective) == (RouterConfig(), Objective())
    assert recipe.trainer.learning_rate == 1e-3
    assert (recipe.name, recipe.output, recipe.seed) == ("mine", "runs/mine", 0)
    with pytest.raises(ValidationError, match="frozen"):
        recipe.seed = 3


def test_five_faults_of_five_kinds_at_once(write):
    text = MINIMAL.replace("steps: 5", "steps: 1.5") + "router: {group: visoin, hiden: 8}\nobjective: {keep: 2}\n"
    assert told(write(text), ["tracking.wandb=ofline"]) == [
        "router.group: expected all | vision, got 'visoin'; did you mean 'vision'?",
        "router.hiden: no such key, got 8; did you mean 'hidden'?",
        "objective.keep: expected a share in (0, 1], got 2.0",
        "tracking.wandb: expected offline | online | disabled, got 'ofline'; did you mean 'offline'?",
        "trainer.steps: expected a valid integer, got 1.5",
    ]


def test_a_wrong_type_does_not_hide_a_wrong_range_of_the_same_section(write):
    assert told(write(), ["router.group=3", "router.hidden=-1", "objective.bound=x", "objective.alpha=1"]) == [
        "router.group: expected all | vision, got 3",
        "objective.bound: expected two-point | quadratic, got 'x'",
        "router.hidden: expected an integer >= 0, got -1",
        "objective.alpha: expected a share in (0, 1), got 1.0",
    ]


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ("keep=0.5", "keep: no such key, got 0.5; did you mean 'objective.keep'?"),
        ("trainer.step=9", "trainer.step: no such key, got 9; did you mean 'steps'?"),
        (
            "data.columns.zzz=q",
            "data.columns.zzz: no such key, got 'q'; valid: answer, image, kind, messages, present, prompt",
        ),
        ("nosuch.key=1", "nosuch: no such key, got {'key': 1}; valid: backbone, bank, choice, conditions, data,"),
        ("seed", "override 'seed': expected key.path=value, for example objective.keep=0.5"),
        (".seed=1", "override '.seed=1': expected key.path=value"),
        ("seed=[", "override 'seed=[': expected a YAML value, got '['"),
        ("trainer.steps.x=1", "override 'trainer.steps.x=1': trainer.steps is 5, which has no key 'x'"),
        ("trainer.batch_size=true", "trainer.batch_size: expected a valid integer, got True"),
        ("trainer.batch_size=0", "trainer.batch_size: expected greater than or equal to 1, got 0"),
        ("trainer.learning_rate=fast", "trainer.learning_rate: expected a valid number, got 'fast'"),
        ("trainer.learning_rate=.nan", "trainer.learning_rate: expected "),
        ("trainer.devices={a: 1}", "trainer.devices: expected a valid integer | a valid string | a valid list, got {"),
        ("tracking.tags=[a, 1]", "tracking.tags.1: expected a valid string, got 1"),
        (
            "conditions=",
            "conditions: expected a mapping of keys (every, examples, tolerance, points, on_violation, level, ",
        ),
        ("backbone.path=''", "backbone.path: expected at least 1 character, got ''"),
        (
            "trainer.steps=0",
            "trainer.steps: expected an integer >= 1 (method end-to-end alone needs them), got 0",
        ),
        (
            "method=from-bound",
            f"method: expected end-to-end | from-bounds | path-bank | token-plan | {' | '.join(METHODS)}, got "
            "'from-bound'; "
            "did you mean 'from-bounds'?",
        ),
        ("fit.rounds=0", "fit.rounds: expected an integer >= 1, got 0"),
        ("fit.round=2", "fit.round: no such key, got 2; did you mean 'rounds'?"),
        ("conditions.level=1", "conditions.level: expected less than 1, got 1"),
        ("seed=5000000000", "seed: expected less than 4294967296, got 5000000000"),
    ],
)
def test_each_fault_names_path_expectation_and_arrival(write, override, fault):
    (line,) = told(write(), [override])
    assert line.startswith(fault)


def test_missing_keys_are_all_named(write):
    assert told(write("seed: 1\n")) == [
        "backbone.path: required key is missing; expected a string",
        "data.source: required key is missing; expected a string",
        "trainer.steps: required key is missing; expected an integer",
        "trainer.batch_size: required key is missing; expected an integer",
        "trainer.learning_rate: required key is missing; expected a number",
        "trainer.validate_every: required key is missing; expected an integer",
        "trainer.checkpoint_every: required key is missing; expected an integer",
    ]
    assert faults(Recipe, {})[0] == "backbone: required key is missing; expected a section"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("seed: 1\ntrainer: [1\n", "line 3: expected valid YAML, got: expected ',' or ']'"),
        ("a: b: c\n", "line 1: expected valid YAML, got: mapping values are not allowed here"),
        ("day: 2024-13-45\n", "expected valid YAML, got: month must be in 1..12"),
        ("", "expected a mapping of sections (backbone, data, trainer ...), got None"),
        ("- 1\n", "expected a mapping of sections (backbone, data, trainer ...), got [1]"),
        (MINIMAL + "1: x\n", "1: no such key, got"),
        (MINIMAL + "seed: 1\nseed: 2\n", "line 5: key 'seed' appears twice; keep one"),
        (MINIMAL + "router:\n  hidden: 1\n  hidden: 2\n", "line 6: key 'hidden' appears twice; keep one"),
    ],
)
def test_broken_files(write, text, fault):
    (line,) = told(write(text))
    assert line.startswith(fault)


def test_bytes_that_are_no_text(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"\xff\xfe\xfa")
    assert told(path)[0].startswith("expected valid YAML, got: 'utf-8' codec can't decode")


def test_unknown_names(tmp_path):
    with pytest.raises(ConfigError, match=r"'digit-vlm': no such file.* did you mean 'digits-vlm'\?.* adaskip ls"):
        load("digit-vlm")
    with pytest.raises(ConfigError, match=r"valid: ada-skip, .* causal-lm, d-llm, digits-vlm, digits-vlm-from-bounds"):
        load(tmp_path / "zzz.yaml")
    with pytest.raises(ConfigError, match="is a folder; expected a YAML file"):
        find(tmp_path)


@pytest.mark.parametrize("action", ["hold", "stop"])
def test_conditions_cannot_act_where_nothing_is_trained_end_to_end(action):
    with pytest.raises(ConfigError, match=rf"on_violation: expected warn where trainer.steps is 0 .* got '{action}'"):
        load("digits-vlm-from-bounds", [f"conditions.on_violation={action}"])
    assert load("digits-vlm-from-bounds", ["trainer.steps=4", f"conditions.on_violation={action}"]).trainer.steps == 4


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("trainer.steps=7", lambda r: r.trainer.steps == 7),
        ("trainer.learning_rate=1e-5", lambda r: r.trainer.learning_rate == 1e-5),
        ("objective.keep=5e-1", lambda r: r.objective.keep == 0.5),
        ("router.group=vision", lambda r: r.router == RouterConfig(group="vision")),
        (
            "data.columns.image=picture",
            lambda r: (r.data.columns.image, r.data.columns.prompt) == ("picture", "prompt"),
        ),
        ("data.examples.test=", lambda r: r.data.examples.test is None),
        ("trainer.devices=[0, 1]", lambda r: r.trainer.devices == [0, 1]),
        ("trainer.devices=2", lambda r: r.trainer.devices == 2),
        ("tracking={tags: [a, b]}", lambda r: r.tracking.tags == ["a", "b"]),
        ("tracking.name=a=b", lambda r: r.tracking.name == "a=b"),
        ("name=other", lambda r: r.output == "runs/other"),
    ],
)
def test_overrides(write, override, read):
    recipe = load(write(), [override])
    assert read(recipe)
    assert recipe != load(find("digits-vlm"))


def test_the_last_of_two_overrides_counts(write):
    assert load(write(), ["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize("name", recipes())
def test_a_dump_reads_back_equal(write, name):
    recipe = load(name, ["tracking.tags=['yes', '1e-3', 'ä: b']", "trainer.learning_rate=1e-05", "tracking.name='12'"])
    again = load(write(dump(recipe), "another-name.yaml"))
    assert again == recipe
    assert again.name == name


def test_the_home_of_nobody_is_a_name_like_any_other(write):
    """Catches a traceback of ``~``."""
    assert load(write(), ["data.source=~nobody-of-this-name/x"]).data.source == "~nobody-of-this-name/x"
    with pytest.raises(DataError, match="~nobody-of-this-name/x"):
        load_records("~nobody-of-this-name/x", "train", None, 0)


def test_a_folder_is_sought_beside_the_recipe_then_in_the_working_directory(write, tmp_path, monkeypatch):
    here = tmp_path / "elsewhere"
    for folder in (tmp_path / "beside", here / "beside", here / "work", here / "digits-vlm"):
        folder.mkdir(parents=True)
    monkeypatch.chdir(here)
    path = write()

    def source(value: str) -> str:
        return load(path, [f"data.source={value}"]).data.source

    assert source("beside") == str(tmp_path / "beside")
    assert source("work") == str(here / "work")
    assert source("owner/dataset") == "owner/dataset"
    assert source("digits-vlm") == "digits-vlm"
    assert load(path, ["backbone.path=work"]).backbone.path == str(here / "work")


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=2),
    max_leaves=4,
)
PATHS = [
    *("seed", "name", "output", "backbone", "data.columns", "trainer.devices", "trainer.steps", "tracking.tags"),
    *("router", "router.group", "router.keep_bias", "objective", "objective.alpha", "data.examples", "1", "conditions"),
]


@given(st.dictionaries(st.sampled_from(PATHS), PLAIN, max_size=4))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_values_give_a_recipe_or_a_list_of_faults(values):
    """Never another exception: either no faults and a recipe that reads back equal, or one line for each fault."""
    raw = yaml.safe_load(MINIMAL)
    for path, value in values.items():
        *sections, last = path.split(".")
        section = raw
        for key in sections:
            section = section.setdefault(key, {}) if isinstance(section, dict) else {}
        if isinstance(section, dict):
            section[last] = value
    found = faults(Recipe, raw)
    if found:
        with pytest.raises(ValidationError):
            Recipe.model_validate(raw)
        assert all(": " in line for line in found)
    else:
        recipe = Recipe.model_validate(raw)
        assert Recipe.model_validate(yaml.safe_load(dump(recipe))) == recipe


def test_every_value_has_a_source(write):
    """By line of the file, in either way of writing sections; of a section that is overridden all of it.

    Catches a line that counts from 0, and a key that is told as the file's although an override changed it.
    """
    path = write(MINIMAL + "objective:\n  keep: 0.5\n")
    overrides = ["trainer.steps=7", "tracking={tags: [a]}"]
    recipe = load(path, overrides)
    told = origins(recipe, path, overrides)
    assert told["backbone.path"] == told["backbone.dtype"].replace("default", "mine.yaml:1") == "mine.yaml:1"
    assert (told["trainer.batch_size"], told["objective.keep"]) == ("mine.yaml:3", "mine.yaml:5")
    assert (told["trainer.steps"], told["tracking.tags"], told["tracking.wandb"]) == ("override",) * 3
    assert (told["objective.alpha"], told["name"], told["output"], told["lora"]) == ("default",) * 4
    assert origins(recipe, path, {"trainer": {"steps": 7}})["trainer.steps"] == "override"


@pytest.mark.parametrize(
    "overrides",
    [
        ["objective.keep=0.5", "trainer.steps=7"],
        {"objective.keep": 0.5, "trainer.steps": 7},
        {"objective": {"keep": 0.5}, "trainer": {"steps": 7}},
    ],
)
def test_from_python_a_recipe_and_its_overrides_may_be_values(overrides):
    """A notebook has numbers, not texts; what it does not name stays as it was."""
    before = load("digits-vlm")
    for recipe in (before, "digits-vlm", recipes()["digits-vlm"]):
        after = load(recipe, overrides)
        assert (after.objective.keep, after.trainer.steps, after.seed) == (0.5, 7, before.seed)
        assert after.objective.bound_weight == before.objective.bound_weight
    assert load(before) is before
    assert load("digits-vlm", "objective.keep=0.5").objective.keep == 0.5  # one text is one override, not its letters


def test_faults_of_values_are_told_as_those_of_a_file():
    with pytest.raises(ConfigError) as error:
        load(load("digits-vlm"), {"objective": {"keeep": 0.5}, "trainer.steps": "many", "seed.x": 1})
    assert str(error.value).splitlines() == [
        "recipe digits-vlm: 3 faults",
        "  override 'seed.x': seed is 0, which has no key 'x'",
        "  objective.keeep: no such key, got 0.5; did you mean 'keep'?",
        "  trainer.steps: expected a valid integer, got 'many'",
    ]
