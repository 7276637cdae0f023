"""What tests of training share: toy batches, models with a layer that is redundant, a silent trainer."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import lightning
import torch
from torch.utils.data import DataLoader

import adaskip
from adaskip import Batch
from tests import toys

WHOLE: dict[str, Any] = {"batch_size": None}  # the items are batches already
GREEDY = -3.0  # a bias at which a router skips its layer for every input


def batches(count: int, rows: int = 8) -> list[Batch]:
    """Prompts of tokens 10..89 whose answer repeats the first token."""
    found = []
    toy = toys.Toy(None, images=False, qwen=False)  # type: ignore[arg-type]
    for i in range(count):
        inputs = toy.batch([random.Random(i * rows + j).randint(3, 7) for j in range(rows)], seed=i)
        first = inputs["input_ids"][torch.arange(rows), (inputs["attention_mask"] == 0).sum(1)]
        prompt = inputs["attention_mask"].bool()
        labels = torch.cat([torch.full_like(inputs["input_ids"], -100), first[:, None]], 1)
        inputs = {
            "input_ids": torch.cat([inputs["input_ids"], first[:, None]], 1),
            "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1),
        }
        found.append(
            Batch(
                inputs,
                labels,
                prompt_mask=torch.nn.functional.pad(prompt, (0, 1)),
                kind=["even" if int(t) % 2 == 0 else "odd" for t in first],
            )
        )
    return found


DATA = batches(12)  # 0 to 3 train, 4 to 7 validate, 8 to 11 calibrate


def loader(rows: list[Any]) -> DataLoader[Any]:
    return DataLoader(rows, **WHOLE)  # type: ignore[arg-type]


def trainer(tmp_path: Path, steps: int = 2, saves: bool = False, **options: Any) -> lightning.Trainer:
    return lightning.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=saves,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        **options,
    )


def weights(tuner: adaskip.RouterTuner) -> torch.Tensor:
    return torch.cat([weight.detach().flatten() for weight in tuner.model.routers.parameters()])


def with_answers(inputs: dict[str, torch.Tensor]) -> Batch:
    """The last token of each prompt is its answer."""
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -1] = inputs["input_ids"][:, -1]
    prompt = inputs["attention_mask"].bool()
    prompt[:, -1] = False
    return Batch(inputs, labels, prompt)


def planted(scale: float) -> Any:
    """A toy whose layer 2 writes (almost) nothing."""
    toy = toys.make("llama", seed=5)
    layer = toy.model.model.layers[2]
    with torch.no_grad():
        layer.self_attn.o_proj.weight.mul_(scale)
        layer.mlp.down_proj.weight.mul_(scale)
    return adaskip.attach(toy.model)


def eager(skips: dict[int, float]) -> adaskip.RoutedModel:
    """A toy whose layer 2 is redundant, with routers that skip the given layers for every input."""
    model = planted(0.0)
    with torch.no_grad():
        for layer, bias in skips.items():
            model.routers[layer].outer.weight.zero_()
            model.routers[layer].outer.bias.fill_(bias)
    return model
