"""The recipe of a run: its settings in closed, frozen sections, read from YAML, with every fault reported at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import Field, model_validator

from adaskip import runfiles, sources
from adaskip.errors import ConfigError, did_you_mean
from adaskip.methods.names import Name
from adaskip.policies.learned.config import RouterConfig
from adaskip.runtime.lora import Lora
from adaskip.sections import Overrides, Section, faults, key_lines, override, override_keys, read_yaml
from adaskip.theory.bounds import kl_for_accuracy
from adaskip.training.objective import Fit, Objective, check_gradient

SWEEPS = "sweeps"
"""The folder beside recipes whose files are W&B's own, for `wandb sweep`."""

Positive = Annotated[int, Field(strict=True, ge=1)]
Count = Annotated[int, Field(strict=True, ge=0)]
Seed = Annotated[int, Field(strict=True, ge=0, lt=2**32)]  # what NumPy takes
Trainer = Literal["end-to-end", "from-bounds", "path-bank", "token-plan"]
"""Methods by which this package finds a policy; those of the field choose one, `adaskip.methods.names.Name`."""
Text = Annotated[str, Field(min_length=1)]


class BackboneSection(Section):
    """Name the frozen model that is routed, and say how it is loaded."""

    path: Text  # digits-vlm (the embedded demo), a Hugging Face id, or a model folder
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of the weights; auto: as stored
    quantise: Literal["8bit", "4bit"] | None = None  # weights of 8 or 4 bits, by bitsandbytes; None: as they are
    attention: Literal["sdpa", "eager"] = "sdpa"
    device_map: str | None = None  # for from_pretrained; None: one device
    trust_remote_code: bool = False  # run the Python code that the model's repository ships
    revision: str | None = None  # branch, tag or commit of a Hugging Face id


class Columns(Section):
    """Map each field of an example to the source's own name of it."""

    image: Text = "image"
    prompt: Text = "prompt"
    answer: Text = "answer"
    kind: Text = "kind"
    messages: Text = "messages"  # a conversation, instead of prompt and answer
    present: Text = "present"  # what an answer may name, a list of words: anything else of the data's is hallucinated


class Examples(Section):
    """Limit the number of examples of each split; None: all there are."""

    train: Positive | None = None
    validation: Positive | None = None
    calibration: Positive | None = None
    test: Positive | None = None


class DataSection(Section):
    """Name the data that the routers learn from."""

    # digits-vlm, a folder of {train, validation[, calibration, test]}.jsonl, one file that is divided, or the id of a
    # Hugging Face dataset
    source: Text
    seed: Seed = 0  # of that division; runs of several seeds have the same test inputs
    subset: str | None = None  # of a Hugging Face dataset: its configuration
    chat: bool = (
        False  # prompts and answers are what a user and an assistant say; the model's chat template writes them
    )
    columns: Columns = Columns()
    examples: Examples = Examples()
    bad_limit: Count = 0  # so many bad records are left out; one more stops the run before it starts
    group_by_length: bool = False  # batches of rows about equally long: less padding
    max_tokens: Positive | None = None  # of a prompt with all that follows; None: the backbone's positions
    max_pixels: Positive | None = None  # of a picture, width times height; None: what Pillow opens


class TrainerSection(Section):
    """Set how long, how fast and on which hardware the routers train."""

    steps: Count  # optimiser steps; from-bounds: of the tuning after the fit, 0: none; path-bank, token-plan: 0
    batch_size: Positive  # examples a step and device
    learning_rate: float = Field(gt=0)
    temperature: float = Field(1.0, gt=0)  # of the routers' gates, at the first step
    last_temperature: float | None = Field(None, gt=0)  # at the last step; None: the same
    gradient_clip: float = Field(1.0, ge=0)  # largest gradient norm; 0: no clipping
    accelerator: Text = "auto"  # this and the next three go to lightning.Trainer as they are
    devices: int | str | list[int] = "auto"
    strategy: Text = "auto"  # but for fsdp2: every process holds a part of the backbone
    precision: Text = "32-true"
    gradient_checkpointing: bool = False  # layers run once more in the backward pass, instead of keeping their results
    workers: Count = 0  # data loading processes
    validate_every: Positive  # steps
    checkpoint_every: Positive  # steps
    progress: bool = True


