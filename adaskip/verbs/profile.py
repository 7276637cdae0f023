"""`adaskip profile`: how redundant the layers of a model are, measured without training; JSON and one picture."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

import torch

from adaskip import sources
from adaskip.backbone import load
from adaskip.errors import ConfigError, DataError
from adaskip.plan import Group, SkipPlan
from adaskip.report.redundancy import profile_plot
from adaskip.runfiles import PROFILE, PROFILE_PLOT, write_json
from adaskip.runtime.attach import attach
from adaskip.stages import SILENT, Stages
from adaskip.survey.oracle import Oracle, find_oracle
from adaskip.survey.profile import Profile, profile, smallest_profile
from adaskip.theory.sinks import SINK
from adaskip.training.data import Collator, NumberedBatches, load_records, loader
from adaskip.training.reading import describe_half
from adaskip.verbs.run import check_writable
from adaskip.verbs.splits import check_split

_WHY = "a quarter of them calibrates the constants, the rest judges and tests"


@dataclass(frozen=True)
class ProfileResult:
    """Hold a profile of a named model, its figures and its picture in a folder."""

    profile: Profile
    model: str
    picture: Path
    oracle: Oracle | None = None  # what choosing input by input could gain, on a small sample

    def stored(self) -> dict[str, Any]:
        """Return what stands in ``profile.json``."""
        oracle = None if self.oracle is None else self.oracle.to_dict()
        return self.profile.to_dict() | {"model": self.model, "oracle": oracle}

    def to_dict(self) -> dict[str, Any]:
        """Return what ``--json`` prints."""
        return self.stored() | {"picture": str(self.picture)}


def profile_model(
    model: str,
    data: str | None = None,
    group: str | None = None,
    *,
    split: str = "validation",
    examples: int = 256,
    tolerance: float = 0.05,
    batch_size: int = 32,
    seed: int = 0,
    tangents: int = 64,
    oracle: int = 16,
    keep: float = 0.9,
    output: Path | None = None,
    stages: Stages = SILENT,
) -> ProfileResult:
    """Profile a model on a data source and leave ``profile.json`` and ``profile.png`` in a folder.

    Args:
        model: Hugging Face id, folder, or ``digits-vlm``.
        data: a folder of JSON lines, a Hugging Face dataset id, or ``digits-vlm``; default: the demo's, for the demo.
        group: ``all`` or ``vision``; default: both where the model has vision tokens.
        split: of the data.
        examples: inputs; a quarter calibrates, a half is judged, a quarter tests.
        tolerance: nats per predicted token that one skipped layer may cost.
        batch_size: inputs at once.
        seed: of the draws.
        tangents: so many of the inputs get forward-mode products (first order), which cost more than the exact reruns.
        oracle: so many of the inputs also get a plan of their own, beside the best for all of them; 0: none.
        keep: share of the layers that these plans keep; at least one layer goes.
        output: the folder; default ``runs/profile-NAME``.
        stages: hears what is under way.

    Raises:
        AdaSkipError: the model, the data or the two together do not fit; says what to type next.
    """
    folder = output or Path("runs") / f"profile-{Path(model).resolve().name}"
    _check(model, data, group, split, examples, folder)
    _check_numbers(examples, tolerance, batch_size, tangents, oracle, keep)
    source = data or model
    records, half = load_records(source, split, examples, seed), describe_half(source, split)
    if len(records) < (needed := smallest_profile()):
        raise DataError(
            f"profile: expected at least {needed} inputs, got {len(records)}, which is all that split {split} of "
            f"{source} holds{half and f' ({half})'}; {_WHY}"
        )
    if half and len(records) < examples:
        stages.note(f"profiling {len(records)} inputs: {half}")
    folder.mkdir(parents=True, exist_ok=True)
    with stages(f"loading {model}"):
        processor, base = load.load_processor(model), load.load_backbone(model)
        if torch.cuda.is_available():
            torch.nn.Module.cuda(base)
        batches = [batch.to(base.device) for batch in loader(records, Collator(processor), batch_size)]
    groups = None if group is None else (cast(Group, group),)
    measured = profile(base, batches, groups, tolerance=tolerance, tangents=tangents, seed=seed, stages=stages)
    found = None
    if oracle:
        chosen = attach(base, SkipPlan(group=cast(Group, measured.groups[-1].group)))
        layers = len(chosen.spec.layers)
        skips = min(layers, max(1, round((1 - keep) * layers)))
        try:
            some = records[:oracle]
            found = find_oracle(
                chosen,
                NumberedBatches(some, Collator(processor), base.device, batch_size),
                len(some),
                skips=skips,
                stages=stages,
            )
        finally:
            chosen.detach()
    result = ProfileResult(measured, model, folder / PROFILE_PLOT, found)
    write_json(folder / PROFILE, result.stored(), indent=1)
    profile_plot(result.stored(), result.picture)
    return result


def _check_numbers(examples: int, tolerance: float, batch_size: int, tangents: int, oracle: int, keep: float) -> None:
    """Refuse sizes that cannot be meant."""
    if not 1 <= batch_size <= examples:
        raise ConfigError(
            f"profile: expected --batch-size of 1 to {examples}, as many as there are --examples, got {batch_size}"
        )
    if tangents < 0:
        raise ConfigError(f"profile: expected --tangents of 0 (none) or more inputs, got {tangents}")
    if not 0 <= oracle <= examples:
        raise ConfigError(f"profile: expected --oracle of 0 to {examples}, some of the --examples, got {oracle}")
    if not 0 < keep < 1:
        raise ConfigError(f"profile: expected --keep between 0 and 1, the share of the layers that stay, got {keep:g}")
    if not (tolerance > 0 and math.isfinite(tolerance)):
        raise ConfigError(f"profile: expected --tolerance above 0, nats per predicted token, got {tolerance:g}")


def _check(model: str, data: str | None, group: str | None, split: str, examples: int, folder: Path) -> None:
    """Refuse what cannot be profiled, before anything is loaded."""
    if group not in (None, *get_args(Group)):
        raise ConfigError(f"profile: expected group all or vision, got {group!r}; leave it out for both")
    if data is None and not sources.is_shipped(model):
        raise ConfigError(
            f"profile: {model} needs prompts with answers; expected --data SOURCE (a folder with {split}.jsonl, or a "
            f"Hugging Face dataset id): adaskip profile {model} --data my-data"
        )
    check_split(split)
    if examples < (needed := smallest_profile()):
        raise DataError(f"profile: expected --examples of at least {needed}, got {examples}; {_WHY}")
    if folder.exists() and not folder.is_dir():
        raise ConfigError(
            f"profile: {folder} is a file; expected a folder for the picture and the figures: --output DIR"
        )
    check_writable(folder, "the profile", "choose another folder: --output DIR")


def summary(values: dict[str, Any]) -> Iterator[list[dict[str, Any]]]:
    """Make the tables of a profile, for the terminal: layers, rank correlations, sinks and claims, by group."""
    shown = ("cosine", "rho", "first_order", "attention_mass", "bound")
    for name, group in values["groups"].items():
        yield [
            {"layer": row["layer"], "verdict": row["verdict"]}
            | {f"cost_{end}": row["functional"][end] for end in ("estimate", "low", "high")}
            | {key: row[key]["estimate"] for key in shown if row.get(key)}
            for row in values["layers"]
            if row["group"] == name
        ]
        over_inputs = group["rank_correlation_inputs"]
        yield [
            {"notion": notion, "rho": None if rho is None else rho["estimate"]}
            | {end: None if rho is None else rho[end] for end in ("low", "high")}
            | {"over_inputs": over_inputs.get(notion)}
            for notion, rho in group["rank_correlation"].items()
        ]
        places = ((row["layer"], row["sinks"]) for row in values["layers"] if row["group"] == name)
        yield [
            {"layer": layer, "first_token": sinks["first"], "longest_token": sinks["longest"]}
            | {"sink_at_position": ", ".join(f"{p['position']} ({p['share']:.0%})" for p in sinks["positions"])}
            for layer, sinks in places
            if sinks["longest"] >= SINK
        ]
        words = {True: "holds", False: "FAILS", None: "undecided"}
        yield [
            {"": words[claim["holds"]], "nats": claim["estimate"], "claim": claim["claim"]} for claim in group["claims"]
        ]
