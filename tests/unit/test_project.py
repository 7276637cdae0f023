"""What a public project promises beside its code: workflows, forms, a citation, and a guide that tells no tales."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

import adaskip

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CLASSIFIERS = [c.rpartition(" ")[2] for c in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", c)]
GUIDE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


def workflow(name: str) -> dict[Any, Any]:
    values: dict[Any, Any] = yaml.safe_load((ROOT / ".github" / "workflows" / f"{name}.yml").read_text("utf-8"))
    return values


def steps(name: str) -> list[dict[str, Any]]:
    return [step for job in workflow(name)["jobs"].values() for step in job.get("steps", [])]


def section(title: str) -> str:
    return GUIDE.split(f"## {title}\n")[1].split("\n## ")[0]


def test_the_types_are_said_to_be_there() -> None:
    """Without the marker a user's mypy ignores every annotation of an installed adaskip."""
    assert (ROOT / "adaskip" / "py.typed").is_file()
    assert "Typing :: Typed" in PROJECT["classifiers"]


def test_a_version_is_one_version() -> None:
    """A release whose citation or ``--version`` names another one cannot be told apart from it."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert PROJECT["version"] == adaskip.__version__ == citation["version"]


def test_the_citation_can_be_cited() -> None:
    """GitHub shows no citation where a required key is missing; the paper is named as the README names it."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["license"] == PROJECT["license"]
    (paper,) = citation["references"]
    assert paper["url"] in (ROOT / "README.md").read_text(encoding="utf-8")
    names = [author["family-names"] for author in paper["authors"]]
    assert names == ["Hartman", "Jayaraman", "Choraria", "Bhimaraju", "Varshney"]


def test_the_tested_pythons_are_the_promised_ones() -> None:
    """A Python that is promised and never tested, or tested and not promised."""
    matrix = workflow("tests")["jobs"]["newest"]["strategy"]["matrix"]
    assert matrix["python"] == CLASSIFIERS
    assert PROJECT["requires-python"] == f">={CLASSIFIERS[0]}"
    assert [extra["python"] for extra in matrix["include"]] == [CLASSIFIERS[-1]]
    assert workflow("tests")["jobs"]["oldest"]["steps"][1]["with"]["python-version"] == CLASSIFIERS[0]


@pytest.mark.parametrize("name", ["tests", "release"])
def test_the_make_targets_of_a_workflow_exist(name: str) -> None:
    """A renamed target leaves a workflow that fails only after it has been merged."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = {target for line in re.findall(r"^\.PHONY: (.*)$", makefile, re.M) for target in line.split()}
    called = re.findall(r"\bmake ([\w-]+)", " ".join(step.get("run", "") for step in steps(name)))
    assert set(called) <= targets
    assert name == "release" or {"lint", "test", "test-oldest"} <= set(called)


def test_what_a_workflow_reads_and_calls_exists() -> None:
    files = [
        name for step in steps("tests") for name in step.get("with", {}).get("cache-dependency-path", "").splitlines()
    ]
    files += [job["uses"] for job in workflow("release")["jobs"].values() if "uses" in job]
    assert files
    assert not [name for name in files if not (ROOT / name).is_file()]


@pytest.mark.parametrize(
    ("tag", "status"), [(f"v{adaskip.__version__}", 0), (adaskip.__version__, 1), ("v99.0.0", 1), ("", 1)]
)
def test_a_release_refuses_a_tag_that_is_not_the_version(tag: str, status: int) -> None:
    """A published file cannot be taken back: the step itself is run."""
    (check,) = [step["run"] for step in steps("release") if step.get("name") == "the tag is the version"]
    done = subprocess.run(
        ["bash", "-e", "-c", check],
        cwd=ROOT,
        env={**os.environ, "GITHUB_REF_NAME": tag},
        capture_output=True,
        text=True,
    )
    assert done.returncode == status, done.stderr
    assert not status or f"pyproject.toml says {adaskip.__version__}" in done.stdout


def test_a_release_is_tested_and_only_its_last_step_may_publish() -> None:
    jobs = workflow("release")["jobs"]
    assert set(jobs["publish"]["needs"]) == {"tests", "build"}
    assert [name for name, job in jobs.items() if "id-token" in job.get("permissions", {})] == ["publish"]
    assert jobs["publish"]["steps"][-1]["uses"].startswith("pypa/gh-action-pypi-publish@")
    for name in ("tests", "release"):
        assert workflow(name)["permissions"] == {"contents": "read"}
        assert True in workflow(name)  # YAML reads the key `on` as true


@pytest.mark.parametrize("path", FORMS, ids=lambda p: p.name)
def test_a_form_is_one_that_github_shows(path: Path) -> None:
    """GitHub drops a form silently where a key is missing, an id comes twice, or an option is no text."""
    form = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert form["name"]
    assert form["description"]
    ids = [part["id"] for part in form["body"]]
    assert len(ids) == len(set(ids))
    for part in form["body"]:
        assert part["type"] in {"input", "textarea", "dropdown"}
        assert part["attributes"]["label"]
        options = part["attributes"].get("options", [])
        assert bool(options) == (part["type"] == "dropdown")
        assert all(isinstance(option, str) for option in options)


def test_there_are_forms() -> None:
    assert [path.name for path in FORMS] == ["bug.yml", "new-policy.yml"]


def test_the_guide_names_files_that_exist() -> None:
    """A newcomer opens the file that a list names."""
    named = set(re.findall(r"`((?:[\w.-]+/)*[\w.-]+\.(?:py|yml|yaml|md|toml|txt|cff)|(?:[\w.-]+/)+)`", GUIDE))
    assert len(named) > 20
    theirs = re.compile(r"(KIND|NAME)\.\w+$")  # what the newcomer makes
    assert not sorted(name for name in named if not theirs.search(name) and not (ROOT / name).exists())


def test_the_guide_names_tests_and_names_that_exist() -> None:
    """What it says of Python is written ``adaskip.module.name`` and can be imported."""
    from importlib import import_module

    named = set(re.findall(r"`(adaskip(?:\.\w+)+)`", GUIDE))
    assert named
    for dotted in named:
        module, _, name = dotted.rpartition(".")
        assert hasattr(import_module(module), name), dotted


def test_each_word_has_one_meaning() -> None:
    """A word that stands twice in the glossary, or in no order, is not found."""
    words = re.findall(r"^\| \*\*(.+?)\*\* \| .+ \|$", section("Words"), re.M)
    assert words == sorted(set(words), key=str.lower)
    needed = "backbone bound gate group keep kv look path plan policy price prompt router routing scope skip split unit"
    assert set(needed.split()) <= set(words)
