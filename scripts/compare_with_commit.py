"""Train the demo's routers with this tree and with an earlier commit, and tell whether they end bitwise the same.

    python scripts/compare_with_commit.py COMMIT [key=value ...]

For changes that only move code. Both runs take the same overrides; without any, a short training of digits-vlm that
goes through pricing, training, looks at the conditions and the threshold search. A difference exits 1.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

ROOT = Path(__file__).parents[1]
SHORT = [
    "trainer.steps=24",
    "trainer.checkpoint_every=8",
    "trainer.validate_every=8",
    "trainer.batch_size=8",
    "conditions.every=12",
    "data.examples.train=240",
    "data.examples.validation=80",
    "data.examples.calibration=80",
    "conditions.examples=48",
]
COMPARED = ("prices.json", "summary.json")
SECONDS = ("seconds", "_s", "wall", "time", "memory", "peak")
"""What no two runs share, by the end of its name."""


def train(tree: Path, output: Path, overrides: list[str]) -> None:
    """Train in a process of its own that sees the tree's package first."""
    command = [
        sys.executable,
        "-m",
        "adaskip.cli",
        "train",
        "digits-vlm",
        f"output={output}",
        "tracking.wandb=disabled",
        *overrides,
    ]
    env = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True)
    if not (output / "router" / "router.safetensors").is_file():
        sys.exit(f"{tree}: training failed\n{done.stderr[-2000:]}")


def routers(run: Path) -> dict[str, Tensor]:
    """Return a run's routers by layer and weight, as every file format since the first calls them."""
    learned = run / "router-learned"  # where routers trained so briefly did not beat a static plan
    weights = load_file((learned if learned.is_dir() else run / "router") / "router.safetensors")
    return {name.removeprefix("heads."): w for name, w in weights.items() if not name.startswith("backbone.")}


def figures(value: object, name: str = "") -> dict[str, object]:
    """Return the leaves of a JSON value by their path, but for times."""
    if isinstance(value, dict):
        return {k: v for key, part in value.items() for k, v in figures(part, f"{name}.{key}").items()}
    if isinstance(value, list):
        return {k: v for i, part in enumerate(value) for k, v in figures(part, f"{name}[{i}]").items()}
    return {} if name.endswith(SECONDS) else {name: value}


def main() -> None:
    """Compare this tree with the commit that is named."""
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    commit, overrides = sys.argv[1], sys.argv[2:] or SHORT
    with tempfile.TemporaryDirectory() as folder:
        old, runs = Path(folder) / "tree", [Path(folder) / name for name in ("before", "after")]
        subprocess.run(["git", "worktree", "add", "--detach", "--quiet", str(old), commit], cwd=ROOT, check=True)
        try:
            for tree, run in zip((old, ROOT), runs, strict=True):
                train(tree, run, overrides)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(old)], cwd=ROOT, check=True)
        before, after = map(routers, runs)
        moved = sorted(n for n in before.keys() | after.keys() if n not in before or n not in after)
        moved += sorted(n for n in before.keys() & after.keys() if not before[n].equal(after[n]))
        other = []
        for name in COMPARED:
            values = [figures(json.loads((run / name).read_text())) for run in runs if (run / name).is_file()]
            if len(values) == 2:
                shared = values[0].keys() & values[1].keys()
                other += [f"{name}{key}" for key in sorted(shared) if values[0][key] != values[1][key]]
    print(f"{len(before)} weights, {len(moved)} differ: {', '.join(moved[:5]) or 'none'}")
    print(f"figures of {', '.join(COMPARED)} that differ: {', '.join(other[:10]) or 'none'}")
    sys.exit(1 if moved else 0)


if __name__ == "__main__":
    main()
