"""`adaskip.Batch`: what it refuses, which positions it scores, and how it travels to workers and devices."""

from __future__ import annotations

import copy
import pickle
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch.plugins.precision import DoublePrecision
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data._utils.pin_memory import pin_memory

import adaskip
from adaskip import Batch
from adaskip.batch import IGNORED, exact_match
from adaskip.errors import DataError
from tests.tuning import DATA, loader, planted, trainer

IDS = torch.tensor([[0, 11, 12, 21, 22], [13, 14, 15, 16, 23]])  # answers begin with 2
BATCH = Batch(
    {"input_ids": IDS, "pixel_values": [torch.ones(1, 2), torch.zeros(3, 2)], "sizes": {"rows": torch.ones(2)}, "n": 2},
    IDS.masked_fill(IDS < 20, IGNORED),
    (IDS > 0) & (IDS < 20),
    answer=["21 22", "23"],
)


def tensors(value: Any) -> list[Tensor]:
    """All tensors of a batch, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Batch):
        return [x for f in fields(value) for x in tensors(getattr(value, f.name))]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [x for part in parts for x in tensors(part)]


def same(one: Batch, other: Batch) -> bool:
    pairs = list(zip(tensors(one), tensors(other), strict=True))
    texts = (one.kind, one.answer, one.answer_values) == (other.kind, other.answer, other.answer_values)
    return texts and all(a.equal(b) and a.dtype == b.dtype for a, b in pairs)


def test_supervised_positions_are_those_whose_next_token_is_scored() -> None:
    """Compared with a loop over rows and positions."""
    for batch in (BATCH, *DATA[:2]):
        rows, length = batch.labels.shape
        expected = [[int(batch.labels[i, t + 1]) != -100 for t in range(length - 1)] for i in range(rows)]
        assert batch.supervised.tolist() == expected
        assert batch.supervised.any()
    assert len(BATCH) == 2


def test_a_row_matches_when_each_scored_token_is_the_likeliest() -> None:
    logits = torch.nn.functional.one_hot(IDS.roll(-1, 1), 30).float()  # each position predicts its next token
    assert exact_match(logits, BATCH.labels).tolist() == [True, True]
    logits[0, 0], logits[1, 3] = 0.0, 0.0  # of row 0 a token of the prompt, of row 1 the answer
    assert exact_match(logits, BATCH.labels).tolist() == [True, False]


def test_arguments_are_what_the_model_takes() -> None:
    batch, model = DATA[0], planted(1.0).eval()
    for head in model.routers:
        torch.nn.init.normal_(head.outer.weight)
    decided = []
    for given in ({"prompt_mask": batch.prompt_mask, "use_cache": False}, {}):
        model(**batch.inputs, **given)
        decided.append(model.routing.logits)
    assert model(**batch.arguments()).past_key_values is None
    assert model.routing.logits.equal(decided[0])
    assert not model.routing.logits.equal(decided[1])  # of routers that read the answers as well


@pytest.mark.parametrize("move", [lambda batch: batch.to("meta"), lambda batch: move_data_to_device(batch, "meta")])
def test_all_tensors_move_and_keep_their_types(move: Any) -> None:
    """By hand and by Lightning, lists of pictures too; ``meta`` stands for a GPU."""
    moved = move(BATCH)
    assert [x.device.type for x in tensors(moved)] == ["meta"] * 6
    assert [x.dtype for x in tensors(moved)] == [x.dtype for x in tensors(BATCH)]
    assert (moved.inputs["n"], moved.kind, moved.answer) == (2, BATCH.kind, BATCH.answer)
    assert {x.device.type for x in tensors(BATCH)} == {"cpu"}


def test_lightning_converts_to_another_precision() -> None:
    """Its plugins set the fields of a copy, which a frozen dataclass would refuse."""
    found = DoublePrecision().convert_input(BATCH)
    assert [x.dtype for x in tensors(found.inputs)] == [torch.long, *[torch.double] * 3]
    assert [x.dtype for x in tensors(BATCH.inputs)] == [torch.long, *[torch.float] * 3]
    assert found.labels.equal(BATCH.labels)


def test_a_loader_pins_every_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``DataLoader(pin_memory=True)`` does with a batch; there is no pinned memory without a GPU."""
    pinned: list[Tensor] = []
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor.clone())
    found = pin_memory(BATCH)
    assert found is not BATCH
    assert same(found, BATCH)
    assert len(pinned) == 6