class ConditionsSection(Section):
    """Set when the theory's conditions are checked, and how strictly."""

    every: Count = 200  # steps; 0: only at the end
    examples: Positive = 128  # held-out examples a check looks at
    tolerance: float = Field(0.05, ge=0)  # nats per predicted token that one skip may cost
    points: float | None = Field(None, ge=0, le=100)  # instead: points of sampled accuracy; a bound makes nats of them
    on_violation: Literal["warn", "hold", "stop"] = "warn"  # when the router's skips of a layer clearly cost more
    level: float = Field(0.95, gt=0, lt=1)  # confidence of the intervals
    hold_above: float | None = Field(10, gt=0)  # layers that cost so many tolerances alone run; None: none is held

    @property
    def nats(self) -> float:
        """Return what one skip may cost, in nats per predicted token."""
        return self.tolerance if self.points is None else float(kl_for_accuracy(self.points))


class BankSection(Section):
    """Set how a bank of paths is found, and how much of the data that takes."""

    examples: Annotated[int, Field(strict=True, ge=20)] = 320  # training inputs that the predictor is fitted on
    sample: Positive = 96  # of these, what paths are planned on
    paths: Count = 12  # at most, beside the dense one and the static plan
    groups: Count = 4  # of inputs, that get paths of their own
    deepest: Positive | None = None  # layers that a path leaves out at most; None: one more than twice the static plan
    entry: Count = 3  # the choice falls before this layer
    width: Positive = 6  # layers tried each time one more goes


class ChoiceSection(Section):
    """Set how much of the data a method of the field chooses by."""

    examples: Positive = 200  # training inputs


class TokensSection(Section):
    """Set how a plan for each class of tokens is found, and how much of the data that takes."""

    examples: Positive = 48  # training inputs that plans are priced on
    prompt: Positive = 6  # classes of prompt tokens, beside the first and the last of a prompt
    answer: Positive = 4  # classes of generated tokens
    entry: Count = 3  # classes are told apart before this layer, and no earlier one is left out
    band: Positive = 3  # neighbouring layers that a class leaves out together
    width: Positive = 4  # parts tried each time one more goes


class StaticSection(Section):
    """Set what is done with the best static plan of the budget, which the routers must beat."""

    width: Count = 6  # layers tried each time one more goes; 0: no plan is sought, nothing is compared
    start: bool = False  # the routers begin at the plan, and the budget holds from the first step, without a warm-up
    fallback: bool = True  # where the routers do not beat the plan, router/ holds the plan


class TrackingSection(Section):
    """Set where Weights & Biases keeps its copy of the run; the run folder is complete without it."""

    wandb: Literal["offline", "online", "disabled"] = "offline"
    project: Text = "adaskip"
    name: str | None = None
    tags: list[str] = Field(default_factory=list)


