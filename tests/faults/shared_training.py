"""One training of a toy by one process, or by several that share every batch; what each of them ends with.

A program of its own, ``python shared_training.py FOLDER CASE ...``, so that a test can start it once a process.
"""

from __future__ import annotations

import json
import random
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning
import torch
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

import adaskip
from adaskip.training.batches import SharedBatches
from adaskip.training.checkpoints import RoundsBySteps
from adaskip.training.sharding import ShardedBackbone
from tests import toys
from tests.routed_toys import tokenizer
from tests.tuning import GREEDY

ROWS, STEPS, ROUND = 8, 6, 2  # of all processes together; batches of a round
GOAL: dict[str, Any] = {"keep": 0.6, "bound_weight": 0.05, "warmup": 0.5}
CASES: dict[str, dict[str, Any]] = {
    "prompt": {},
    "token": {"router": {"scope": "token"}, "goal": {"price": "calibrated"}},
    "flips": {"goal": {"gradient": "flips"}},
    "held": {"router": {"held": [1]}, "act": "hold", "greedy": 2},
    "accumulated": {"micro": 2},
    "sharded": {"sharded": True, "resumes": True, "lora": find_spec("peft") is not None},
}


def records(count: int, seed: int) -> list[dict[str, Any]]:
    """Prompts and answers of many lengths, so that no two shares of a batch are of the same width."""
    draw, letters = random.Random(seed), "abcdefghijklmnop"
    rows = []
    for _ in range(count):
        words = "".join(draw.choices(letters, k=draw.randint(2, 11)))
        rows.append({"prompt": words, "answer": words[: draw.randint(1, 3)], "kind": words[0]})
    return rows


class Losses(lightning.Callback):
    """Remember the loss of every step, as the process logs it."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        self.values.append(float(trainer.callback_metrics["train/loss"]))


def fit(folder: Path, ranks: int, resumes: bool = False, **options: Any) -> dict[str, Any]:
    """Train in this process, one of so many; several stop and go on with another model where one ``resumes``."""
    if not resumes or ranks == 1:
        return _fit(folder, ranks, **options)
    stored = folder / "at.ckpt"
    first = _fit(folder, ranks, until=4, save=stored, **options)
    rest = _fit(folder, ranks, stored=stored, **options)
    return rest | {"losses": first["losses"] + rest["losses"]}


def _fit(
    folder: Path,
    ranks: int,
    router: dict[str, Any] | None = None,
    goal: dict[str, Any] | None = None,
    act: str = "warn",
    micro: int = 1,
    greedy: int | None = None,
    lora: bool = False,
    sharded: bool = False,
    until: int = STEPS,
    save: Path | None = None,
    stored: Path | None = None,
) -> dict[str, Any]:
    """Train from the start or from a checkpoint; returns what it ends with. No count of records is even."""
    model = adaskip.attach(toys.make("llama", seed=5).model, adaskip.RouterConfig(**(router or {})))
    assert model.routers is not None
    if greedy is not None:  # this layer is skipped for every input, which costs too much
        with torch.no_grad():
            model.routers[greedy].outer.bias.fill_(GREEDY)  # type: ignore[union-attr,operator]
    if lora:
        adaskip.adapt(model, adaskip.Lora(rank=2))
    collate, size = adaskip.Collator(tokenizer()), ROWS // ranks
    train, held_out, calibration = records(29, 1), records(13, 2), records(21, 3)
    tuner = adaskip.RouterTuner(
        model, adaskip.Objective(**(GOAL | (goal or {}))), calibration=[collate(calibration)], kinds="abcdefgh",
        learning_rate=0.03, steps=STEPS,
    )  # fmt: skip
    order = adaskip.RoundBatches(train, size, steps=ROUND, seed=4)
    batches: DataLoader[Any] = DataLoader(train, batch_sampler=order, collate_fn=collate)  # type: ignore[arg-type]
    losses, rounds = Losses(), RoundsBySteps(batches, ROUND // micro, 0 if stored is None else 4)
    check = adaskip.ConditionCheck(
        every=3, examples=13, tolerance=0.01, batches=[collate(held_out)], on_violation=act, folder=folder  # type: ignore[arg-type]
    )  # fmt: skip
    strategy: Any = "auto" if ranks == 1 else ShardedBackbone() if sharded else "ddp"
    trainer = lightning.Trainer(
        max_steps=until, max_epochs=-1, accelerator="cpu", devices=ranks, strategy=strategy, logger=False,
        callbacks=[losses, check, rounds], enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, accumulate_grad_batches=micro,
        use_distributed_sampler=False,
    )  # fmt: skip
    judged: DataLoader[Any] = DataLoader(SharedBatches(held_out, collate, size), batch_size=None)
    trainer.fit(tuner, batches, judged, ckpt_path=stored, weights_only=True if stored else None)
    if save is not None:
        trainer.save_checkpoint(save)
    router_file = model.save_pretrained(folder / "router") / "adaskip_config.json"
    return {
        "losses": losses.values,
        "routers": torch.cat([weight.detach().flatten() for weight in model.routers.parameters()]).tolist(),
        "multiplier": float(tuner.multiplier),
        "held": list(model.policy.held),
        "seen": tuner.keep_by_kind.seen.tolist(),
        "kinds": {kind: row.tolist() for kind, row in tuner.keep_by_kind.compute().items()},
        "validation": {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")},
        "backbone": json.loads(router_file.read_text())["backbone"]["weights"],
        "share": min(_share(weight) for weight in model.spec.layers[0].parameters()),
    }


def _share(weight: torch.Tensor) -> float:
    """Return how much of a weight this process holds."""
    local = weight.to_local() if isinstance(weight, DTensor) else weight
    return local.numel() / weight.numel()


def main(folder: Path, cases: list[str]) -> None:
    warnings.filterwarnings("ignore")
    for name in cases:
        (folder / name).mkdir(exist_ok=True)
        found = fit(folder / name, 2, **CASES[name])
        (folder / name / f"rank{torch.distributed.get_rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
