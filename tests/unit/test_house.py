"""The house rules: imports only point left, importing loads nothing, modules are short."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import time
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from adaskip import runfiles

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "adaskip"
ORDER = [
    "version",
    "errors",
    "ranks",
    "stages",
    "lines",
    "runfiles",
    "batch",
    "demo",
    "sources",
    "sites",
    "plan",
    "backbone",
    "theory",
    "policy",
    "runtime",
    "generate",
    "policies",
    "survey",
    "methods",
    "training",
    "sections",
    "recipe",
    "smoke",
    "report",
    "verbs",
    "harness",
    "bench",
    "terminal",
    "cli",
]


def room(module: str) -> int:
    return ORDER.index(module.split(".")[1])


def imports(path: Path) -> list[str]:
    found = []
    tree = ast.parse(path.read_text(encoding="utf-8"))
    # what only annotations name is no import: nothing is loaded, and a policy may say what a request is
    named = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in (node for node in ast.walk(tree) if id(node) not in named):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("adaskip"):
            found += [node.module] if node.module != "adaskip" else [f"adaskip.{name.name}" for name in node.names]
        elif isinstance(node, ast.Import):
            found += [name.name for name in node.names if name.name.startswith("adaskip.")]
    return found


DOORS = {"adaskip.runtime.attach": {"adaskip.generate.lossless", "adaskip.generate.paths"}}
"""Methods of the user's handle that open a room to the right when they are called."""


MODULES = sorted(p for p in PACKAGE.rglob("*.py") if p.parent != PACKAGE or p.name != "__init__.py")


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_left(path: Path) -> None:
    own = "adaskip." + ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    wrong = [name for name in imports(path) if room(name) > room(own) and name not in DOORS.get(own, ())]
    assert not wrong, f"{own} imports {wrong}, which lie to its right in {ORDER}"


def test_theory_is_pure() -> None:
    """Functions of tensors can be read, tested and trusted without a model; what runs one stands in survey/."""
    for path in sorted((PACKAGE / "theory").rglob("*.py")):
        foreign = [name for name in imports(path) if not name.startswith(("adaskip.theory", "adaskip.errors"))]
        assert not foreign, f"{path.relative_to(PACKAGE)} imports {foreign}"
        assert "transformers" not in path.read_text(encoding="utf-8"), path


def public_names(tree: ast.Module) -> set[str]:
    names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    names |= {
        t.id for node in tree.body if isinstance(node, ast.Assign) for t in node.targets if isinstance(t, ast.Name)
    }
    return {name for name in names if not name.startswith("_")}


