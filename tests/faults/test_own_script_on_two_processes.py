"""A user's own script with `RouterTuner` under DDP: two processes on the CPU end alike, and write each file once."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = """
import json, sys, warnings
warnings.filterwarnings("ignore")
from pathlib import Path
import lightning, torch
from torch.utils.data import DataLoader
import adaskip
from tests.unit.test_callbacks import GREEDY, eager
from tests.unit.test_training import batches

def main(folder, options):
    data = batches(40)
    model = eager({1: GREEDY})  # it skips a costly layer for every input
    model.hold(options["held"])
    goal = adaskip.Objective(keep=0.6, bound_weight=0.01)
    rank = int(__import__("os").environ.get("LOCAL_RANK", 0))
    mine = data[24 + 2 * rank : 28 + 2 * rank]  # ranks that read other calibration data end with the same prices
    tuner = adaskip.RouterTuner(model, goal, calibration=mine, kinds=["even", "odd"], learning_rate=0.01, steps=16)
    check = adaskip.ConditionCheck(every=2, examples=32, tolerance=0.01, on_violation=options["act"], folder=folder)
    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", devices=2, strategy=options["strategy"], logger=False, callbacks=[check],
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        accumulate_grad_batches=options["micro"],
    )
    whole = dict(batch_size=None)
    trainer.fit(tuner, DataLoader(data[:16], **whole), DataLoader(data[16:24], **whole))
    found = {
        "step": trainer.global_step,
        "weights": [weight.double().sum().item() for weight in model.routers.parameters()],
        "multiplier": tuner.multiplier.item(),
        "prices": tuner.prices.shift.tolist(),
        "held": list(model.config.held),
        "stopped": check.stopped,
        "looked": check.look.to_dict(),
        "val": {k: v.item() for k, v in trainer.callback_metrics.items() if k.startswith("val/")},
        "kinds": {kind: row.tolist() for kind, row in tuner.keep_by_kind.compute().items()},
        "counted": tuner.keep_by_kind.seen.tolist(),
    }
    (folder / f"rank{trainer.global_rank}.json").write_text(json.dumps(found))

if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
"""


def run(tmp_path: Path, **options: Any) -> list[dict[str, Any]]:
    """What both ranks say at the end."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    settings = {"strategy": "ddp", "held": [], "act": "warn", "micro": 1} | options
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    root = str(Path(__file__).parents[2])
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "TORCHELASTIC_RUN_ID": "test",  # as torchrun starts them
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), str(tmp_path), json.dumps(settings)],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0", "LOCAL_WORLD_SIZE": "2"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=120)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0, 0], "\n".join(text[-2000:] for text in said)
    return [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"held": [0]}, 16),
        ({"micro": 4, "strategy": "ddp_find_unused_parameters_true"}, 4),
        ({"act": "hold"}, 16),
        ({"act": "stop"}, 2),
    ],
    ids=["held", "accumulated", "hold", "stop"],
)
def test_both_processes_end_alike(options: dict[str, Any], steps: int, tmp_path: Path) -> None:
    """Shared memory reduced in place, prices or verdicts of each rank's own, or one rank that stops alone, end here."""
    one, other = run(tmp_path, **options)
    kinds = one.pop("kinds"), other.pop("kinds")
    assert one.pop("counted") != [0, 0, 0]
    other.pop("counted")
    assert one == other
    assert one["step"] == steps
    assert kinds[0] == kinds[1]
    assert one["multiplier"] >= 0
    lines = [json.loads(line) for line in (tmp_path / "conditions.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(2, steps + 1, 2))  # written once, not by both
    assert lines[-1] == one["looked"]
    assert one["held"] == ([1] if options.get("act") == "hold" else options.get("held", []))
    assert (one["stopped"] is not None) == (options.get("act") == "stop")
