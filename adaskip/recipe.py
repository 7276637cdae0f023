"""A run, described: closed, frozen sections read from YAML, with every fault reported at once."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from adaskip.demo.backbone import EMBEDDED
from adaskip.errors import ConfigError, did_you_mean
from adaskip.policies.learned.config import RouterConfig
from adaskip.theory.bounds import kl_for_accuracy
from adaskip.training.objective import Fit, Objective

RESOLVED = "recipe.resolved.yaml"
"""The resolved recipe in the folder of its run."""
_NAMES = {int: "an integer", float: "a number", str: "a string"}
Positive = Annotated[int, Field(strict=True, ge=1)]
Count = Annotated[int, Field(strict=True, ge=0)]
Text = Annotated[str, Field(min_length=1)]
Keys = tuple[str | int, ...]
"""The path of a key inside a recipe."""


class Section(BaseModel):
    """Closed and frozen: an unknown key is an error, and nothing changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class BackboneSection(Section):
    """Which frozen model is routed."""

    path: Text  # digits-vlm (the embedded demo), a Hugging Face id, or a model folder
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of the weights; auto: as stored
    attention: Literal["sdpa", "eager"] = "sdpa"
    device_map: str | None = None  # for from_pretrained; None: one device
    trust_remote_code: bool = False  # run the Python code that the model's repository ships
    revision: str | None = None  # branch, tag or commit of a Hugging Face id


class Columns(Section):
    """The source's own name of each field of an example."""

    image: Text = "image"
    prompt: Text = "prompt"
    answer: Text = "answer"
    kind: Text = "kind"


class Examples(Section):
    """At most so many examples of each split; None: all there are."""

    train: Positive | None = None
    validation: Positive | None = None
    calibration: Positive | None = None
    test: Positive | None = None


class DataSection(Section):
    """What the routers learn from."""

    source: Text  # digits-vlm, a Hugging Face dataset id, or a folder: {train, validation[, calibration, test]}.jsonl
    columns: Columns = Columns()
    examples: Examples = Examples()


class TrainerSection(Section):
    """How long, how fast and on what the routers train."""

    steps: Count  # optimiser steps; with method from-bounds those of the tuning after the fit, 0: no tuning
    batch_size: Positive  # examples a step and device
    learning_rate: float = Field(gt=0)
    temperature: float = Field(1.0, gt=0)  # of the routers' gates
    gradient_clip: float = Field(1.0, ge=0)  # largest gradient norm; 0: no clipping
    accelerator: Text = "auto"  # this and the next three go to lightning.Trainer as they are
    devices: int | str | list[int] = "auto"
    strategy: Text = "auto"
    precision: Text = "32-true"
    workers: Count = 0  # data loading processes
    validate_every: Positive  # steps
    checkpoint_every: Positive  # steps
    progress: bool = True


class ConditionsSection(Section):
    """When the theory's conditions are checked, and how strictly."""

    every: Count = 200  # steps; 0: only at the end
    examples: Positive = 128  # held-out examples a check looks at
    tolerance: float = Field(0.05, ge=0)  # nats per predicted token that one skip may cost
    points: float | None = Field(None, ge=0, le=100)  # instead: points of sampled accuracy; a bound makes nats of them
    on_violation: Literal["warn", "hold", "stop"] = "warn"  # when the router's skips of a layer clearly cost more
    level: float = Field(0.95, gt=0, lt=1)  # confidence of the intervals

    @property
    def nats(self) -> float:
        """What one skip may cost, in nats per predicted token."""
        return self.tolerance if self.points is None else float(kl_for_accuracy(self.points))


class TrackingSection(Section):
    """Where Weights & Biases keeps its copy of the run; the run folder is complete without it."""

    wandb: Literal["offline", "online", "disabled"] = "offline"
    project: Text = "adaskip"
    name: str | None = None
    tags: list[str] = []


class Recipe(Section):
    """One run. `load` reads it from YAML; `router` and `objective` are the very dataclasses the components take."""

    name: Text = "recipe"
    seed: Count = 0
    backbone: BackboneSection
    router: RouterConfig = RouterConfig()
    data: DataSection
    objective: Objective = Objective()
    method: Literal["end-to-end", "from-bounds"] = "end-to-end"
    fit: Fit = Fit()  # of method from-bounds
    trainer: TrainerSection
    conditions: ConditionsSection = ConditionsSection()
    tracking: TrackingSection = TrackingSection()
    output: Text = "runs/recipe"

    @model_validator(mode="after")
    def _something_trains(self) -> Recipe:
        if self.method == "end-to-end" and not self.trainer.steps:
            raise ConfigError(
                "Recipe: trainer.steps: expected an integer >= 1 (only method from-bounds can do without), got 0"
            )
        if not self.trainer.steps and self.conditions.on_violation != "warn":
            raise ConfigError(
                "Recipe: conditions.on_violation: expected warn where trainer.steps is 0 (hold and stop act while "
                f"training), got {self.conditions.on_violation!r}"
            )
        return self