def test_every_name_of_the_theory_is_used_or_explained() -> None:
    """What nobody calls and no document names is a burden that looks like a feature."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in MODULES if path.name != "__init__.py"}
    elsewhere = set(
        re.findall(r"`(\w+)`", "".join(p.read_text(encoding="utf-8") for p in (ROOT / "docs").glob("*.md")))
    )
    for node in (node for tree in trees.values() for node in ast.walk(tree)):
        if isinstance(node, ast.ImportFrom):
            elsewhere |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Attribute):  # bounds.kl_exact
            elsewhere.add(node.attr)
    for path, tree in trees.items():
        here = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
        idle = public_names(tree) - elsewhere - here if "theory" in path.parts else set()
        assert not idle, f"{path.relative_to(PACKAGE)}: {idle} are used by nothing; use, document or drop them"


def test_no_import_circle() -> None:
    """Neither between rooms nor inside one; imports inside functions count, those for annotations alone do not."""
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in MODULES}
    graph = {name: {other for other in imported(path) if other in names} - {name} for name, path in names.items()}
    try:
        order = list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))
    assert len(order) == len(names)


def imported(path: Path) -> set[str]:
    """The modules that a file imports, where `from adaskip.runtime import gates` names one too."""
    inner = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    parts = {f"{n.module}.{a.name}" for n in inner if isinstance(n, ast.ImportFrom) and n.module for a in n.names}
    whole = set(imports(path))
    return whole | {part for part in parts if part.rpartition(".")[0] in whole}


def test_the_guide_tells_the_order() -> None:
    """A contributor reads it in CONTRIBUTING.md, where a module that was added later would be missing."""
    guide = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert re.findall(r"\w+", guide.split("Imports point left: ")[1].split(". A test")[0]) == ORDER


def test_every_module_is_short() -> None:
    long = {str(p): n for p in MODULES if (n := len(p.read_text().splitlines())) > 400}
    assert not long


def test_importing_loads_no_torch_and_fast() -> None:
    code = (
        "import sys, adaskip; assert 'torch' not in sys.modules; assert adaskip.__doc__; print(sorted(adaskip.__all__))"
    )
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "RouterConfig" in done.stdout
    assert time.perf_counter() - started < 5


def test_public_names_resolve_and_are_documented() -> None:
    import adaskip

    for name in adaskip.__all__:
        assert getattr(adaskip, name).__doc__, name
    with pytest.raises(AttributeError, match="it has AdaSkipError, AdapterTuner, Batch, Collator"):
        adaskip.nothing  # noqa: B018


def test_only_backbone_knows_model_internals() -> None:
    inner = ("model.layers", "language_model", "get_decoder", "image_token_id", "num_hidden_layers")
    for path in MODULES:
        if {"backbone", "demo"} & set(path.parts):
            continue
        code = "\n".join(ast.unparse(n) for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Attribute))
        assert not [name for name in inner if f".{name}" in code], path


def words(path: Path) -> set[str]:
    """Every word of a module's texts that could be a file's name; docstrings, which people read, are left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    texts = [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose
    ]
    found = {word for text in texts for word in re.findall(r"[\w.]+", text) if "." in word}
    joined = [node.right for node in ast.walk(tree) if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div)]
    return found | {str(node.value) for node in joined if isinstance(node, ast.Constant)}  # folder / "router"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_one_module_spells_the_files_of_a_run(path: Path) -> None:
    """A name that two modules spell is one that only one of them changes: `check` once read what `train` left out."""
    if path.name != "runfiles.py":
        assert not words(path) & runfiles.NAMES


def test_only_sources_knows_the_demo() -> None:
    """The demo is one model and one data source among many; a branch for it elsewhere is one too many."""
    others = [path for path in MODULES if "demo" not in path.parts and path.name != "sources.py"]
    assert not [path for path in others if any(name.startswith("adaskip.demo") for name in imports(path))]


def test_only_one_module_writes_unfinished_files() -> None:
    """Two ways to write a file whole are two ways to leave half of one."""
    assert not [path for path in MODULES if ".part" in words(path) and path.name != "runfiles.py"]


QUESTIONS = {"What", "Whether", "How", "Which", "Where", "Who", "Why", "When"}
NOUNS = {"The", "A", "An", "One", "Two", "This", "These", "It"}
TYPES = {"bool", "long", "float", "float32", "float64", "int", "Tensor"}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_docstring_begins_with_a_question_word_an_article_or_a_type(path: Path) -> None:
    """A docstring that begins with a verb says what is done; one that begins with What or The names a result."""
    documented = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    nodes = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, documented)]
    opening = {f"{node.name}, line {node.lineno}": (ast.get_docstring(node) or "-").split()[0] for node in nodes}
    wrong = {place: word for place, word in opening.items() if word.strip(",.:;") in QUESTIONS | NOUNS | TYPES}
    assert not wrong, f"{path.relative_to(PACKAGE)}: {wrong}; begin with a verb: Return, Read, Hold, Refuse"


def test_no_test_imports_another() -> None:
    """What tests share stands in a module of its own, so that one of them can go without breaking others."""
    wrong = {
        str(path.relative_to(ROOT)): names
        for path in sorted((ROOT / "tests").rglob("*.py"))
        if (names := re.findall(r"^ *(?:from|import) (tests\.(?:\w+\.)*test_\w+)", path.read_text("utf-8"), re.M))
    }
    assert not wrong
