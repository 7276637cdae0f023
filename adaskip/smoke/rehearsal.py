"""A recipe's rehearsal: every section as the recipe has it, on a small random backbone, in a few steps."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig

from adaskip.backbone.published import read_config
from adaskip.errors import BackboneError, ConfigError
from adaskip.ranks import launched
from adaskip.recipe import Recipe, load
from adaskip.smoke.conversations import sentences, write_conversations
from adaskip.smoke.processors import make_processor, make_tokenizer, special_ids
from adaskip.smoke.shrink import LAYERS, shrink
from adaskip.stages import SILENT, Stages

MODEL, DATA, RUN = "model", "data", "run"
"""Folders of a rehearsal: the backbone with its processor, the conversations, and the run that is made of them."""
_STEPS, _ROWS, _PICTURED, _CHOSEN = 4, 8, 0.8, 0.9


def rehearse(recipe: Recipe, resume: bool = False, stages: Stages = SILENT) -> Recipe:
    """Make a small random backbone of a recipe's architecture, and data; return the recipe that trains it in seconds.

    Sections keep what the recipe says. Changed are: the backbone and its place, the data, steps and inputs, devices
    (one, without a strategy), the tolerance of so few inputs, and tracking, which is off. The folder is the recipe's
    ``output`` with ``-smoke`` behind it; what an earlier rehearsal left there is replaced.

    Args:
        recipe: of a backbone that need not be there: a Hugging Face id is enough where its sizes are published with
            the package.
        resume: refused, as each rehearsal begins anew.
        stages: hears what is under way.

    Raises:
        CheckpointError: the backbone's configuration cannot be read.
        BackboneError: the architecture cannot be built so small.
        ConfigError: the folder holds something else; or several processes were started, or an earlier run is to go on.
    """
    if resume or launched()[0] > 1:
        raise ConfigError("--smoke: expected a new run in one process; leave out --resume, and start without torchrun")
    folder = Path(f"{recipe.output.rstrip('/')}-smoke").absolute()
    _clear(folder)
    section = recipe.backbone
    config = read_config(section.path, trust_remote_code=section.trust_remote_code, revision=section.revision)
    with stages(f"making a random {config.model_type} of {LAYERS} layers in {folder}"):
        pictured = _make_backbone(config, folder / MODEL, recipe.seed)
        # where pictures alone are skipped, rows without one would miss the budget
        write_conversations(folder / DATA, pictured, every=1 if recipe.router.group == "vision" else 2)
    if not pictured and config.get_text_config(decoder=True) is not config:
        stages.note(f"the processor of {config.model_type} needs torchvision, which is missing: rehearsing text alone")
    return load(recipe, _changes(recipe, folder))


def _clear(folder: Path) -> None:
    """Remove an earlier rehearsal, and nothing else."""
    found = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if folder.exists() and (not folder.is_dir() or found - {MODEL, DATA, RUN}):
        other = ", ".join(sorted(found - {MODEL, DATA, RUN})[:5]) or "a file of that name"
        raise ConfigError(
            f"{folder}: expected nothing there, or an earlier rehearsal, found {other}; choose another: output=DIR"
        )
    if folder.is_dir():
        shutil.rmtree(folder)


def _make_backbone(config: PreTrainedConfig, folder: Path, seed: int) -> bool:
    """Write model and processor; return whether it is shown pictures."""
    tokenizer = make_tokenizer(config, sentences())
    processor = make_processor(config, tokenizer)
    small = shrink(config, len(tokenizer), special_ids(config, tokenizer))
    sees = type(small) in AutoModelForImageTextToText._model_mapping
    auto: Any = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model = auto.from_config(small)
        except Exception as error:  # whatever a model does not like
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise BackboneError(f"--smoke: {config.model_type} cannot be made small ({first})") from error
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return processor is not tokenizer


def _changes(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Return the keys that a rehearsal has otherwise."""
    trainer, bank = recipe.trainer, recipe.bank
    more: dict[str, Any] = {} if recipe.lora is None else {"lora.rank": 2}
    if recipe.router.group == "vision":  # small pictures have few tokens, so that little can be left out
        more["objective.keep"] = max(recipe.objective.keep, _CHOSEN if recipe.chooses else _PICTURED)
    return more | {
        "output": str(folder / RUN),
        "backbone.path": str(folder / MODEL),
        "backbone.device_map": None,
        "backbone.trust_remote_code": False,
        "backbone.revision": None,
        "data": {
            "source": str(folder / DATA),
            "subset": None,
            "chat": False,
            "max_tokens": None,
            "max_pixels": None,
            "columns": type(recipe.data.columns)().model_dump(),
            "examples": type(recipe.data.examples)().model_dump(),
        },
        "objective.alpha": max(recipe.objective.alpha, 0.1),
        "router.hidden": min(recipe.router.hidden, _ROWS),  # a router must cost less than what it saves here
        "fit": {"rounds": min(recipe.fit.rounds, 2), "examples": 16, "steps": 4, "batch_size": _ROWS},
        "bank": {
            "examples": 20,
            "sample": 8,
            "paths": min(bank.paths, 2),
            "groups": min(bank.groups, 2),
            "deepest": None,
            "entry": min(bank.entry, 1),
            "width": min(bank.width, 2),
        },
        "tokens": {
            "examples": 8,
            "prompt": 2,
            "answer": 2,
            "entry": min(recipe.tokens.entry, 1),
            "band": 1,
            "width": 2,
        },
        "choice.examples": 40,  # half of them calibrate what some methods go by
        "trainer": {
            "steps": min(trainer.steps, _STEPS),
            "batch_size": _ROWS,
            "accelerator": "auto",
            "devices": 1,
            "strategy": "auto",
            "workers": 0,
            "validate_every": 2,
            "checkpoint_every": 2,
            "progress": False,
        },
        "conditions.every": min(recipe.conditions.every, 2),
        "conditions.examples": _ROWS,
        "static.width": min(recipe.static.width, 2),
        "tracking.wandb": "disabled",
    }