def recipes() -> dict[str, Path]:
    """The shipped recipes by name: inside an installed package, or at the root of a source checkout."""
    package = Path(__file__).parent
    installed = package / "_recipes"
    folder = installed if installed.is_dir() else package.parent / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"), key=lambda path: path.stem)}


def sentence(path: Path) -> str:
    """What a recipe says it is: its first line, a comment."""
    with path.open(encoding="utf-8") as lines:
        return next(lines, "").lstrip("# ").strip()


def find(name_or_path: str | Path) -> Path:
    """The file of a shipped recipe's name, or of a path.

    Raises ConfigError when there is neither.
    """
    shipped, path = recipes(), Path(name_or_path)
    if str(name_or_path) in shipped:
        return shipped[str(name_or_path)]
    if path.is_file():
        return path
    if path.is_dir():
        raise ConfigError(f"recipe {str(path)!r} is a folder; expected a YAML file or a name that `adaskip ls` shows")
    raise ConfigError(
        f"recipe {str(path)!r}: no such file, and none of that name is shipped; "
        f"{did_you_mean(path.stem, shipped)} (see them with: adaskip ls)"
    )


def load(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a shipped recipe or a file, apply ``key.path=value`` overrides (values are YAML), and validate.

    A relative `data.source` or `backbone.path` that exists beside the file, or else in the working directory, becomes
    absolute; anything else is left for the Hugging Face hub. A run's own ``recipe.resolved.yaml`` means the folder it
    lies in, wherever that has been moved to or is looked at from.

    Raises:
        ConfigError: lists every fault of the file and the overrides, one a line.

    >>> load("digits-vlm", ["objective.keep=0.5"]).objective.keep
    0.5
    """
    path = find(name_or_path)
    raw, found = _parse(path)
    if isinstance(raw, dict):
        if path.name == RESOLVED:
            raw["output"] = str(path.parent)
        found += [fault for text in overrides if (fault := _override(raw, text))]
        raw.setdefault("name", path.stem)
        raw.setdefault("output", f"runs/{raw['name']}")
        for section, key in (("data", "source"), ("backbone", "path")):
            if isinstance(values := raw.setdefault(section, {}), dict) and isinstance(values.get(key), str):
                values[key] = _absolute(values[key], path.parent)
        raw.setdefault("trainer", {})
        found += faults(raw)
    if found:
        count = "1 fault" if len(found) == 1 else f"{len(found)} faults"
        raise ConfigError("\n  ".join([f"recipe {path}: {count}", *found]))
    return Recipe.model_validate(raw)


def dump(recipe: Recipe) -> str:
    """The recipe, resolved, as YAML that `load` reads back to an equal recipe."""
    return yaml.safe_dump(recipe.model_dump(), sort_keys=False, allow_unicode=True)


def faults(raw: dict[str, Any]) -> list[str]:
    """Everything wrong with a recipe's plain values: key path, what was expected, what arrived, the likely cure.

    What is found is taken out and the rest validated again, so that a wrong type does not hide a wrong range.
    """
    rest: dict[str, Any] = copy.deepcopy(raw)
    found: dict[Keys, str] = {}
    while True:
        try:
            Recipe.model_validate(rest)
            new = {}
        except ValidationError as error:
            new = {keys: text for keys, text in _explain(error, rest) if keys not in found}
        if not new:
            return [f"{'.'.join(map(str, keys))}: {text}" for keys, text in found.items()]
        found |= new
        for keys in new:
            if isinstance(section := _reach(rest, keys[:-1])[1], dict):
                section.pop(keys[-1], None)


class _Loader(yaml.SafeLoader):
    """Notes repeated keys, where PyYAML silently keeps the last."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.repeated: list[str] = []

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in names:
                    self.repeated.append(f"line {key.start_mark.line + 1}: key {key.value!r} appears twice; keep one")
                names.add(key.value)
        return super().construct_mapping(node, deep)


def _parse(path: Path) -> tuple[Any, list[str]]:
    """A file's plain values, and the faults found on the way."""
    try:
        loader = _Loader(path.read_text(encoding="utf-8"))
        raw, found = loader.get_single_data(), loader.repeated
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        return None, [f"{where}expected valid YAML, got: {getattr(error, 'problem', None) or error}"]
    if not isinstance(raw, dict):
        found.append(f"expected a mapping of sections (backbone, data, trainer ...), got {_show(raw)}")
    return raw, found


def _override(raw: dict[str, Any], text: str) -> str | None:
    """Set one ``key.path=value`` in place; the fault, if it cannot be."""
    path, equals, value = text.partition("=")
    *sections, last = keys = path.strip().split(".")
    if not equals or not all(keys):
        return f"override {text!r}: expected key.path=value, for example objective.keep=0.5"
    for depth, key in enumerate(sections, 1):
        raw = raw.setdefault(key, {})
        if not isinstance(raw, dict):
            return f"override {text!r}: {'.'.join(sections[:depth])} is {_show(raw)}, which has no key {keys[depth]!r}"
    try:
        raw[last] = yaml.safe_load(value)
    except (yaml.YAMLError, ValueError) as error:
        return f"override {text!r}: expected a YAML value, got {value!r} ({getattr(error, 'problem', None) or error})"
    return None


def _absolute(text: str, folder: Path) -> str:
    for base in () if text in ("", EMBEDDED) else (folder, Path.cwd()):
        if (candidate := base / Path(text).expanduser()).exists():
            return str(candidate.resolve())
    return text


def _explain(error: ValidationError, raw: dict[str, Any]) -> Iterator[tuple[Keys, str]]:
    """(key path, text) of each fault; the members of a union count as one."""
    expected: dict[Keys, list[str]] = {}
    for item in error.errors(include_url=False):
        loc, kind = item["loc"], item["type"]
        if kind == "missing":
            wanted = _schema(loc[:-1])[str(loc[-1])]
            yield loc, f"required key is missing; expected {_NAMES.get(wanted, 'a section')}"
            continue
        keys, got = _reach(raw, loc)
        match kind:
            case "extra_forbidden" | "unexpected_keyword_argument" | "invalid_key":
                yield loc, f"no such key, got {_show(item['input'])}; {_hint(loc)}"
            case "literal_error":
                allowed = re.findall(r"'([^']*)'", item["ctx"]["expected"])
                hint = did_you_mean(str(got), allowed)
                near = f"; {hint}" if hint.startswith("did") else ""
                yield keys, f"expected {' | '.join(allowed)}, got {_show(got)}{near}"
            case "value_error":
                for part in str(item["ctx"]["error"]).partition(": ")[2].split("; "):
                    key, _, text = part.partition(": ")
                    yield (*keys, key), text
            case "model_type" | "dataclass_type":
                yield keys, f"expected a mapping of keys ({', '.join(_schema(loc))}), got {_show(got)}"
            case _:
                text = re.sub(r"^\w+ should (be|have) ", "", item["msg"]).split(", ")[0]
                expected.setdefault(keys, []).append(text)
    for keys, texts in expected.items():
        yield keys, f"expected {' | '.join(dict.fromkeys(texts))}, got {_show(_reach(raw, keys)[1])}"


def _schema(loc: Sequence[str | int]) -> dict[str, Any]:
    """The keys of the section at a path, with their types; none where there is no section."""
    kind: Any = Recipe
    for key in loc:
        kind = _schema_of(kind)[str(key)]
    return _schema_of(kind)


def _schema_of(kind: Any) -> dict[str, Any]:
    if is_dataclass(kind):
        return {f.name: f.type for f in fields(kind)}
    return {name: info.annotation for name, info in getattr(kind, "model_fields", {}).items()}


def _hint(loc: Keys) -> str:
    """The closest key of the same section, or else the same key in another one."""
    near = did_you_mean(str(loc[-1]), _schema(loc[:-1]))
    elsewhere = [f"{section}.{loc[-1]}" for section in _schema(()) if loc[-1] in _schema([section])]
    return near if near.startswith("did") or not elsewhere else f"did you mean {elsewhere[0]!r}?"


def _reach(raw: Any, loc: Sequence[str | int]) -> tuple[Keys, Any]:
    """The longest part of a path that exists in the values, and what is there."""
    keys: list[str | int] = []
    for key in loc:
        if key not in (raw if isinstance(raw, dict) else range(len(raw)) if isinstance(raw, list) else ()):
            break
        keys.append(key)
        raw = raw[key]
    return tuple(keys), raw


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
