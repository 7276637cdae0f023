"""Closed, frozen sections of settings: read from YAML, changed key by key, and checked with every fault at once."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from adaskip.errors import did_you_mean

Keys = tuple[str | int, ...]
"""The path of a key inside nested sections."""
Overrides = Sequence[str] | Mapping[str, Any]
"""Changes of single keys: texts ``key.path=value``, whose values are YAML, or a mapping of key paths to values."""
_NAMES = {int: "an integer", float: "a number", str: "a string"}


class Section(BaseModel):
    """Refuse unknown keys, and any change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def faults(model: type[Section], raw: dict[str, Any]) -> list[str]:
    """List everything wrong with plain values: key path, what was expected, what arrived, the likely cure.

    Values with a fault are taken out and the rest validated again, so that a wrong type does not hide a wrong range.
    """
    rest: dict[str, Any] = copy.deepcopy(raw)
    problems: dict[Keys, str] = {}
    while True:
        try:
            model.model_validate(rest)
            new = {}
        except ValidationError as error:
            new = {keys: text for keys, text in _explain(model, error, rest) if keys not in problems}
        if not new:
            return [f"{'.'.join(map(str, keys))}: {text}" for keys, text in problems.items()]
        problems |= new
        for keys in new:
            if isinstance(section := _reach(rest, keys[:-1])[1], dict):
                section.pop(keys[-1], None)


def override(raw: dict[str, Any], overrides: Overrides) -> list[str]:
    """Set keys of plain values in place; return a fault for each that cannot be set.

    >>> values = {"objective": {"keep": 0.6}}
    >>> override(values, ["objective.keep=0.5"]), override(values, {"trainer": {"steps": 10}}), values
    ([], [], {'objective': {'keep': 0.5}, 'trainer': {'steps': 10}})
    """
    if isinstance(overrides, Mapping):
        return [fault for keys, value in _leaves(overrides) if (fault := _set(raw, keys, value, ".".join(keys)))]
    texts = [overrides] if isinstance(overrides, str) else overrides
    return [fault for text in texts if (fault := _override(raw, text))]


class _Loader(yaml.SafeLoader):
    """Note repeated keys, of which PyYAML silently keeps the last."""

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


def read_yaml(path: Path) -> tuple[Any, list[str]]:
    """Read the plain values of a file, and list the faults found on the way."""
    try:
        loader = _Loader(path.read_text(encoding="utf-8"))
        raw, problems = loader.get_single_data(), loader.repeated
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        return None, [f"{where}expected valid YAML, got: {getattr(error, 'problem', None) or error}"]
    if not isinstance(raw, dict):
        problems.append(f"expected a mapping of sections (backbone, data, trainer ...), got {_show(raw)}")
    return raw, problems


def key_lines(path: Path) -> dict[str, int]:
    """Return the line, counted from 1, in which each key of a YAML file stands, by its path with dots."""
    root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    return dict(_marked(root, ()))


def override_keys(overrides: Overrides) -> set[str]:
    """Return the key paths that overrides set.

    >>> sorted(override_keys(["objective.keep=0.5", "seed=1"])), override_keys({"trainer": {"steps": 10}})
    (['objective.keep', 'seed'], {'trainer.steps'})
    """
    if isinstance(overrides, Mapping):
        return {".".join(keys) for keys, _ in _leaves(overrides)}
    texts = [overrides] if isinstance(overrides, str) else overrides
    return {text.partition("=")[0].strip() for text in texts}


def _marked(node: Any, above: tuple[str, ...]) -> Iterator[tuple[str, int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            keys = (*above, str(key.value))
            yield ".".join(keys), key.start_mark.line + 1
            yield from _marked(value, keys)


def _leaves(values: Mapping[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[list[str], Any]]:
    """Yield the key path and the value of every leaf; a key may be a path itself, a value a section."""
    for key, value in values.items():
        keys = (*above, *key.split("."))
        if isinstance(value, Mapping):
            yield from _leaves(value, keys)
        else:
            yield [*keys], value


def _override(raw: dict[str, Any], text: str) -> str | None:
    path, equals, value = text.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        return f"override {text!r}: expected key.path=value, for example objective.keep=0.5"
    try:
        parsed = yaml.safe_load(value)
    except (yaml.YAMLError, ValueError) as error:
        return f"override {text!r}: expected a YAML value, got {value!r} ({getattr(error, 'problem', None) or error})"
    return _set(raw, keys, parsed, text)


def _set(raw: dict[str, Any], keys: list[str], value: Any, text: str) -> str | None:
    """Set one key in place, making the sections above it; return the fault, if it cannot be."""
    *sections, last = keys
    for depth, key in enumerate(sections, 1):
        raw[key] = {} if raw.get(key) is None else raw[key]  # a section that was left out says None
        raw = raw[key]
        if not isinstance(raw, dict):
            return f"override {text!r}: {'.'.join(sections[:depth])} is {_show(raw)}, which has no key {keys[depth]!r}"
    raw[last] = value
    return None


def _explain(model: type[Section], error: ValidationError, raw: dict[str, Any]) -> Iterator[tuple[Keys, str]]:
    """Yield key path and text of each fault; the members of a union count as one."""
    expected: dict[Keys, list[str]] = {}
    for item in error.errors(include_url=False):
        loc, kind = item["loc"], item["type"]
        if kind == "missing":
            kind_of_key = _schema(model, loc[:-1])[str(loc[-1])]
            yield loc, f"required key is missing; expected {_NAMES.get(kind_of_key, 'a section')}"
            continue
        keys, got = _reach(raw, loc)
        match kind:
            case "extra_forbidden" | "unexpected_keyword_argument" | "invalid_key":
                yield loc, f"no such key, got {_show(item['input'])}; {_hint(model, loc)}"
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
                yield keys, f"expected a mapping of keys ({', '.join(_schema(model, loc))}), got {_show(got)}"
            case _:
                text = re.sub(r"^\w+ should (be|have) ", "", item["msg"]).split(", ")[0]
                expected.setdefault(keys, []).append(text)
    for keys, texts in expected.items():
        yield keys, f"expected {' | '.join(dict.fromkeys(texts))}, got {_show(_reach(raw, keys)[1])}"


def _schema(model: type[Section], loc: Sequence[str | int]) -> dict[str, Any]:
    """Return the keys of the section at a path, with their types; none where there is no section."""
    kind: Any = model
    for key in loc:
        kind = _schema_of(kind)[str(key)]
    return _schema_of(kind)


def _schema_of(kind: Any) -> dict[str, Any]:
    for member in get_args(kind):  # a section that may be left out
        kind = member if is_dataclass(member) or hasattr(member, "model_fields") else kind
    if is_dataclass(kind):
        return {f.name: f.type for f in fields(kind)}
    return {name: info.annotation for name, info in getattr(kind, "model_fields", {}).items()}


def _hint(model: type[Section], loc: Keys) -> str:
    """Name the closest key of the same section, or else the same key in another one."""
    near = did_you_mean(str(loc[-1]), _schema(model, loc[:-1]))
    elsewhere = [f"{section}.{loc[-1]}" for section in _schema(model, ()) if loc[-1] in _schema(model, [section])]
    return near if near.startswith("did") or not elsewhere else f"did you mean {elsewhere[0]!r}?"


def _reach(raw: Any, loc: Sequence[str | int]) -> tuple[Keys, Any]:
    """Return the longest part of a path that exists in the values, and what is there."""
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
