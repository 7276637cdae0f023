"""The words and tables of a report: one function a section, which returns its paragraphs.

Every number is read from a file of the run, and every table and picture names that file.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from adaskip import runfiles
from adaskip.report.columns import GENERATED, READ, WORDED
from adaskip.sites import Label

UNITS = {"functional": "nats", "geometric": "1 − cos", "proximal": "share moved", "cross-modal": "attention mass"}
_SLACK = ("slack_median", "slack_90")
MARKS = {"admissible": "✓", "inadmissible": "✗", "undecided": "?"}


def trained(recipe: dict[str, Any], environment: dict[str, Any], summary: dict[str, Any]) -> list[str]:
    """Write the title, and what was trained on what."""
    rows = {
        "backbone": _dig(recipe, "backbone", "path"),
        "data": _dig(recipe, "data", "source"),
        "tokens that may leave a layer": _dig(recipe, "router", "group"),
        "target keep rate": _dig(recipe, "objective", "keep"),
        "tolerance of one skip (nats)": _dig(recipe, "conditions", "tolerance"),
        "seed": recipe.get("seed", environment.get("seed")),
        **{key: environment.get(key) for key in ("device", "python", "platform")},
        "packages": ", ".join(f"{name} {version}" for name, version in (environment.get("packages") or {}).items()),
        **{key: value for key, value in summary.items() if isinstance(value, int | float) and key != "ok"},
    }
    known = [[name, number(value)] for name, value in rows.items() if value not in (None, "")]
    files = {runfiles.RECIPE: recipe, runfiles.ENVIRONMENT: environment, runfiles.SUMMARY: summary}
    body = [f"# Run report: {_cell(recipe.get('name', 'unnamed'))}", "## What was trained"]
    told = [_table(["", "value"], known), _source(*(name for name, held in files.items() if held))]
    return [*body, *(told if known else [_missing(runfiles.RECIPE)])]


def result(summary: dict[str, Any], evaluation: dict[str, Any]) -> list[str]:
    """Show what the routed model keeps and answers: on validation data, and per kind where it was evaluated."""
    body = ["## Result"]
    validation = summary.get("val")
    if isinstance(validation, dict) and validation:
        names = {"kl": "KL to the dense model (nats)", "accuracy": "accuracy", "keep": "keep rate"}
        rows = [[names.get(key, _cell(key)), number(value)] for key, value in validation.items()]
        body += ["### Validation", _table(["", "value"], rows), *_budget(summary), _source(runfiles.SUMMARY)]
    body.append("### By kind of input")
    kinds, mean = evaluation.get("kinds") or [], evaluation.get("mean")
    if not kinds:
        return [*body, _missing(runfiles.EVALUATION)]
    if isinstance(mean, dict):
        kinds = [*kinds, {"n": ""} | mean | {"kind": "**mean**"}]
    source = _source(runfiles.EVALUATION, part=f"split {evaluation.get('split', 'unknown')}")
    numbers = ("keep", "static_keep")
    shown = {key: name for key, name in GENERATED.items() if _known(key, kinds)}
    rows = [
        [
            *(_cell(row.get("kind")), number(row.get("n"))),
            *((number if key in numbers else share)(row.get(key)) for key in shown),
            *(_pair(row, ""), _pair(row, "prefill_")),
        ]
        for row in kinds
    ]
    body += [
        "Generated answers. Agreement: the share that are the dense model's. Seconds: dense → routed, and their ratio.",
        _table(["kind", "n", *shown.values(), "answer (s)", "prefill (s)"], rows),
        source,
    ]
    if _known("routed_edit_distance", kinds):
        body += [
            "The same answers. Edit distance: characters to change for the data's own answer, over its length; "
            "hallucinated: the share of answers that name what is not there, where the data say what is.",
            _by_kind(kinds, WORDED),
            source,
        ]
    if _known("kl", kinds):
        body += [
            "The data's own answers, teacher-forced. KL and log-likelihood: nats per predicted token, mean over inputs;"
            " token agreement: the share of predicted tokens whose likeliest value is the dense model's; perplexity: "
            "exp of the mean negative log-likelihood of a token, its mean over kinds geometric.",
            _by_kind(kinds, READ),
            source,
        ]
    if isinstance(static := evaluation.get("static"), dict) and static:
        body.append(
            f"{_cell(static.get('sentence'))}. The static plan leaves out layers {_layers(static.get('skip'))} "
            f"({_cell(static.get('source'))})."
        )
    body += [_cell(text) for text in evaluation.get("warnings") or []]
    if isinstance(example := evaluation.get("example"), dict) and example:
        body += ["### One input", _example(example), _source(runfiles.EVALUATION)]
    return body


def _by_kind(kinds: Sequence[dict[str, Any]], names: dict[str, str]) -> str:
    """Show figures of each kind, those that are known of any."""
    keys = {key: name for key, name in names.items() if _known(key, kinds)}
    rows = [[_cell(row.get("kind")), *(number(row.get(key)) for key in keys)] for row in kinds]
    return _table(["kind", *keys.values()], rows)


def _known(key: str, rows: Sequence[dict[str, Any]]) -> bool:
    """Return whether any row holds a figure; an evaluation without a static plan has none of one."""
    return any(row.get(key) is not None for row in rows)


def _layers(skip: Any) -> str:
    return ", ".join(map(str, skip)) if isinstance(skip, list) else _cell(skip)


def _budget(summary: dict[str, Any]) -> list[str]:
    """Say whether the compute budget was kept to, in bold where it was not."""
    if "budget" not in summary:
        return []
    missed = summary["budget"] != "held"
    sentence = _cell(summary.get("budget_sentence", ""))
    return [f"**budget: {_cell(summary['budget'])}**. {sentence}." if missed else f"budget: held. {sentence}."]


def keep_by_kind(rates: dict[str, list[float]], picture: str | None, labels: Sequence[Label] = ()) -> list[str]:
    """Show which layers each kind of input runs."""
    body = ["## Keep rates by layer and kind"]
    if not picture:
        return [*body, _missing(runfiles.KEEP_RATES)]
    means = np.mean(list(rates.values()), axis=0)
    most, least = int(means.argmax()), int(means.argmin())
    names = labels or range(len(means))
    body.append(
        f"1 means that every input of the kind ran the layer. Layers are counted from 0. Over the kinds, layer "
        f"{names[least]} runs least ({number(means[least])}) and layer {names[most]} most ({number(means[most])})."
    )
    return [*body, f"![keep rates by layer and kind]({picture})", _source(runfiles.KEEP_RATES)]


def training(curves: dict[str, np.ndarray], picture: str | None) -> list[str]:
    """Show how the keep rate followed its target, and what it cost."""
    body = ["## Training"]
    if not picture:
        return [*body, _missing(runfiles.METRICS)]
    body.append(
        "The budget's multiplier rises while the keep rate lies above its target. Faint lines are the logged values, "
        "thick ones their running mean."
    )
    wanted = ("router/keep_soft", "router/target", "router/multiplier", "fit/", "train/", "val/")
    rows = []
    for name, (steps, values) in curves.items():
        if name.startswith(wanted):
            rows.append([f"`{name}`", str(int(steps[-1])), number(values[-1])])
            if len(lost := steps[~np.isfinite(values)]):
                body.append(f"`{name}`: {len(lost)} of {len(steps)} values not finite, first at step {int(lost[0])}.")
    body += [f"![keep rate, multiplier and losses over the steps]({picture})", _source(runfiles.METRICS)]
    return [*body, "Last values:", _table(["name", "step", "value"], rows), _source(runfiles.METRICS)]


def conditions(looks: Sequence[dict[str, Any]], recipe: dict[str, Any], picture: str | None) -> list[str]:
    """Write the last look at the theory's conditions, layer by layer and together, and how the looks went."""
    body = ["## Conditions"]
    if not picture:
        return [*body, _missing(runfiles.CONDITIONS)]
    look = looks[-1]
    source = _source(runfiles.CONDITIONS, part=f"last look, step {look['step']}")
    sizes = sorted({row["n"] for row in look["findings"] if row.get("n") is not None})
    body += [
        f"May a layer be skipped by the tokens of group `{look.get('group', 'all')}`? One skip may cost "
        f"{number(look.get('tolerance'))} nats per predicted token; n = {', '.join(map(str, sizes)) or 'n/a'} inputs. "
        "A notion holds (✓) where its whole interval lies within the threshold, fails (✗) where all of it lies beyond, "
        "and is undecided (?) in between. Only the functional notion is the cost itself. "
        "Cells read: estimate [interval] / threshold.",
        f"![exact cost and cheap notions over the layers]({picture})",
        source,
        _verdicts(look),
        source,
        "### The router's skips together",
        *_joint(look.get("joint"), _dig(recipe, "objective", "alpha"), source),
        *_gauge(look.get("gauge"), look.get("together"), source),
        "### Which notion predicts the exact cost",
        *_ranks(look.get("rank_correlation"), len({row["layer"] for row in look["findings"]}), source),
    ]
    if len(looks) > 1:
        body += ["### All looks", _history(looks), _source(runfiles.CONDITIONS)]
    return body