def test_batches_come_back_from_workers_and_files() -> None:
    assert same(pickle.loads(pickle.dumps(BATCH)), BATCH)
    found = [*DataLoader(DATA[:2], batch_size=None, num_workers=1)]  # type: ignore[arg-type]
    assert all(same(a, b) for a, b in zip(found, DATA[:2], strict=True))
    assert not same(found[0], DATA[1])


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"inputs": IDS}, "inputs: expected the model's arguments by name, got a Tensor"),
        ({"labels": None}, r"labels: expected a long tensor \(rows, tokens\), -100 where nothing is scored"),
        ({"labels": IDS.float()}, "labels: expected a long tensor"),
        ({"prompt_mask": IDS[:, 1:]}, r"prompt_mask: expected shape \(2, 5\) like labels, got \(2, 4\)"),
        ({"inputs": {"input_ids": IDS[:1]}}, r"input_ids: expected shape \(2, 5\) like labels, got \(1, 5\)"),
        ({"prompt_mask": None, "kind": ["a"]}, "prompt_mask: .*, got NoneType; kind: expected one for each of 2 rows"),
    ],
)
def test_what_fits_together_in_no_batch(wrong: dict[str, Any], text: str) -> None:
    whole = {"inputs": {"input_ids": IDS}, "labels": IDS, "prompt_mask": IDS > 0}
    assert Batch(**whole).kind == ["", ""]
    with pytest.raises(DataError, match=rf"^Batch: {text}.*; adaskip.Collator\(processor\) makes batches of records$"):
        Batch(**(whole | wrong))


def test_a_collator_that_returns_a_dictionary_is_told_what_to_return(tmp_path: Path) -> None:
    """Wherever its batches first arrive: in training, validation, prediction, calibration, and the callback."""
    rows = [{name: getattr(row, name) for name in ("inputs", "labels", "prompt_mask")} for row in DATA[:4]]
    goal = adaskip.Objective(keep=0.5, bound_weight=0.0)

    def tuner(**options: Any) -> adaskip.RouterTuner:
        return adaskip.RouterTuner(planted(1.0), goal, **options)

    refused = r"expected batches as adaskip.Collator\(processor\) makes them, got a dict of inputs, labels, prompt_mask"
    typed = r"; pass collate_fn=.*, or let your own collator return adaskip.Batch\(inputs, labels, prompt_mask\)$"
    calls: dict[str, Any] = {
        "training": lambda: trainer(tmp_path).fit(tuner(), loader(rows)),
        "validation": lambda: trainer(tmp_path).fit(tuner(), loader(DATA[:4]), loader(rows)),
        "predict": lambda: trainer(tmp_path).predict(tuner(), loader(rows)),
        "calibration": lambda: trainer(tmp_path).fit(tuner(calibration=rows), loader(DATA[:4])),
        "ConditionCheck: batches": lambda: adaskip.ConditionCheck(batches=rows),  # type: ignore[arg-type]
        "profile": lambda: adaskip.profile(planted(1.0).backbone, rows),
    }
    for where, call in calls.items():
        with pytest.raises(DataError, match=f"^{where}: {refused}{typed}"):
            call()


def test_bare_prompts_train_nothing(tmp_path: Path) -> None:
    """`Collator(processor, answers=False)` by mistake; and prediction takes them."""
    bare = copy.deepcopy(DATA[0])
    bare.labels.fill_(IGNORED)
    tuner = adaskip.RouterTuner(planted(1.0), adaskip.Objective(keep=0.5, bound_weight=0.0))
    with pytest.raises(DataError, match=r"^training: expected prompts with answers, got bare prompts: all labels"):
        trainer(tmp_path).fit(tuner, loader([bare]))
    assert trainer(tmp_path).predict(tuner, loader([bare]))


def test_a_whole_batch_where_its_inputs_belong() -> None:
    model = planted(1.0)
    with pytest.raises(DataError, match=r"model: expected a tensor first, got a Batch; write model\(\*\*batch.inputs"):
        model(DATA[0])
    with pytest.raises(DataError, match="item 0: expected the model's inputs by name, got a Batch; pass its inputs"):
        model.generate_many([DATA[0]])  # type: ignore[list-item]
