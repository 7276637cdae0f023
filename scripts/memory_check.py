"""Hold what `adaskip validate` estimates against a few training steps on this machine's CPU: memory and speed.

    python scripts/memory_check.py models/smollm2 --rows 2 --tokens 256

Prints the estimate without weights, the measured growth of the process (Linux), and their ratio; likewise for steps an
hour, after the first. Settings are those of the recipe `--recipe`, the backbone is that of FOLDER.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time

import lightning
import torch
from torch.utils.data import DataLoader

import adaskip
from adaskip.backbone.load import load_backbone
from adaskip.recipe import load
from adaskip.verbs.estimate import estimate


def peak() -> int:
    """Return the most bytes that this process has held so far."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class Ends(lightning.Callback):
    """Note when each step has ended."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_end(self, *_: object) -> None:
        """Note one."""
        self.seconds.append(time.perf_counter())


def main() -> None:
    """Estimate, train three steps, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--recipe", default="smollm2-routers")
    given = parser.parse_args()
    changes = {"trainer.batch_size": given.rows, "data.max_tokens": given.tokens, "backbone.path": given.folder}
    recipe = load(given.recipe, {**changes, "backbone.dtype": "float32", "objective.price": "calibrated"})
    expected = estimate(recipe)
    model = adaskip.attach(load_backbone(given.folder, dtype="float32"), recipe.router)
    ids = torch.randint(16, 1000, (given.rows, given.tokens))
    mask = torch.ones_like(ids)
    prompt = mask.bool()
    prompt[:, -32:] = False
    labels = ids.masked_fill(prompt, -100)
    batch = adaskip.Batch({"input_ids": ids, "attention_mask": mask}, labels, prompt)
    goal = adaskip.Objective(keep=recipe.objective.keep, bound_weight=0.0, price="calibrated")
    tuner = adaskip.RouterTuner(model, goal, steps=3)
    ends = Ends()
    before = peak()
    with tempfile.TemporaryDirectory() as folder:
        trainer = lightning.Trainer(
            max_steps=3, accelerator="cpu", callbacks=[ends], logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
        )  # fmt: skip
        trainer.fit(tuner, DataLoader([batch] * 3, batch_size=None))
    grown = peak() - before
    parts = expected.trained + expected.activations + expected.logits
    figures = {"estimated_gb": parts / 1e9, "measured_gb": grown / 1e9, "ratio": parts / grown, **expected.to_dict()}
    figures["measured_steps_an_hour"] = 3600 * 2 / (ends.seconds[-1] - ends.seconds[0])
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