class Recipe(Section):
    """Describe one run. `load` reads it from YAML; `router` and `objective` go to the components as they are."""

    name: Text = "recipe"
    seed: Seed = 0
    backbone: BackboneSection
    router: RouterConfig = RouterConfig()
    data: DataSection
    objective: Objective = Objective()
    method: Literal[Trainer, Name] = "end-to-end"
    lora: Lora | None = None  # adapters trained along with the routers; None: the backbone stays as it is
    fit: Fit = Fit()  # of method from-bounds
    bank: BankSection = BankSection()  # of method path-bank
    tokens: TokensSection = TokensSection()  # of method token-plan
    choice: ChoiceSection = ChoiceSection()  # of a method of the field, such as block_influence
    trainer: TrainerSection
    conditions: ConditionsSection = ConditionsSection()
    static: StaticSection = StaticSection()
    tracking: TrackingSection = TrackingSection()
    output: Text = "runs/recipe"

    @property
    def chooses(self) -> bool:
        """Return whether the method is one of the field, which chooses and trains nothing."""
        return self.method not in get_args(Trainer)

    @model_validator(mode="after")
    def _fits_the_method(self) -> Recipe:
        scope = "token" if self.method == "token-plan" else "prompt"
        if (self.method in ("path-bank", "token-plan") or self.chooses) and (
            self.trainer.steps or self.router.scope != scope
        ):
            raise ConfigError(
                f"Recipe: method {self.method}: expected trainer.steps 0 (it takes no gradient) and router.scope "
                f"{scope}, got {self.trainer.steps} and {self.router.scope}"
            )
        if self.method == "end-to-end" and not self.trainer.steps:
            raise ConfigError(
                "Recipe: trainer.steps: expected an integer >= 1 (method end-to-end alone needs them), got 0"
            )
        if self.lora is not None and self.method != "end-to-end":
            raise ConfigError(
                f"Recipe: lora: expected none with method {self.method}, which takes no gradient through the model: "
                "heal the finished run instead (adaskip heal), got a section"
            )
        check_gradient(self.objective, self.router.scope, self.lora is not None)
        if self.static.start and (self.method != "end-to-end" or not self.static.width):
            raise ConfigError(
                "Recipe: static.start: expected false with method from-bounds, whose first round surveys the dense "
                "model, and with static.width 0, which seeks no plan; got true"
            )
        if not self.trainer.steps and self.conditions.on_violation != "warn":
            raise ConfigError(
                "Recipe: conditions.on_violation: expected warn where trainer.steps is 0 (hold and stop act while "
                f"training), got {self.conditions.on_violation!r}"
            )
        return self

    def check_method(self) -> None:
        """Check that sections say what a method of the field leaves out, and hold no layer against its choice.

        Apart from reading, as it loads methods, and with them transformers.

        Raises:
            ConfigError: names the keys.
        """
        if not self.chooses:
            return
        from adaskip.methods.method import find as find_method

        method, group = find_method(self.method), self.router.group
        if group not in method.groups:
            raise ConfigError(
                f"recipe {self.name}: router.group: expected {' or '.join(method.groups)} with method {method.name}, "
                f"got {group!r}"
            )
        empty = method.empty(group, self.router.phase)
        asked = {"router.unit": empty.unit, "router.kv": empty.kv, "conditions.hold_above": None}
        got = (self.router.unit, self.router.kv, self.conditions.hold_above)
        if wrong := [f"{key}={value}" for (key, value), own in zip(asked.items(), got, strict=True) if own != value]:
            raise ConfigError(
                f"recipe {self.name}: method {self.method}: expected {', '.join(wrong).replace('None', 'null')}"
            )


def recipes() -> dict[str, Path]:
    """Find the shipped recipes by name, in folders too: inside an installed package, or at the root of a checkout."""
    package = Path(__file__).parent
    installed = package / "_recipes"
    folder = installed if installed.is_dir() else package.parent / "recipes"
    # those at the root first, by which a comparison trains where none is named
    found = sorted(folder.rglob("*.yaml"), key=lambda path: (len(path.parts), path.stem))
    return {path.stem: path for path in found if path.parent.name != SWEEPS}


def sentence(path: Path) -> str:
    """Read what a recipe says it is: its first line, a comment."""
    with path.open(encoding="utf-8") as lines:
        return next(lines, "").lstrip("# ").strip()


