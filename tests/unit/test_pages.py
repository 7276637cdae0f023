"""What the pages promise without being run: commands that parse; names, files and sentences that exist; brevity."""

from __future__ import annotations

import ast
import contextlib
import inspect
import re
import shlex
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import adaskip
from adaskip.recipe import load, recipes
from tests import commands, documents, tree
from tests.documents import PAGES, ROOT

README = documents.read("README.md")
TROUBLES = documents.read("docs/troubleshooting.md")
ENTRIES = re.findall(r"^### ([^\n]*)\n\n(.*?)(?=^##|\Z)", TROUBLES, re.M | re.S)


# -- the README --------------------------------------------------------------------------------------------------------


def test_the_readme_is_short() -> None:
    """A first-time reader leaves a manual; what goes beyond 200 lines stands in docs/."""
    assert len(README.splitlines()) <= 200


def test_the_readme_names_every_folder() -> None:
    """The map of the house has at most 25 lines and every folder of the package and of the repository that matters."""
    house = README.split("## Where things are")[1].split("```")[1]
    assert len(house.strip().splitlines()) <= 25
    named = re.findall(r"^ *(\w+)/ ", house, re.M)
    assert not [name for name in named if not ((ROOT / name).is_dir() or (ROOT / "adaskip" / name).is_dir())]
    folders = {path.parent.name for path in (ROOT / "adaskip").glob("*/__init__.py")}
    assert folders | {"adaskip", "recipes", "scripts", "benchmarks", "docs", "tests"} == set(named)


