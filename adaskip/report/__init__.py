"""The report of a training run: made from the files in its folder alone, without W&B, a network or torch."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from matplotlib.figure import Figure

from adaskip import runfiles
from adaskip.errors import DataError
from adaskip.lines import own_lines
from adaskip.report import markdown
from adaskip.report.plots import Curves, conditions_plot, keep_heat_map, ladder_plot, training_plot
from adaskip.sites import PARTS, Label, Sites

__all__ = ["conditions_plot", "keep_heat_map", "ladder_plot", "training_plot", "write"]

HEADER = ["step", "name", "value"]
FINDING = {"layer": int | str, "notion": str, "verdict": str} | dict.fromkeys(
    ("estimate", "low", "high", "threshold"), float
)


def write(run: str | Path) -> Path:
    """Write `report.md` and `plots/*.png` into a run folder and return the path of `report.md`.

    Only `metrics.csv` or a recipe must be there; what any other file would have told is reported as not measured.

    Raises:
        DataError: no such folder, no `metrics.csv`, or a damaged file; the text names the file and the line.

    ``write("runs/digits-vlm")`` writes, and returns, ``runs/digits-vlm/report.md``.
    """
    run = Path(run)
    files = read(run)
    curves, recipe, looks, rates = files.curves, files.recipe, files.looks, files.rates

    def draw(plot: Callable[[Any, Path], Figure], data: Any, name: str) -> str:
        (run / runfiles.PLOTS).mkdir(exist_ok=True)
        plot(data, run / runfiles.PLOTS / name)
        return f"{runfiles.PLOTS}/{name}"

    labels = name_columns(recipe, rates)
    heat_map = partial(keep_heat_map, labels=labels)
    sections = [
        markdown.trained(recipe, files.environment, files.summary),
        markdown.result(files.summary, files.evaluation),
        markdown.beside_static(files.summary),
        markdown.keep_by_kind(rates, draw(heat_map, rates, "keep_by_layer.png") if rates else None, labels),
        markdown.training(curves, draw(training_plot, curves, "training.png") if curves else None),
        markdown.conditions(looks, recipe, draw(conditions_plot, looks[-1], "conditions.png") if looks else None),
        markdown.alarms(looks),
    ]
    report = run / runfiles.REPORT
    runfiles.write_text(report, "\n\n".join(chain.from_iterable(sections)) + "\n")
    return report


def name_columns(recipe: dict[str, Any], rates: dict[str, list[float]]) -> tuple[Label, ...]:
    """Return what the columns of keep rates are called, by the unit that a run's routers leave out."""
    router = recipe.get("router")
    unit = router.get("unit") if isinstance(router, dict) else None
    count = len(next(iter(rates.values()), ()))
    return Sites(unit if unit in PARTS else "block", count).labels(range(count))


@dataclass(frozen=True)
class Files:
    """Hold what the files of a run say; empty where one is missing."""

    curves: Curves
    recipe: dict[str, Any]
    environment: dict[str, Any]
    rates: dict[str, list[float]]
    looks: list[dict[str, Any]]
    summary: dict[str, Any]
    evaluation: dict[str, Any]


def read(run: Path) -> Files:
    """Read everything a report is made of; called before long work whose result goes into it. Raises as `write`."""
    if not run.is_dir():
        raise DataError(f"report: {run} is no folder; expected the folder that `adaskip train` made")
    # a policy that was not trained has a recipe, and neither curves nor a summary of its training
    has = {name: (run / name).is_file() for name in (runfiles.METRICS, runfiles.RECIPE, runfiles.SUMMARY)}
    trained = has[runfiles.METRICS] or has[runfiles.SUMMARY] or not has[runfiles.RECIPE]
    return Files(
        read_curves(run / runfiles.METRICS) if trained else {},
        read_object(run / runfiles.RECIPE),
        read_object(run / runfiles.ENVIRONMENT),
        read_rates(run / runfiles.KEEP_RATES),
        read_looks(run / runfiles.CONDITIONS),
        read_object(run / runfiles.SUMMARY),
        read_evaluation(run / runfiles.EVALUATION),
    )