def find(name_or_path: str | Path) -> Path:
    """Find the file of a shipped recipe's name, or of a path.

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


def load(recipe: Recipe | str | Path, overrides: Overrides = ()) -> Recipe:
    """Read a recipe, change single keys of it, and validate.

    A relative `data.source` or `backbone.path` that exists beside the file, or else in the working directory, becomes
    absolute; anything else is left for the Hugging Face hub. A run's own ``recipe.resolved.yaml`` means the folder it
    lies in, wherever that has been moved to or is looked at from.

    Args:
        recipe: a name that `adaskip ls` shows, a YAML file, or a recipe that was loaded before.
        overrides: ``["objective.keep=0.5"]``, with YAML values, or ``{"objective.keep": 0.5}``.

    Raises:
        ConfigError: lists every fault of the file and the overrides, one a line.

    >>> load("digits-vlm", ["objective.keep=0.5"]).objective.keep
    0.5
    >>> load(load("digits-vlm"), {"trainer": {"steps": 10}}).trainer.steps
    10
    """
    if isinstance(recipe, Recipe):
        return _resolved(recipe.model_dump(), overrides, f"recipe {recipe.name}", Path.cwd()) if overrides else recipe
    path = find(recipe)
    raw, problems = read_yaml(path)
    if not isinstance(raw, dict):
        raise _error(f"recipe {path}", problems)
    if path.name == runfiles.RECIPE:
        raw["output"] = str(path.parent)
    return _resolved(raw, overrides, f"recipe {path}", path.parent, path.stem, problems)


def origins(recipe: Recipe, source: str | Path, overrides: Overrides = ()) -> dict[str, str]:
    """Say where each value of a recipe comes from: ``override``, ``FILE:LINE``, or ``default``.

    Args:
        recipe: what `load` made of the other two.
        source: the name or the file that it was read from.
        overrides: that changed it.

    >>> told = origins(load("digits-vlm", ["seed=3"]), "digits-vlm", ["seed=3"])
    >>> told["seed"], told["objective.keep"], told["objective.alpha"]
    ('override', 'digits-vlm.yaml:20', 'default')
    """
    path = find(source)
    lines, changed = key_lines(path), override_keys(overrides)

    def origin(key: str) -> str:
        parts = key.split(".")
        near = [".".join(parts[:depth]) for depth in range(len(parts), 0, -1)]  # the key, and the sections around it
        if any(name in changed for name in near):
            return "override"
        if key in lines:
            return f"{path.name}:{lines[key]}"
        return "default"

    return {key: origin(key) for key in _flat(recipe.model_dump())}


def _flat(values: dict[str, Any], above: str = "") -> Iterator[str]:
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{above}{name}.")
        else:
            yield f"{above}{name}"


def _resolved(
    raw: dict[str, Any], overrides: Overrides, title: str, folder: Path, name: str = "", problems: Sequence[str] = ()
) -> Recipe:
    """Validate plain values with their overrides.

    ``problems`` are the faults that reading has found; relative paths are looked for in ``folder``.
    """
    problems = [*problems, *override(raw, overrides)]
    raw.setdefault("name", name)
    raw.setdefault("output", f"runs/{raw['name']}")
    for section, key in (("data", "source"), ("backbone", "path")):
        if isinstance(values := raw.setdefault(section, {}), dict) and isinstance(values.get(key), str):
            values[key] = _absolute(values[key], folder)
    raw.setdefault("trainer", {})  # so that its required keys are reported one by one
    problems += faults(Recipe, raw)
    if problems:
        raise _error(title, problems)
    return Recipe.model_validate(raw)


def _error(title: str, problems: Sequence[str]) -> ConfigError:
    count = "1 fault" if len(problems) == 1 else f"{len(problems)} faults"
    return ConfigError("\n  ".join([f"{title}: {count}", *problems]))


def dump(recipe: Recipe) -> str:
    """Write the recipe, resolved, as YAML that `load` reads back to an equal recipe."""
    return yaml.safe_dump(recipe.model_dump(), sort_keys=False, allow_unicode=True)


def _absolute(text: str, folder: Path) -> str:
    for base in () if not text or sources.is_shipped(text) else (folder, Path.cwd()):
        if (candidate := base / sources.expanded(text)).exists():
            return str(candidate.resolve())
    return text
