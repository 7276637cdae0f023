"""The settings of `adaskip bench`: one closed section, as recipes are made of, from which its options are derived."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, model_validator

from adaskip import sources
from adaskip.errors import ConfigError
from adaskip.plan import Group
from adaskip.sections import Section, faults

Path = Literal["uniform", "mixed", "many", "lossless"]
Phase = Literal["prefill", "decode"]
PHASES: tuple[Phase, ...] = get_args(Phase)
_NAMES = sources.shipped_names()
DEFAULT_SKIP = (0.0, 0.25, 0.5)
_LISTS = frozenset({"skip", "batch", "path", "phase"})
_SIZES = frozenset({"layers", "hidden", "heads", "kv_heads", "intermediate", "vocabulary"})
_OF_RANDOM_MODELS = _SIZES | {"backbone", "prompt", "image_tokens", "group", "attention", "dtype"}


def _listed(value: Any) -> Any:
    """Split a text with commas, as it is typed; leave any other value to pydantic."""
    if isinstance(value, str):
        return value.split(",")
    return [value] if isinstance(value, int | float) else value


Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, lt=1)]
Commas = BeforeValidator(_listed)


class BenchSettings(Section):
    """Say what is measured, how long, and on what."""

    target: str | None = Field(None, description=f"A run folder, or {_NAMES}.")
    backbone: str | None = Field(None, description="A random model of this type: llama ...")
    layers: Positive = Field(24, description="Its layers.")
    hidden: Positive = Field(1024, description="Its width.")
    heads: Positive | None = Field(None, description="One for 64 of the width unless said.")
    kv_heads: Positive | None = Field(None, description="As many as heads unless said.")
    intermediate: Positive | None = Field(None, description="8/3 of the width unless said.")
    vocabulary: Positive = Field(32_000, description="Tokens it knows.")
    prompt: Positive | None = Field(None, description="Text tokens a row; 512 unless said.")
    image_tokens: int = Field(0, ge=0, description="A picture before them (llava, qwen2_vl).")
    group: Group = Field("all", description="Tokens that leave a layer: all, or vision.")
    skip: Annotated[tuple[Share, ...], Commas] | None = Field(
        None, description="Shares of layers left out; 0,0.25,0.5 unless said, or what a run's policy decides."
    )
    batch: Annotated[tuple[Positive, ...], Commas] = Field((1, 8), description="Rows.")
    path: Annotated[tuple[Path, ...], Commas] = Field(
        ("uniform",),
        description="uniform: rows skip alike; mixed: each otherwise; many: generate_many; lossless: drafts.",
    )
    paths: Positive = Field(4, description="Different paths of --path many.")
    phase: Annotated[tuple[Phase, ...], Commas] = Field(PHASES, min_length=1, description="One of them, or both.")
    new: Positive = Field(16, description="Tokens written in a turn.")
    budget: float = Field(300.0, ge=0, description="Seconds for all rounds together.")
    width: float = Field(0.04, gt=0, description="Rounds end when intervals are narrower.")
    attention: Literal["sdpa", "eager"] = Field("sdpa", description="Of the random model.")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="Of the random model.")
    device: str | None = Field(None, description="cpu or cuda; the GPU if there is one unless said.")
    seed: int = Field(0, ge=0, description="Of random weights and prompts.")

    @model_validator(mode="after")
    def _one_model(self) -> BenchSettings:
        wrong = []
        if (self.target is None) == (self.backbone is None):
            wrong.append(f"target: expected a run folder, {_NAMES}, or --backbone TYPE for a random model, one of them")
        elif self.target is not None and (own := self.model_fields_set & _OF_RANDOM_MODELS):
            names = ", ".join(option(name) for name in sorted(own))
            wrong.append(f"target: a stored model has its own sizes, prompts and dtype, got {names} for it as well")
        if len(set(self.phase)) < len(self.phase):
            wrong.append(f"phase: expected prefill, decode or both, got {','.join(self.phase)!r}")
        if self.device is not None and not re.fullmatch(r"cpu|cuda(:\d+)?", self.device):
            wrong.append(f"device: expected cpu or cuda, got {self.device!r}")
        if wrong:
            raise ConfigError(f"BenchSettings: {'; '.join(wrong)}")
        return self

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as they are typed; those of a random model only where there is one."""
        values = {
            name: ",".join(f"{part:g}" if isinstance(part, float) else str(part) for part in value)
            if isinstance(value, tuple)
            else value
            for name, value in self.model_dump().items()
        }
        return {name: value for name, value in values.items() if self.target is None or name not in _OF_RANDOM_MODELS}


def read(values: dict[str, Any]) -> BenchSettings:
    """Check settings as they are typed, or as Python has them.

    Raises:
        ConfigError: all faults at once, under the names of the options.

    >>> read({"backbone": "llama", "skip": "0,0.5"}).skip
    (0.0, 0.5)
    """
    problems = []
    for fault in faults(BenchSettings, values):
        name, _, text = fault.partition(": ")
        if name in _LISTS:
            text = text.replace("expected ", "expected between commas ", 1)
        problems.append(text if name == "target" else f"{option(name)}: {text}")
    if problems:
        raise ConfigError("\n  ".join(["bench:", *problems]) if len(problems) > 1 else f"bench: {problems[0]}")
    return BenchSettings.model_validate(values)


def option(name: str) -> str:
    """Return what a setting is called on the command line.

    >>> option("kv_heads")
    '--kv-heads'
    """
    return f"--{name.replace('_', '-')}"