def read_curves(path: Path) -> Curves:
    """Read the logged curves by name; of a step logged twice (a resumed run) the later value."""
    if not path.is_file():
        raise DataError(f"{path} is missing; expected the folder of a training run, which `adaskip train` makes")
    curves: dict[str, dict[int, float]] = {}
    rows = csv.reader(own_lines(_text(path)))
    if (header := next(rows, HEADER)) != HEADER:
        raise DataError(f"{path}, line 1: expected the header {','.join(HEADER)}, got {','.join(header)!r}")
    for row in rows:
        try:
            step, name, value = row
            curves.setdefault(name, {})[int(step)] = float(value)
        except ValueError:
            raise DataError(
                f"{path}, line {rows.line_num}: expected a step, a name and a number, got {','.join(row)!r}; "
                "mend or delete that line"
            ) from None
    return {name: np.array(sorted(values.items()), dtype=float).T for name, values in curves.items()}


def read_object(path: Path) -> dict[str, Any]:
    """Read the mapping a JSON or YAML file holds; empty when the file is missing or empty."""
    text = _text(path)
    try:
        values = (yaml.safe_load if path.suffix == ".yaml" else json.loads)(text) if text.strip() else None
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}: expected valid JSON, got: {error.msg}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise DataError(f"{path}{where}: expected valid YAML, got: {getattr(error, 'problem', error)}") from None
    if not isinstance(values, dict | None):
        raise DataError(f"{path}, line 1: expected a mapping of keys, got {_short(values)}")
    return values or {}


def read_looks(path: Path) -> list[dict[str, Any]]:
    """Read the looks of `conditions.jsonl` that found anything, in order."""
    looks = []
    for number, line in enumerate(own_lines(_text(path)), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            look = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{where}: expected one JSON object, got {_short(line)} ({error.msg}); mend or delete that line"
            ) from None
        if not isinstance(look, dict) or not isinstance(look.get("findings"), list) or "step" not in look:
            raise DataError(f"{where}: expected an object with `step` and `findings`, got {_short(look)}")
        for finding in look["findings"]:
            _check_finding(finding, where)
        if look["findings"]:
            looks.append(look)
    return looks


def read_rates(path: Path) -> dict[str, list[float]]:
    """Read the keep rates of each kind; all kinds speak of the same layers."""
    rates = read_object(path)
    for kind, row in rates.items():
        if not isinstance(row, list) or not row or not all(isinstance(rate, int | float) for rate in row):
            raise DataError(f"{path}: {kind!r}: expected one number per layer, got {_short(row)}")
    for (kind, row), (other, next_row) in pairwise(rates.items()):
        if len(row) != len(next_row):
            raise DataError(f"{path}: {kind!r} has {len(row)} layers but {other!r} has {len(next_row)}; expected equal")
    return rates


def read_evaluation(path: Path) -> dict[str, Any]:
    """Read the evaluation, its rows under `kinds`; empty when nothing was evaluated."""
    evaluation = read_object(path)
    kinds = evaluation.get("kinds", [])
    if not isinstance(kinds, list) or not all(isinstance(row, dict) for row in kinds):
        raise DataError(f"{path}: `kinds`: expected a list of objects, got {_short(kinds)}")
    mean = evaluation.get("mean") or {}
    for row in [*kinds, *([mean] if isinstance(mean, dict) else [])]:
        for key, value in row.items():
            if key != "kind" and not isinstance(value, int | float | None):
                raise DataError(f"{path}: `{key}` of kind {row.get('kind')!r}: expected a number, got {_short(value)}")
    return evaluation


def _check_finding(finding: Any, where: str) -> None:
    """Raise DataError unless every value a finding needs is there; a number may be null (infinite)."""
    for key, kind in FINDING.items():
        value = finding.get(key, "nothing") if isinstance(finding, dict) else "nothing"
        number = kind is float and (value is None or isinstance(value, int | float))
        if not number and not isinstance(value, kind):
            expected = getattr(kind, "__name__", str(kind))
            raise DataError(f"{where}: `findings`: expected {expected} `{key}`, got {_short(finding)}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8") if path.is_file() else ""
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError(f"{path}, line {line}: expected UTF-8 text, got byte {error.object[error.start]:#x}") from None
