"""Sublayers that are left out, and keys and values that stay: what every architecture must hold."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from adaskip.errors import BackboneError, ConfigError
from adaskip.plan import SkipPlan
from adaskip.policies.learned.config import RouterConfig
from adaskip.runtime.attach import RoutedModel, attach
from tests import families
from tests.families import EAGER_ONLY, IMAGE, LAYERS, TEXT, UNIT_REFUSED, VISION, Toy
from tests.routing import GREEDY, LENGTHS, check_saving, decide, masked, real, slot_bytes, some_keep

Case = tuple[str, str, str]  # unit, group, kv
TEXT_CASES: list[Case] = [(unit, "all", "absent") for unit in ("attention", "mlp", "sublayers")]
VISION_CASES: list[Case] = [
    ("block", "vision", "kept"),
    ("attention", "vision", "absent"),
    ("attention", "vision", "kept"),
    ("mlp", "vision", "absent"),
    ("sublayers", "vision", "absent"),
    ("sublayers", "vision", "kept"),
]
BOTH_KERNELS = ("llama", "falcon", "llava")


def cases() -> Iterator[Any]:
    """Every family with every case; in the default run each family has one of them, a few families have all."""
    for number, name in enumerate((*TEXT, *VISION)):
        possible = TEXT_CASES if name in TEXT else VISION_CASES
        possible = [case for case in possible if name not in UNIT_REFUSED.get(case[0], ())]
        for turn, case in enumerate(possible):
            for attention in ("eager", "sdpa") if name in BOTH_KERNELS and name not in EAGER_ONLY else ("eager",):
                chosen = name in ("llama", "llava") or turn == number % len(possible)
                marks = () if chosen else (pytest.mark.slow,)
                yield pytest.param(name, case, attention, id="-".join((name, *case, attention)), marks=marks)


def routed(name: str, case: Case, attention: str = "eager") -> tuple[Toy, RoutedModel]:
    toy = families.make(name, attention)
    unit, group, kv = case
    return toy, decide(attach(toy.model, RouterConfig(unit=unit, group=group, kv=kv)))  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "case", "attention"), cases())
def test_contract(name: str, case: Case, attention: str) -> None:
    """All kept is bit-identical; training equals skipping; cached equals uncached; gradients; detach restores."""
    toy = families.make(name, attention)
    batch = toy.batch(LENGTHS)
    before = toy.model.requires_grad_(False)(**batch).logits
    unit, group, kv = case
    model = attach(toy.model, RouterConfig(unit=unit, group=group, kv=kv))  # type: ignore[arg-type]
    assert torch.equal(model(**batch).logits, before)
    assert (model.routing.keep_rate == 1).all()
    decide(model)
    options: dict[str, Any] = {"max_new_tokens": 4, "return_dict_in_generate": True, "output_logits": True, **GREEDY}
    for keep in (None, some_keep(len(LENGTHS), unit)):
        with torch.no_grad():
            skipped = model(**batch, routing=keep).logits
            decided, rate = model.routing.keep, model.routing.keep_rate
            with model.soft():
                soft = model(**batch, routing=keep).logits
        assert torch.equal(model.routing.keep, decided)
        scale = real(skipped, batch).abs().max().clamp(min=1)
        assert (real(soft, batch) - real(skipped, batch)).abs().max() <= 1e-5 * scale
        assert (real(skipped, batch) - real(before, batch)).abs().max() > 1e-3
        assert ((rate < 1) == (~decided).any(0).to(rate.device)).all()
        cached = model.generate(**batch, routing=keep, **options)
        again = model.generate(**batch, routing=keep, **options, use_cache=False)
        assert (torch.stack(cached.logits) - torch.stack(again.logits)).abs().max() <= 1e-4 * scale
    model.train()
    model(**batch).logits.float().logsumexp(-1).sum().backward()
    grads = [weight.grad for weight in model.routers.parameters()]
    assert all(grad is not None and grad.isfinite().all() for grad in grads)
    assert any(grad.abs().sum() > 0 for grad in grads)
    bare = model.detach()
    assert not any("forward" in m.__dict__ or "_adaskip" in m.__dict__ for m in bare.modules())


REFERENCES = [
    *((name, case) for name in ("llama", "gpt2", "falcon") for case in TEXT_CASES),
    *(
        (name, case)
        for name in ("llava", "qwen2_vl")
        for case in VISION_CASES
        if case not in (("attention", "vision", "absent"), ("sublayers", "vision", "absent"))
    ),
]


@pytest.mark.parametrize(("name", "case"), REFERENCES, ids=str)
@torch.no_grad()
def test_equals_computing_all_and_overwriting_what_was_to_be_left_out(name: str, case: Case) -> None:
    """Without a hand of the runtime in it: hooks on the bare model."""
    toy, model = routed(name, case)
    keep = some_keep(len(LENGTHS), case[0])
    for side in ("left", "right"):
        batch = toy.batch(LENGTHS, side)
        skipped = model(**batch, routing=keep).logits
        with model.dense(), masked(model, keep, batch, case[0], case[1]):
            reference = model.backbone(**batch).logits
        assert (real(skipped, batch) - real(reference, batch)).abs().max() <= 1e-4


@pytest.mark.parametrize(("name", "case"), REFERENCES, ids=str)
@torch.no_grad()
def test_the_cost_is_what_was_computed(name: str, case: Case) -> None:
    toy, model = routed(name, case)
    batch = toy.batch([6, 6])
    keep = torch.tensor([[True, True], [True, False], [False, True], [False, False]])
    keep = torch.cat([keep, keep.roll(1, 0)])[: len(model.sites)]
    check_saving(model, batch, keep)


@pytest.mark.parametrize("case", [*TEXT_CASES, *VISION_CASES], ids="-".join)
@torch.no_grad()
def test_the_cache_holds_what_the_unit_says(case: Case) -> None:
    """No key of a skipped attention; every key beside a skipped MLP, and where they are kept."""
    unit, group, kv = case
    toy, model = routed("llava" if group == "vision" else "llama", case)
    batch = toy.batch(LENGTHS)
    keep = some_keep(len(LENGTHS), unit)
    cache = model(**batch, routing=keep, use_cache=True).past_key_values
    width = batch["input_ids"].shape[1]
    text = ((batch["input_ids"] != IMAGE) & batch["attention_mask"].bool()).sum(1)
    rest = text if group == "vision" else torch.zeros_like(text)
    if unit == "mlp" or kv == "kept":
        rest = torch.full_like(text, width)
    with model.dense():
        per_slot = slot_bytes(toy)
    first = [model.sites.of(layer)[0] for layer in range(LAYERS)]  # of a layer's halves the attention
    for layer, row_keeps, one in zip(cache.layers, keep[first], per_slot, strict=True):
        assert layer.nbytes() == one * int(torch.where(row_keeps, width, rest).sum())


@pytest.mark.parametrize("case", [*TEXT_CASES, *VISION_CASES], ids="-".join)
def test_beams_copies_and_files(case: Case, tmp_path: Path) -> None:
    name = "qwen2_vl" if case[1] == "vision" else "llama"
    toy, model = routed(name, case, "sdpa")
    batch, keep = toy.batch([4, 6]), some_keep(2, case[0])
    options = {"max_new_tokens": 4, "num_beams": 3, **GREEDY}
    beams = model.generate(**batch, routing=keep, **options)
    assert torch.equal(beams, model.generate(**batch, routing=keep, **options, use_cache=False))
    with torch.no_grad():
        before = model(**batch).logits
        twin = copy.deepcopy(model)
        for weight in twin.backbone.parameters():
            weight.mul_(1.3)
        assert not torch.allclose(twin(**batch).logits, before)
        assert torch.equal(model(**batch).logits, before)
        model.save_pretrained(tmp_path)
        loaded = RoutedModel.from_pretrained(tmp_path, families.make(name, "sdpa").model)
        assert loaded.policy.config == model.policy.config
        assert torch.equal(loaded(**batch).logits, before)
        out = model(**batch, routing=keep, output_hidden_states=True)
        assert len(out.hidden_states) == LAYERS + 1


@pytest.mark.parametrize("case", [*TEXT_CASES, *VISION_CASES], ids="-".join)
@torch.no_grad()
def test_rows_do_not_see_one_another(case: Case) -> None:
    toy, model = routed("llava" if case[1] == "vision" else "llama", case)
    rows = toy.rows(LENGTHS)
    left, right = toy.collate(rows), toy.collate(rows, "right")
    together = model(**left).logits
    routing = model.routing
    assert (real(model(**right).logits, right) - real(together, left)).abs().max() <= 1e-4
    for i, row in enumerate(rows):
        logits = model(**toy.collate([row])).logits
        assert torch.equal(model.routing.keep[:, 0], routing.keep[:, i])
        assert torch.allclose(model.routing.keep_rate, routing.keep_rate[i])
        assert (logits[0] - together[i, left["attention_mask"][i].bool()]).abs().max() <= 1e-4


@torch.no_grad()
def test_kept_vision_is_seen_though_never_updated() -> None:
    """Vision that skips every layer, but whose keys are kept, still shows its embeddings to the text."""
    toy = families.make("llava")
    model = attach(toy.model, SkipPlan.early_exit(0, "vision", kv="kept"))
    batch = toy.batch([6])
    other = {**batch, "pixel_values": torch.randn_like(batch["pixel_values"])}
    text = batch["input_ids"][0] != IMAGE
    assert (model(**other).logits[0, text] - model(**batch).logits[0, text]).abs().max() > 1e-3


@pytest.mark.parametrize(("unit", "name"), [(unit, name) for unit, names in UNIT_REFUSED.items() for name in names])
def test_what_cannot_be_left_out_alone_is_refused_by_reason(unit: str, name: str) -> None:
    model = families.make(name).model
    before = hooks(model)
    with pytest.raises(BackboneError, match=rf"{UNIT_REFUSED[unit][name]}.*use .*unit='block'"):
        attach(model, RouterConfig(unit=unit))  # type: ignore[arg-type]
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert hooks(model) == before


def hooks(model: nn.Module) -> list[int]:
    """How many hooks each module has; some models share their activations with all others of their class."""
    return [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]


def test_keys_that_nobody_would_read_are_refused() -> None:
    with pytest.raises(ConfigError, match="RouterConfig: kv='kept' is pure waste for group 'all'"):
        RouterConfig(kv="kept")
    with pytest.raises(ConfigError, match="SkipPlan: kv='kept' says nothing for unit 'mlp'"):
        SkipPlan(unit="mlp", group="vision", kv="kept")
    with pytest.raises(ConfigError, match=r"unit: expected block \| attention \| mlp \| sublayers, got 'atention'"):
        RouterConfig(unit="atention")  # type: ignore[arg-type]