def test_the_readme_leads_to_every_page() -> None:
    pages = {str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md")}
    assert not sorted(page for page in pages if f"]({page}" not in README)


# -- links -------------------------------------------------------------------------------------------------------------


def slug(heading: str) -> str:
    """Return the anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES)
def test_linked_files_and_headings_exist(page: str) -> None:
    """A file or heading was renamed; catches a link that leads nowhere."""
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", documents.read(page)):
        path = (PAGES[page].parent / target).resolve() if target else PAGES[page]
        assert path.exists(), f"{page}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.M)
            assert anchor in map(slug, headings), f"{page}: {target}#{anchor}"


# -- Python ------------------------------------------------------------------------------------------------------------

PYTHON = [block for page in PAGES for block in documents.blocks(page, "python")]


@pytest.mark.parametrize("block", PYTHON, ids=lambda b: f"{b.page}:{b.line}")
def test_python_compiles_and_names_what_exists(block: documents.Block) -> None:
    """A name or a keyword argument has gone; catches a block of the pages that still types it."""
    for node in ast.walk(ast.parse(block.placed, block.page)):
        if isinstance(node, ast.Attribute) and (parts := dotted(node)) and parts[0] == "adaskip":
            resolve(parts)
        if isinstance(node, ast.Call) and (parts := dotted(node.func)) and parts[0] == "adaskip":
            inspect.signature(resolve(parts)).bind_partial(**{k.arg: None for k in node.keywords if k.arg})


def dotted(node: ast.AST) -> list[str]:
    """Return the names of ``a.b.c``; none for anything else."""
    if isinstance(node, ast.Name):
        return [node.id]
    if isinstance(node, ast.Attribute) and (before := dotted(node.value)):
        return [*before, node.attr]
    return []


def resolve(parts: list[str]) -> Any:
    """Return what a dotted name stands for; its last part may be a module that nobody has imported yet."""
    from importlib import import_module

    found: Any = adaskip
    for depth, part in enumerate(parts[1:], 2):
        with contextlib.suppress(ModuleNotFoundError):
            import_module(".".join(parts[:depth]))
        found = getattr(found, part)
    return found


@pytest.mark.parametrize("page", PAGES)
def test_names_within_the_prose_exist(page: str) -> None:
    """A module has moved; catches a sentence that still sends readers to where it was."""
    for span in documents.spans(page):
        if match := re.match(r"adaskip(?:\.[A-Za-z_]\w*)+", span):
            resolve(match[0].split("."))


def test_every_public_name_has_an_example() -> None:
    """A name was added or taken away; docs/api.md has one section for each, with a block that runs and uses it."""
    page = documents.read("docs/api.md")
    sections = dict(re.findall(r"^## `(\w+)`\n(.*?)(?=^## |\Z)", page, re.M | re.S))
    assert sorted(sections) == adaskip.__all__
    without = [name for name, text in sections.items() if documents.RUNS not in text or name not in examples(text)]
    assert not without


def examples(text: str) -> str:
    return "\n".join(re.findall(r"```python\n(.*?)```", text, re.S))


# -- the command line --------------------------------------------------------------------------------------------------

LINES = [(page, line) for page in PAGES for line in documents.commands(page)]


@pytest.mark.parametrize(("page", "line"), LINES, ids=[f"{page}: {line[:60]}" for page, line in LINES])
def test_command_lines_parse(page: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A verb, option, recipe or recipe key was renamed; catches a line of the pages that would end in exit status 2."""
    monkeypatch.chdir(tmp_path)
    verb, *words = shlex.split(line, comments=True)
    for word in words:
        if re.search(r"\.(jsonl|png)$", word):
            Path(word).touch()
    assert verb in commands.verbs(), page
    parsed = commands.verbs()[verb].make_context(verb, list(words)).params
    if (name := parsed.get("recipe", parsed.get("name"))) in recipes():
        load(name, parsed.get("overrides") or [])
    if verb in commands.DERIVED:
        commands.DERIVED[verb](**{name: value for name, value in parsed.items() if value})


def spans() -> Iterator[tuple[str, str, list[str]]]:
    """Yield (page, verb, options) of commands within the prose."""
    for page in PAGES:
        for span in documents.spans(page):
            if match := re.match(r"(?:adaskip|python -m adaskip\.cli) (\w+)\b(.*)", span):
                yield page, match[1], re.findall(r"--[\w-]+", match[2])


def test_commands_within_the_prose_exist() -> None:
    known = {verb: {opt for p in command.params for opt in p.opts} for verb, command in commands.verbs().items()}
    found = list(spans())
    assert found
    for page, verb, options in found:
        assert verb in {*known, "VERB"}, f"{page}: adaskip {verb}"
        assert not set(options) - {*known.get(verb, ()), "--help"}, f"{page}: adaskip {verb} {options}"


def test_every_verb_has_its_section_and_its_options() -> None:
    """The tables are made of the commands: no verb or option is missing, and none is stale."""
    page = documents.read("docs/cli.md")
    assert sorted(re.findall(r"^## (\w+)$", page, re.M)) == sorted(commands.verbs())
    assert Counter(re.findall(r"<!-- options of (\w+) -->", page)) == Counter([*commands.verbs()])
    assert commands.fill(page) == page, "type: python -m tests.commands"


def test_every_exit_status_is_told() -> None:
    from adaskip.terminal import INTERRUPTED

    table = documents.read("docs/cli.md").split("| exit status | meaning |")[1].split("\n\n")[0]
    assert re.findall(r"^\| (\d+) \|", table, re.M) == ["0", "1", "2", str(INTERRUPTED)]


# -- the tree ----------------------------------------------------------------------------------------------------------


def test_the_tree_is_the_package() -> None:
    """A module came, went or says something else of itself: the page is written anew, not by hand."""
    assert documents.read("docs/tree.md") == tree.page(), "type: python -m tests.tree"


# -- troubleshooting ---------------------------------------------------------------------------------------------------


def test_there_are_troubles_enough_and_none_twice() -> None:
    titles = [title for title, _ in ENTRIES]
    assert len(titles) >= 30
    assert not [title for title, count in Counter(titles).items() if count > 1]
    assert TROUBLES.count("\n### ") == len(ENTRIES)


@pytest.mark.parametrize(("title", "text"), ENTRIES, ids=[title[:60] for title, _ in ENTRIES])
def test_a_trouble_has_its_cause_and_its_cure(title: str, text: str) -> None:
    """An entry says why, and what to type; a sentence it quotes in its title is one that the package still says.

    Values that an error fills in are written as …, so that readers find the words that are always there.
    """
    assert "**Why.**" in text
    assert "**Do.**" in text
    for quoted in re.findall(r"`([^`]+)`", title):
        assert any(quoted in sentence for sentence in documents.sentences()), f"nothing in adaskip says: {quoted}"
