"""Tokens that decide for themselves: what the runtime holds, on families that differ in their attention."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from adaskip.errors import BackboneError, ConfigError
from adaskip.policies.learned.config import RouterConfig
from adaskip.runtime.attach import RoutedModel, attach
from adaskip.sites import Sites, Unit
from tests import families
from tests.families import (
    IMAGE,
    LAYERS,
    TEXT,
    TOKEN_ATTENTION_REFUSED,
    TOKEN_REFUSED,
    UNIT_REFUSED,
    VISION,
    Toy,
)
from tests.routing import GREEDY, LENGTHS, check_saving, decide, masked, real, slot_bytes

Case = tuple[str, str, str]  # unit, group, kv
CASES: list[Case] = [
    ("block", "all", "absent"),
    ("block", "all", "kept"),
    ("attention", "all", "absent"),
    ("attention", "all", "kept"),
    ("mlp", "all", "absent"),
    ("block", "vision", "absent"),
    ("block", "vision", "kept"),
    ("sublayers", "all", "absent"),
    ("sublayers", "all", "kept"),
]
FEW = {"bloom": 0, "falcon": 1, "gemma2": 0, "gpt_oss": 0, "deepseek_v3": 2, "mistral": 1, "mixtral": 4, "qwen2_vl": 5}
"""Families that are in every run: ALiBi, soft caps, windows, sinks, latent keys, experts, M-RoPE; one case each."""


def cases() -> Iterator[Any]:
    for name in (*TEXT, *VISION):
        for number, case in enumerate(CASES):
            if name in TOKEN_REFUSED or name in UNIT_REFUSED.get(case[0], ()) or (case[1] == "vision" and name in TEXT):
                continue
            if case[0] in ("attention", "sublayers") and name in TOKEN_ATTENTION_REFUSED:
                continue
            often = FEW.get(name) == number or (name == "llama") or (name == "llava" and case[1] == "vision")
            yield pytest.param(name, case, id="-".join((name, *case)), marks=() if often else (pytest.mark.slow,))


def routed(name: str, case: Case, attention: str = "eager") -> tuple[Toy, RoutedModel]:
    toy = families.make(name, attention)
    unit, group, kv = case
    return toy, decide(attach(toy.model, RouterConfig(scope="token", unit=unit, group=group, kv=kv)))  # type: ignore[arg-type]


def drawn(batch: int, length: int, unit: Unit, seed: int = 0) -> Tensor:
    """bool (s b t): mixed, with a site that every token runs and a row that runs nothing of another."""
    keep = torch.rand(len(Sites(unit, LAYERS)), batch, length, generator=torch.Generator().manual_seed(seed)) > 0.5
    keep[2], keep[0, 1] = True, False
    return keep


@pytest.mark.parametrize(("name", "case"), cases())
def test_contract(name: str, case: Case) -> None:
    """All kept is bit-identical; training equals skipping; cached equals uncached; gradients; detach restores."""
    toy = families.make(name)
    batch = toy.batch(LENGTHS)
    before = toy.model.requires_grad_(False)(**batch).logits
    unit, group, kv = case
    model = attach(toy.model, RouterConfig(scope="token", unit=unit, group=group, kv=kv))  # type: ignore[arg-type]
    assert torch.equal(model(**batch).logits, before)
    assert (model.routing.keep_rate == 1).all()
    decide(model)
    with torch.no_grad():
        model(**batch)
    if not 0 < model.routing.share.mean() < 1:  # all look alike to these routers
        logits = model.routing.logits[:, model.routing.tokens].flatten().sort().values
        model.set_threshold(float(logits[len(logits) // 2 :][:2].mean()))
    options: dict[str, Any] = {"max_new_tokens": 4, "return_dict_in_generate": True, "output_logits": True, **GREEDY}
    given = drawn(len(LENGTHS), batch["input_ids"].shape[1] + 2, unit)
    for keep in (None, given):
        with torch.no_grad():
            skipped = model(**batch, routing=keep).logits
            routing = model.routing
            with model.soft():
                soft = model(**batch, routing=keep).logits
        assert torch.equal(model.routing.keep, routing.keep)
        assert 0 < routing.share.mean() < 1
        assert (routing.keep_rate < 1).any()
        scale = real(skipped, batch).abs().max().clamp(min=1)
        assert (real(soft, batch) - real(skipped, batch)).abs().max() <= 1e-5 * scale
        assert (real(skipped, batch) - real(before, batch)).abs().max() > 1e-3
        cached = model.generate(**batch, routing=keep, **options)
        cached_keep = model.routing.keep
        again = model.generate(**batch, routing=keep, **options, use_cache=False)
        assert torch.equal(cached_keep, model.routing.keep)
        assert cached_keep.shape[-1] == batch["input_ids"].shape[1] + 3
        assert (torch.stack(cached.logits) - torch.stack(again.logits)).abs().max() <= 1e-4 * scale
    model.train()
    model(**batch).logits.float().logsumexp(-1).sum().backward()
    assert model.runtime.routing is not None
    assert model.runtime.routing.gates is not None
    assert model.runtime.routing.gates.shape == (len(model.sites), len(LENGTHS))
    grads = [weight.grad for weight in model.routers.parameters()]
    assert all(grad is not None and grad.isfinite().all() for grad in grads)
    assert any(grad.abs().sum() > 0 for grad in grads)
    bare = model.detach()
    assert not any("forward" in m.__dict__ or "_adaskip" in m.__dict__ for m in bare.modules())


@pytest.mark.parametrize("case", [c for c in CASES if c[0] == "mlp" or c[2] == "kept"], ids="-".join)
@torch.no_grad()
def test_equals_computing_all_and_overwriting_what_was_to_be_left_out(case: Case) -> None:
    """Hooks on the bare model, without a hand of the runtime in it."""
    toy, model = routed("llava" if case[1] == "vision" else "llama", case)
    for side in ("left", "right"):
        batch = toy.batch(LENGTHS, side)
        keep = drawn(*batch["input_ids"].shape, case[0])
        skipped = model(**batch, routing=keep).logits
        with model.dense(), masked(model, keep, batch, case[0], case[1]):
            reference = model.backbone(**batch).logits
        assert (real(skipped, batch) - real(reference, batch)).abs().max() <= 1e-4


@pytest.mark.parametrize("case", CASES, ids="-".join)
@torch.no_grad()
def test_cost_and_cache_are_what_was_computed(case: Case) -> None:
    unit, group, kv = case
    toy, model = routed("llava" if group == "vision" else "llama", case)
    batch = toy.batch([8])  # of one row nothing is filled up
    keep = drawn(2, batch["input_ids"].shape[1], unit)[:, :1]
    check_saving(model, batch, keep)
    batch = toy.batch(LENGTHS)
    valid = batch["attention_mask"].bool()
    keep = drawn(*valid.shape, unit)
    cache = model(**batch, routing=keep, use_cache=True).past_key_values
    ran = keep | (batch["input_ids"] != IMAGE) if group == "vision" else keep
    with model.dense():
        per_slot = slot_bytes(toy)
    first = [model.sites.of(layer)[0] for layer in range(LAYERS)]  # of a layer's halves the attention
    for layer, kept, one in zip(cache.layers, ran[first], per_slot, strict=True):
        whole = unit == "mlp" or kv == "kept" or bool(kept[valid].all())
        assert layer.nbytes() == one * (valid.numel() if whole else int((kept & valid).sum()))


@pytest.mark.parametrize("case", [CASES[0], CASES[1], CASES[5]], ids="-".join)
def test_rows_beams_copies_and_files(case: Case, tmp_path: Path) -> None:
    name = "llava" if case[1] == "vision" else "llama"
    toy, model = routed(name, case, "sdpa")
    rows = toy.rows(LENGTHS)
    left, right = toy.collate(rows), toy.collate(rows, "right")
    with torch.no_grad():
        together = model(**left).logits
        routing = model.routing
        assert (real(model(**right).logits, right) - real(together, left)).abs().max() <= 1e-4
        for i, row in enumerate(rows):
            logits = model(**toy.collate([row])).logits
            own = left["attention_mask"][i].bool()
            assert torch.equal(model.routing.keep[:, 0], routing.keep[:, i, own])
            assert torch.allclose(model.routing.keep_rate, routing.keep_rate[i])
            assert (logits[0] - together[i, own]).abs().max() <= 1e-4
        twin = copy.deepcopy(model)
        for weight in twin.backbone.parameters():
            weight.mul_(1.3)
        assert not torch.allclose(twin(**left).logits, together)
        model.save_pretrained(tmp_path)
        loaded = RoutedModel.from_pretrained(tmp_path, families.make(name, "sdpa").model)
        assert torch.equal(loaded(**left).logits, together)
        assert "what each" in (tmp_path / "README.md").read_text(encoding="utf-8")
    batch = toy.batch([4, 6])
    options = {"max_new_tokens": 4, "num_beams": 3, **GREEDY}
    assert torch.equal(model.generate(**batch, **options), model.generate(**batch, **options, use_cache=False))


def test_assisted_generation_takes_decisions_back() -> None:
    toy, model = routed("llama", CASES[0])
    batch = toy.batch([7])
    helper = families.make("llama", seed=1).model
    options = {"max_new_tokens": 8, **GREEDY}
    plain = model.generate(**batch, **options)
    keep, rate = model.routing.keep, model.routing.keep_rate
    assert torch.equal(model.generate(**batch, **options, assistant_model=helper), plain)
    length = min(keep.shape[-1], model.routing.keep.shape[-1])
    assert torch.equal(model.routing.keep[..., :length], keep[..., :length])
    assert torch.allclose(model.routing.keep_rate, rate, atol=0.05)


@pytest.mark.parametrize(
    ("name", "unit", "why"),
    [
        *((name, "block", why) for name, why in TOKEN_REFUSED.items()),
        *((name, "attention", why) for name, why in TOKEN_ATTENTION_REFUSED.items()),
    ],
)
def test_what_cannot_be_cut_to_single_tokens_is_refused_by_reason(name: str, unit: Any, why: str) -> None:
    model = families.make(name).model
    with pytest.raises(BackboneError, match=rf"scope 'token'.*{why}.*use scope='prompt'"):
        attach(model, RouterConfig(scope="token", unit=unit))
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_decisions_of_another_scope_are_refused() -> None:
    toy, model = routed("llama", CASES[0])
    with pytest.raises(ConfigError, match=r"expected keep of shape \(layers=4, batch, tokens\), got \(4,\)"):
        model(**toy.batch([5]), routing=torch.ones(4, dtype=torch.bool))
    with pytest.raises(ConfigError, match="under scope 'token' a prompt has no path of its own; call generate"):
        model.generate_many([toy.batch([5])], max_new_tokens=2)
    model.detach()
    prompt = attach(toy.model)
    with pytest.raises(ConfigError, match=r"expected keep of shape \(layers=4, batch\), got \(4, 1, 5\)"):
        prompt(**toy.batch([5]), routing=drawn(2, 5, "block")[:, :1])