def beside_static(summary: dict[str, Any]) -> list[str]:
    """Show the routers and the best static plan of their budget on the same inputs; nothing where none was sought."""
    found = summary.get("static")
    if not isinstance(found, dict) or not found:
        return []
    routers, gap = found.get("routers") or {}, found.get("comparison") or {}
    skip = ", ".join(map(str, found.get("skip") or [])) or "no layer"
    rows = [
        [_cell(name), number(side.get("keep")), number(side.get("kl")), share(side.get("accuracy"))]
        for name, side in (("routers", routers), (f"static: without {skip}", found))
    ]
    ends = f"{number(gap.get('low'), 3)} to {number(gap.get('high'), 3)}"
    sentence = f"{_cell(found.get('sentence'))}."
    return [
        "## Routers and the best static plan",
        _table(["", "keep rate", "KL to the dense model (nats)", "accuracy"], rows),
        f"The plan costs {number(gap.get('difference'), 3)} nats a token more than the routers (95 %: {ends}, "
        f"n = {_cell(gap.get('n'))}, paired); a negative number is in the plan's favour.",
        f"**{sentence}**" if found.get("router") == "static" else sentence,
        _source(runfiles.SUMMARY),
    ]


def alarms(looks: Sequence[dict[str, Any]]) -> list[str]:
    """Show, look by look, how much the routers' decisions depend on the input, and which alarms they raised."""
    told = [look for look in looks if isinstance(look.get("routers"), dict)]
    if not told:
        return []
    rows = [
        [
            f"{look['step']}{' (end)' if look.get('final') else ''}",
            number(look["routers"].get("paths")),
            number(look["routers"].get("logit_std")),
            "; ".join(_cell(alarm.get("sentence")) for alarm in look.get("alarms") or []) or "none",
        ]
        for look in told
    ]
    return [
        "## Do the routers look at their input?",
        "Distinct paths over the inputs looked at, and how far a layer's logits differ between them (standard "
        "deviation, mean over the layers that are not held). Routers that have collapsed raise an alarm.",
        _table(["step", "paths", "logits", "alarms"], rows),
        _source(runfiles.CONDITIONS),
    ]


