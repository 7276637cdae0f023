"""Rows with and without a picture in one file: batches of one sort, every row as often, resumable, on every rank."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from PIL import Image
from torch.utils.data import BatchSampler, DataLoader

import adaskip
from adaskip.errors import ConfigError, DataError
from adaskip.policies.learned.config import RouterConfig
from adaskip.recipe import load
from adaskip.training import batches, fit_run
from adaskip.training.batches import padding_share
from adaskip.training.data import Collator, RoundBatches, RoundSampler, in_order, loader, training_loader
from adaskip.training.token_counts import TokenCounts
from adaskip.verbs.train import train
from tests import toys
from tests.faults.runs import SHORT
from tests.processors import picture_processor

PICTURE = Image.new("RGB", (16, 16), "red")


def records(pictured: int, text: int) -> list[dict[str, Any]]:
    """Rows of both sorts in turns, the rest at the end; the answer is the row's number."""
    rows = []
    for i in range(max(pictured, text)):
        rows += [{"prompt": "<image> w1", "image": PICTURE}] * (i < pictured) + [{"prompt": "w2 w3"}] * (i < text)
    return [row | {"answer": f"w{i}", "kind": "k"} for i, row in enumerate(rows)]


def ranks(monkeypatch: pytest.MonkeyPatch, count: int, rank: int) -> None:
    monkeypatch.setattr(batches, "_processes", lambda: (count, rank))


def one_sort(rows: list[dict], batch: list[int]) -> bool:
    return len({"image" in rows[i] for i in batch}) == 1


@pytest.mark.parametrize(("pictured", "text"), [(10, 10), (23, 4), (1, 30), (3, 200)])
def test_every_row_once_a_sweep_in_batches_of_one_sort(pictured: int, text: int) -> None:
    """Without it a processor refuses some shuffled batch in the middle of training."""
    rows = records(pictured, text)
    sampler = RoundBatches(rows, 8, seed=3)
    orders = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        found = list(sampler)
        assert len(found) == len(sampler)
        assert all(one_sort(rows, batch) and 1 <= len(batch) <= 8 for batch in found)
        assert sorted(i for batch in found for i in batch) == list(range(len(rows)))
        orders.append(found)
    assert orders[0] != orders[1]
    assert list(RoundBatches(rows, 8, seed=4)) != orders[0]


def test_rounds_are_one_stream_and_resume() -> None:
    """A round of a resumed run holds the batches that the uninterrupted run read in it."""
    rows = records(13, 21)
    per_sweep, sampler = len(RoundBatches(rows, 4)), RoundBatches(rows, 4, steps=5, seed=1)
    stream = []
    for epoch in range(per_sweep):
        sampler.set_epoch(epoch)
        stream += list(sampler)
    for start in range(0, len(stream), per_sweep):
        assert sorted(i for batch in stream[start : start + per_sweep] for i in batch) == list(range(34))
    again = RoundBatches(rows, 4, steps=5, seed=1)
    again.set_epoch(2)
    assert list(again) == stream[10:15]


def test_rows_of_a_length_come_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch rows that are lost or doubled by sorting, one order for every sweep, padding that does not shrink,
    short batches before long ones, and a resume or a second process that reads others.
    """
    rows, draw = records(150, 350), torch.Generator().manual_seed(0)
    lengths = torch.randint(5, 200, (500,), generator=draw)

    def padding(found: list[list[int]]) -> float:
        return sum(float(lengths[batch].max() * len(batch) - lengths[batch].sum()) for batch in found)

    plain, sorted_ = (RoundBatches(rows, 8, seed=3, lengths=given) for given in (None, lengths.tolist()))
    sweeps = []
    for epoch in range(2):
        sorted_.set_epoch(epoch)
        found = list(sorted_)
        assert all(one_sort(rows, batch) and 1 <= len(batch) <= 8 for batch in found)
        assert sorted(i for batch in found for i in batch) == list(range(500))
        assert padding(found) < 0.15 * padding(list(plain))
        first = [float(lengths[batch].float().mean()) for batch in found]
        assert first != sorted(first)
        sweeps.append(found)
    assert {frozenset(batch) for batch in sweeps[0]} != {frozenset(batch) for batch in sweeps[1]}
    rounds = RoundBatches(rows, 8, steps=7, seed=3, lengths=lengths.tolist())
    rounds.set_epoch(3)
    assert list(rounds) == sweeps[0][21:28]
    shares = []
    for rank in range(2):
        ranks(monkeypatch, 2, rank)
        sorted_ = RoundBatches(rows, 4, seed=3, lengths=lengths.tolist())
        shares.append(list(sorted_))
    assert [sorted(one + two) for one, two in zip(*shares, strict=True)] == [sorted(batch) for batch in sweeps[0]]
    with pytest.raises(ConfigError, match="lengths: expected one for each of 500 records, got 3"):
        RoundBatches(rows, 8, lengths=[1, 2, 3])


def test_a_recipe_groups_by_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch a key that nothing reads."""
    given: list[Any] = []

    class Spy(RoundBatches):
        def __init__(self, rows: Any, *arguments: Any) -> None:
            super().__init__(rows, *arguments)
            given.append(self.lengths)

    monkeypatch.setattr(batches, "RoundBatches", Spy)
    asked = [*SHORT, "trainer.steps=4", "data.group_by_length=true", f"output={tmp_path / 'run'}"]
    train(load("digits-vlm", asked))
    assert len(given) == 1
    assert len(given[0]) == 130


