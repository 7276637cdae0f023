"""`make gpu`, rehearsed on the CPU: whoever has a GPU for minutes only cannot mend the script there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SCRIPT = [sys.executable, "scripts/gpu_check.py"]
PARTS = ["tests", "syncs", "prefill", "decode", "graph", "qwen", "training"]


def run(*options: str) -> subprocess.CompletedProcess[str]:
    around = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([*SCRIPT, *options], cwd=ROOT, env=around, capture_output=True, text=True)


def read(folder: Path) -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in folder.iterdir()}


def test_every_part_writes_its_figures_and_is_gone_on_with(tmp_path: Path) -> None:
    """All parts once; then one that lost a step, which alone is measured again."""
    done = run("--dry-run", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    records = read(tmp_path)
    assert records.keys() == {*PARTS}
    for name, record in records.items():
        assert not record["failed"], name
        assert not record["not_run"], name
        assert [*record["found"]] == record["steps"], name
        assert all(record["found"].values()), name
        assert record["environment"]["device"] == "cpu"
        assert record["environment"]["dry_run"] is True
    assert records["tests"]["found"]["marked gpu"][0]["tests"] >= 1
    assert {row["model"] for row in records["syncs"]["found"]["batch 2"]} >= {"dense", "plan", "routers, mixed"}
    assert all(row["routed_s"] > 0 for rows in records["decode"]["found"].values() for row in rows)
    lost = records["graph"]
    step, _ = lost["found"].popitem()
    (tmp_path / "graph.json").write_text(json.dumps(lost), encoding="utf-8")
    again = run("--dry-run", "--out", str(tmp_path))
    assert again.returncode == 0, again.stderr
    assert [line.split(" (")[0] for line in again.stderr.splitlines() if " s left)" in line] == [f"graph: {step}"]
    now = read(tmp_path)
    assert now["graph"]["found"].keys() == {*lost["found"], step}
    assert all(now[name] == records[name] for name in PARTS if name != "graph")


def test_what_time_did_not_allow_is_named(tmp_path: Path) -> None:
    done = run("--dry-run", "--out", str(tmp_path), "--minutes", "0")
    assert done.returncode == 0, done.stderr
    for record in read(tmp_path).values():
        assert record["not_run"] == record["steps"]
        assert not record["found"]
    assert "marked gpu: not run" in done.stdout


def test_a_cpu_makes_no_figures_of_a_gpu() -> None:
    for options, told in (
        ((), "no GPU was found here; --dry-run tries all parts on the CPU"),
        (("--dry-run", "--out", "benchmarks/gpu"), "figures of GPUs lie there; expected another folder"),
    ):
        done = run(*options)
        assert done.returncode == 2
        assert told in done.stderr
    assert not list((ROOT / "benchmarks" / "gpu").glob("*.part"))
