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

OPTIONS: dict[str, dict[str, Any]] = {
    "held": {"held": [0]},
    "accumulated": {"micro": 4, "strategy": "ddp_find_unused_parameters_true"},
    "hold": {"act": "hold"},
    "stop": {"act": "stop"},
}
STEPS = {"held": 8, "accumulated": 4, "hold": 8, "stop": 4}
SCRIPT = """
import json, sys, warnings
warnings.filterwarnings("ignore")
from pathlib import Path
import lightning, os, torch
from torch.utils.data import DataLoader
import adaskip
from tests.tuning import GREEDY, batches, eager

DATA, WHOLE = batches(40), dict(batch_size=None)

def main(folder, held=(), act="warn", micro=1, strategy="ddp"):
    folder.mkdir(exist_ok=True)
    model = eager({1: GREEDY})  # it skips a costly layer for every input
    model.hold(held)
    goal = adaskip.Objective(keep=0.6, bound_weight=0.01)
    rank = int(os.environ["LOCAL_RANK"])
    mine = DATA[24 + 2 * rank : 28 + 2 * rank]  # ranks that read other calibration data end with the same prices
    tuner = adaskip.RouterTuner(model, goal, calibration=mine, kinds=["even"], learning_rate=0.01)
    check = adaskip.ConditionCheck(every=4, examples=32, tolerance=0.01, on_violation=act, folder=folder)
    trainer = lightning.Trainer(
        max_epochs=2 if micro > 1 else 1, accelerator="cpu", devices=2, strategy=strategy, logger=False,
        callbacks=[check], enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0, accumulate_grad_batches=micro,
    )
    trainer.fit(tuner, DataLoader(DATA[:16], **WHOLE), DataLoader(DATA[16:24], **WHOLE))
    found = {
        "step": trainer.global_step,
        "weights": [weight.double().sum().item() for weight in model.routers.parameters()],
        "multiplier": tuner.multiplier.item(),
        "prices": tuner.prices.shift.tolist(),
        "held": list(model.policy.held),
        "stopped": check.stopped,
        "looked": check.look.to_dict(),
        "val": {k: v.item() for k, v in trainer.callback_metrics.items() if k.startswith("val/")},
        "kinds": {kind: row.tolist() for kind, row in tuner.keep_by_kind.compute().items()},
    }
    (folder / f"rank{trainer.global_rank}.json").write_text(json.dumps(found))

if __name__ == "__main__":
    for name, options in json.loads(sys.argv[2]).items():
        main(Path(sys.argv[1]) / name, **options)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where both ranks left what they ended with, a folder for each kind of run."""
    folder = tmp_path_factory.mktemp("ranks")
    script = folder / "script.py"
    script.write_text(SCRIPT)
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
            [sys.executable, str(script), str(folder), json.dumps(OPTIONS)],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0", "LOCAL_WORLD_SIZE": "2"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=240)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0, 0], "\n".join(text[-3000:] for text in said)
    return folder


@pytest.mark.parametrize("name", OPTIONS)
def test_both_processes_end_alike(name: str, folder: Path) -> None:
    """Shared memory reduced in place, prices or verdicts of each rank's own, or one rank that stops alone, end here."""
    options, steps = OPTIONS[name], STEPS[name]
    one, other = (json.loads((folder / name / f"rank{rank}.json").read_text()) for rank in range(2))
    assert one == other
    assert one["step"] == steps
    assert name == "stop" or set(one["kinds"]) == {"even", "other"}
    lines = [json.loads(line) for line in (folder / name / "conditions.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(4, steps + 1, 4))  # written once, not by both
    assert lines[-1] == one["looked"]
    assert set(one["held"]) >= ({1} if options.get("act") == "hold" else set(options.get("held", [])))
    assert (one["stopped"] is not None) == (options.get("act") == "stop")