def test_lengths_are_counted_as_the_collator_makes_them() -> None:
    """Would catch: lengths of characters, of prompts without answers, and an order that training does not follow."""
    rows = [{"prompt": "w1 " * (1 + i % 9), "answer": "w2"} for i in range(64)]
    batches = training_loader(rows, Collator(picture_processor()), 8, 64, seed=1, by_length=True)
    plain = training_loader(rows, Collator(picture_processor()), 8, 64, seed=1)
    widths = [[b.labels.numel() - int(b.inputs["attention_mask"].sum()) for b in kind] for kind in (batches, plain)]
    assert sum(widths[0]) < 0.5 * sum(widths[1])


@pytest.mark.parametrize("by_length", [False, True])
def test_the_padding_that_is_told_is_what_batches_have(by_length: bool) -> None:
    """Would catch lengths without answers, batches of another order, and a mean over batches of unequal width."""
    rows = [row | {"prompt": row["prompt"] + " w1" * (i % 7)} for i, row in enumerate(records(9, 40))]
    collate = Collator(picture_processor())
    lengths = [prompt + rest for prompt, rest in TokenCounts(collate)(rows)]
    masks = [
        collate([rows[i] for i in batch]).inputs["attention_mask"].double()
        for batch in RoundBatches(rows, 4, seed=1, lengths=lengths if by_length else None)
    ]
    empty = sum(float((1 - mask).sum()) for mask in masks) / sum(mask.numel() for mask in masks)
    assert padding_share(rows, lengths, 4, 1, by_length) == pytest.approx(empty)
    assert 0 < empty < 0.5