def _verdicts(look: dict[str, Any]) -> str:
    found = {(row["layer"], row["notion"]): row for row in look["findings"]}
    notions = [notion for notion in UNITS if any(key[1] == notion for key in found)]

    def cell(row: dict[str, Any] | None) -> str:
        if row is None:
            return "not measured"
        low, high = ("open" if row[end] is None else number(row[end], 3) for end in ("low", "high"))
        value, limit = number(row["estimate"], 3), number(row["threshold"], 3)
        return f"{value} [{low}, {high}] / {limit} {MARKS.get(row['verdict'], '')}"

    overall = look.get("layers") or {}
    rows = [
        [str(layer), overall.get(str(layer), "not measured"), *(cell(found.get((layer, notion))) for notion in notions)]
        for layer in dict.fromkeys(key[0] for key in found)
    ]
    return _table(["layer", "verdict", *(f"{notion} ({UNITS[notion]})" for notion in notions)], rows)


def _joint(joint: dict[str, Any] | None, alpha: Any, source: str) -> list[str]:
    """Write the skips against the admissible set, and joint KL against kappa * B."""
    if not joint:
        return [_missing(runfiles.CONDITIONS, "joint")]
    n, recall, p_value = joint.get("n") or 0, joint.get("recall"), joint.get("coverage_p")
    hit = f"{share(joint.get('admissible_skips'))} of the router's {joint.get('skips')} skips are on admissible layers"
    took = f"of all skips that admissible layers allow, it takes {share(recall)}"
    text = "The router skipped nothing; " if joint.get("skips") == 0 else f"{hit}; "
    text += f"{'no layer is admissible' if recall is None else took}."
    wanted = "" if alpha is None else f", at least {share(1 - alpha)} asked for"
    rows = [
        ["mean joint KL (nats)", number(joint.get("kl"))],
        ["tolerated for all skips of an input together (nats)", number(joint.get("tolerated"))],
        ["mean κ·B (nats)", number(joint.get("bound"))],
        ["κ", number(joint.get("kappa"))],
        [f"coverage: inputs with KL ≤ κ·B{wanted}", share(joint.get("coverage"))],
        ["p-value of that coverage (beta-binomial)", number(joint.get("coverage_p"))],
        ["Spearman's ρ of B with the exact joint KL, over inputs that skip something", number(joint.get("spearman"))],
        ["slack κ·B / KL: median and 90 % quantile", " and ".join(number(joint.get(key), 3) for key in _SLACK)],
        ["n (half calibrates κ, half tests it)", f"{n} ({n // 2} + {n - n // 2})"],
    ]
    if joint.get("kappa") is None or p_value is None:
        verdict = "Coverage could not be tested: too few inputs to calibrate κ; raise `conditions.examples`."
    elif p_value < 0.05:
        verdict = "The coverage asked for does not hold here (p < 0.05)."
    else:
        verdict = "Nothing speaks against the coverage asked for (p ≥ 0.05)."
    return [text, _table(["", "value"], rows), verdict, source]


