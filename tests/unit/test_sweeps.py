"""Sweeps that ship: `wandb sweep` takes them, recipes know their keys, and every trial has a folder of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from adaskip.recipe import load, recipes
from tests.wandb_server import KEY, serving

FOLDER = Path(__file__).parents[2] / "recipes" / "sweeps"
SHIPPED = sorted(FOLDER.glob("*.yaml"))


def values(parameter: dict[str, Any]) -> list[Any]:
    """All that a parameter may be, or its two ends."""
    return parameter["values"] if "values" in parameter else [parameter["min"], parameter["max"]]


def test_some_ship_and_none_is_a_recipe() -> None:
    assert [path.stem for path in SHIPPED] == ["budgets", "digits-vlm"]
    assert not {path for path in recipes().values() if path.parent == FOLDER}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_trial_is_a_command_that_adaskip_takes(path: Path, tmp_path: Path) -> None:
    """Would catch: a key that no recipe has, a value out of its range, a second trial in the first one's folder."""
    sweep = yaml.safe_load(path.read_text())
    folders = set()
    for number in range(max(len(values(one)) for one in sweep["parameters"].values())):
        trial = {key: {"value": values(one)[number % len(values(one))]} for key, one in sweep["parameters"].items()}
        macros = create_sweep_command_args({"args": trial})
        words = [macros["args_no_hyphens"] if w == "${args_no_hyphens}" else [w] for w in sweep["command"]]
        stub = tmp_path / "adaskip"
        stub.write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n")
        stub.chmod(0o755)
        done = subprocess.run(
            create_sweep_command([*chain.from_iterable(words)]),
            env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "WANDB_RUN_ID": f"trial{number}"},
            capture_output=True,
            check=True,
        )
        verb, name, *overrides = json.loads(done.stdout)
        assert verb == "train"
        recipe = load(name, overrides)
        assert recipe.tracking.wandb == "online"
        assert len(overrides) == 2 + len(trial)
        folders.add(recipe.output)
    assert len(folders) == number + 1


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_wandb_takes_it(path: Path, tmp_path: Path) -> None:
    """Would catch: a file that `wandb sweep` refuses, or warns of."""
    with serving() as server:
        names = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY, "HOME": str(tmp_path), "WANDB_DIR": str(tmp_path)}
        words = [sys.executable, "-m", "wandb", "sweep", "--project", "x", "--entity", "me", str(path)]
        done = subprocess.run(words, env=os.environ | names, capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0, done.stderr
        (sent,) = [json.dumps(values) for operation, values in server.asked if operation == "UpsertSweep"]
    assert "warn" not in done.stderr.lower(), done.stderr
    assert "args_no_hyphens" in sent