@pytest.mark.parametrize("count", [2, 3])
def test_ranks_share_the_rows(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Every process does as many steps, with the same sort of rows at each, and reads rows of its own."""
    rows, found = records(13, 22), []
    for rank in range(count):
        ranks(monkeypatch, count, rank)
        found.append(list(RoundBatches(rows, 3, seed=2)))
    assert len({len(share) for share in found}) == 1
    for step in zip(*found, strict=True):
        together = [i for batch in step for i in batch]
        assert one_sort(rows, together)
        assert all(1 <= len(batch) <= 3 for batch in step)
    counts = Counter(i for share in found for batch in share for i in batch)
    assert set(counts) == set(range(35))
    assert sum(n - 1 for n in counts.values()) < count  # rows repeated so that no rank is left without any


def test_more_ranks_than_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """One picture for four processes: each gets it."""
    for rank in range(4):
        ranks(monkeypatch, 4, rank)
        assert all(batch for batch in RoundBatches(records(1, 9), 2))


@pytest.mark.parametrize(("pictured", "text"), [(20, 0), (0, 20)])
def test_rows_of_one_sort_are_read_as_ever(pictured: int, text: int) -> None:
    """Data without mixing trains on exactly the batches of earlier versions: those of `RoundSampler`."""
    rows = records(pictured, text)
    read = training_loader(rows, Collator(picture_processor()), 4, 12, 7)
    for epoch in range(3):
        before = RoundSampler(20, 12, 7)
        before.set_epoch(epoch)
        read.sampler.set_epoch(epoch)
        expected = [[rows[i]["answer"] for i in batch] for batch in BatchSampler(before, 4, False)]
        assert [batch.answer for batch in read] == expected
    assert [len(batch.answer) for batch in loader(rows, Collator(picture_processor()), 8)] == [8, 8, 4]


def test_lightning_moves_a_mixed_loader_to_its_round() -> None:
    """Lightning sets the epoch of a loader's samplers; a batch sampler without it would repeat the first round."""
    from lightning.fabric.utilities.data import _set_sampler_epoch

    rows = records(9, 9)
    read = training_loader(rows, Collator(picture_processor()), 2, 6, 0)
    first = [batch.answer for batch in read]
    _set_sampler_epoch(read, 1)
    second = [batch.answer for batch in read]
    assert len(first) == len(second) == 3
    assert not {a for batch in first for a in batch} & {a for batch in second for a in batch}


def test_in_order_spreads_both_sorts() -> None:
    """Who calibrates on the first half of the inputs and judges on the second finds both sorts in each."""
    rows = records(40, 24)[::-1]
    cut = in_order(rows, 16)
    assert all(one_sort(rows, batch) for batch in cut)
    flat = [i for batch in cut for i in batch]
    assert sorted(flat) == list(range(64))
    assert [sum("image" in rows[i] for i in flat[k : k + 16]) for k in range(0, 64, 16)] == [10] * 4
    for sort in (True, False):
        own = [i for i in flat if ("image" in rows[i]) == sort]
        assert own == sorted(own)
    assert in_order(rows, 100) == in_order(rows, 100)
    assert in_order(records(5, 0), 2) == [[0, 1], [2, 3], [4]]


def test_a_batch_of_both_sorts_where_the_processor_takes_it() -> None:
    """A loader of one's own may mix rows; a row without a picture gets none, and its logits are its own."""
    collate = Collator(picture_processor())
    rows = records(2, 1)
    together, alone = collate(rows), collate(rows[1:2])
    assert len(together.inputs["pixel_values"]) == 2
    model = toys.make("llava").model
    with torch.no_grad():
        mixed, single = (model(**batch.inputs).logits for batch in (together, alone))
    assert torch.allclose(mixed[1, -2:], single[0, -2:], atol=1e-4)


def test_a_processor_that_takes_no_such_batch_is_told_of_batches() -> None:
    """The error says what to type: a batch sampler that keeps the sorts apart."""
    processor = picture_processor()
    process = type(processor).__call__

    class Strict(type(processor)):  # type: ignore[misc]
        def __call__(self, images: Any = None, **options: Any) -> Any:
            if images is not None and not all(images):
                raise IndexError("list index out of range")
            return process(self, images=images, **options)

    processor.__class__ = Strict
    rows, collate = records(3, 3), Collator(processor)
    with pytest.raises(
        DataError, match=r"3 of 6 records have an image, .*\(list index out of range\); .*adaskip\.RoundBatches"
    ):
        collate(rows)
    found = list(DataLoader(rows, batch_sampler=adaskip.RoundBatches(rows, 2), collate_fn=collate))
    assert sorted(answer for batch in found for answer in batch.answer) == [f"w{i}" for i in range(6)]


def test_nothing_to_batch() -> None:
    with pytest.raises(ConfigError, match="expected records and a batch_size of at least 1, got 0 and 4"):
        RoundBatches([], 4)


def test_training_on_both_sorts(tmp_path: Path) -> None:
    """A LLaVA trains, validates and checks its conditions on rows with and without pictures."""
    rows, collate = records(12, 12), Collator(picture_processor())
    model = adaskip.attach(toys.make("llava").model, RouterConfig(group="all"))
    objective = adaskip.Objective(keep=0.5, bound_weight=0.0)
    tuner = adaskip.RouterTuner(model, objective, steps=4, kinds=("k",))
    trainer = lightning.Trainer(
        max_steps=4,
        max_epochs=-1,
        accelerator="cpu",
        callbacks=[adaskip.ConditionCheck(every=0, examples=24)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(tuner, training_loader(rows, collate, 4, 12, 0), loader(rows, collate, 4))
    assert trainer.global_step == 4
    assert torch.isfinite(trainer.callback_metrics["train/loss"])


def test_a_fit_from_bounds_draws_both_sorts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The survey of method from-bounds cuts its draw into batches as well."""
    model = adaskip.attach(toys.make("llava").model, RouterConfig(group="all"))
    seen = []
    collate = Collator(picture_processor())

    def watched(rows: list) -> Any:
        seen.append([*rows])
        return collate(rows)

    fit = fit_run.Fit(rounds=1, examples=16, steps=2)
    fit_run.fit_in_folder(model, adaskip.Objective(keep=0.5), fit, records(8, 8), watched, tmp_path, 0)  # type: ignore[arg-type]
    assert all(len({"image" in row for row in rows}) == 1 for rows in seen)
    assert sum(map(len, seen)) == 16


def test_a_mixed_file(tmp_path: Path) -> None:
    """From the file on: rows without an image field, with null and with an empty text train beside pictures."""
    PICTURE.save(tmp_path / "a.png")
    rows = [
        {"prompt": "<image> w1", "answer": "w2", "image": "a.png"},
        {"prompt": "w1", "answer": "w2"},
        {"prompt": "w1", "answer": "w2", "image": None},
        {"prompt": "w1", "answer": "w2", "image": ""},
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    read = adaskip.training.data.load_records(str(tmp_path), "train", None, 0)
    assert ["image" in record for record in read] == [True, False, False, False]
    assert sorted(len(batch.answer) for batch in training_loader(read, Collator(picture_processor()), 4, 8, 0)) == [
        1,
        3,
    ]