def _gauge(gauge: dict[str, Any] | None, together: dict[str, Any] | None, source: str) -> list[str]:
    """Write how well the routed pass tells what routing costs, alone and beside B; nothing where there is no gauge."""
    if not gauge:
        return []
    both = together or {}

    def row(name: str, key: str, show: Callable[[Any], str]) -> list[str]:
        return [name, show(gauge.get(key)), show(both.get(key))]

    rows = [
        row("Spearman's ρ with the exact joint KL", "spearman", number),
        row("coverage: inputs with KL ≤ what is told", "coverage", share),
        row("p-value of that coverage (beta-binomial)", "coverage_p", number),
        row("slack: told over KL, median", "slack_median", number),
        row("slack, 90 % quantile", "slack_90", number),
        row("n", "n", str),
    ]
    text = (
        "The gauge reads off the logits of a routed pass alone what its skips cost at most. "
        "Together: the geometric mean of B and the gauge's prediction, whose factor half of the inputs calibrate."
    )
    table = _table(["", "gauge", "together"], rows)
    return ["### What a routed pass tells of its own cost", text, table, source]


def _ranks(ranks: dict[str, Any] | None, layers: int, source: str) -> list[str]:
    """Write Spearman's rho of each cheap notion with the exact cost, and one sentence on which of them predict."""
    known = {name: rho for name, rho in (ranks or {}).items() if rho is not None and math.isfinite(rho)}
    if not known or layers < 3:
        return [_missing(runfiles.CONDITIONS, "rank_correlation")]
    chance = 1.645 / math.sqrt(layers - 1)  # 5 % of unrelated rankings lie above it, about
    limit = max(0.7, chance)
    good = [f"{name} ({rho:.2f})" for name, rho in known.items() if rho >= limit]
    bad = [f"{name} ({rho:.2f})" for name, rho in known.items() if rho < limit]
    parts = [f"{', '.join(good)} predict{'s' * (len(good) == 1)}"] if good else []
    parts += [f"{', '.join(bad)} do{'es' * (len(bad) == 1)} not predict"] if bad else []
    sentence = (
        f"On this model {'; '.join(parts)} the order of the layers' exact cost "
        f"(ρ ≥ {limit:.2f} asked for; up to {chance:.2f} may be chance with {layers} layers)."
    )
    head = ["notion", "Spearman's ρ with the exact KL over layers"]
    return [sentence, _table(head, [[name, number(known.get(name))] for name in ranks or {}]), source]


