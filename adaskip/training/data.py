"""One place to import a run's data handling from: records, pictures, batches and their order."""

from __future__ import annotations

from adaskip.training.batches import (
    NumberedBatches,
    RoundBatches,
    RoundSampler,
    SharedBatches,
    in_order,
    loader,
    training_loader,
)
from adaskip.training.collate import Collator, append_answers
from adaskip.training.pictures import open_image, pictures_of
from adaskip.training.reading import load_records, read_prompts
from adaskip.training.records import FIELDS, SPLITS, Record, where

__all__ = [
    "FIELDS",
    "SPLITS",
    "Collator",
    "NumberedBatches",
    "Record",
    "RoundBatches",
    "RoundSampler",
    "SharedBatches",
    "append_answers",
    "in_order",
    "load_records",
    "loader",
    "open_image",
    "pictures_of",
    "read_prompts",
    "training_loader",
    "where",
]