def _history(looks: Sequence[dict[str, Any]]) -> str:
    rows = []
    for look in looks:
        count, joint = Counter((look.get("layers") or {}).values()), look.get("joint") or {}
        told = [share(joint.get("admissible_skips")), number(joint.get("kl")), number(joint.get("bound"))]
        step = f"{look['step']}{' (end)' if look.get('final') else ''}"
        rows.append([step, *(str(count[verdict]) for verdict in MARKS), *told, share(joint.get("coverage"))])
    return _table(["step", *MARKS, "skips on admissible layers", "joint KL", "κ·B", "coverage"], rows)


def _pair(row: dict[str, Any], phase: str) -> str:
    """Write dense and routed seconds of a phase and how many times faster routed is."""
    dense, routed = row.get(f"{phase}dense_s"), row.get(f"{phase}routed_s")
    return f"{number(dense, 3)} → {number(routed, 3)} ({dense / routed:.2f}×)" if dense and routed else "n/a"


def _example(example: dict[str, Any]) -> str:
    names = {"prompt": "prompt", "expected": "expected", "dense_answer": "dense model", "answer": "routed model"}
    rows = [[name, number(example.get(key))] for key, name in (names | {"keep": "keep rate"}).items()]
    if route := "".join("#" if kept else "." for kept in example.get("route") or []):
        rows.append(["route (`#` ran, `.` skipped)", f"`{route}`"])
    return _table(["", "value"], rows)


def number(value: Any, digits: int = 4) -> str:
    """Write so many significant digits; n/a for what is not there or not finite."""
    if isinstance(value, bool | int | str):
        return _cell(value)
    if value is None or not math.isfinite(value):
        return "n/a"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"


def share(value: float | None) -> str:
    """Write a share as per cent; n/a for what is not there."""
    return "n/a" if value is None or not math.isfinite(value) else f"{100 * value:.1f} %"


def _cell(value: Any) -> str:
    """Write any text in one table cell."""
    return "n/a" if value is None else " ".join(str(value).split()).replace("|", "\\|").replace("<", "&lt;")


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def _source(*files: str, part: str = "") -> str:
    return f"Source: {', '.join(f'`{file}`' for file in files)}{part and f' ({part})'}"


def _dig(values: dict[str, Any], *keys: str) -> Any:
    for key in keys:
        values = values.get(key) if isinstance(values, dict) else None  # type: ignore[assignment]
    return values


def _missing(file: str, key: str = "") -> str:
    return f"Not measured: `{file}` {f'holds no `{key}`' if key else 'is missing or empty'}."
