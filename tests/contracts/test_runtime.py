"""What every architecture must hold: exact skipping, exact caching, rows that do not see one another."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from adaskip.errors import BackboneError
from adaskip.plan import SkipPlan
from adaskip.policies.learned.config import RouterConfig
from adaskip.runtime.attach import RoutedModel, attach
from tests import architectures, families
from tests.families import EAGER_ONLY, IMAGE, LAYERS, PADDING_MOVES, REFUSED, TEXT, VISION, Toy
from tests.routing import (
    GREEDY,
    LENGTHS,
    caches,
    count_tokens,
    decide,
    real,
    routed,
    slot_bytes,
    some_keep,
    text_tokens,
)

BOTH_KERNELS = ("llama", "qwen2", "gemma2", "falcon", "mixtral", "gpt2", "llava", "qwen2_vl")
"""Families that run eagerly as well in every run; of the others `-m slow` does, as users get sdpa."""


def cases() -> Iterator[Any]:
    for name in (*TEXT, *VISION):
        for group in ("all", "vision") if name in VISION else ("all",):
            for attention in ("eager",) if name in EAGER_ONLY else ("eager", "sdpa"):
                often = attention == "sdpa" or name in (*EAGER_ONLY, *BOTH_KERNELS)
                marks = () if often else (pytest.mark.slow,)
                yield pytest.param(name, group, attention, id=f"{name}-{group}-{attention}", marks=marks)


@pytest.fixture(scope="class")
def made(name: str, group: str, attention: str) -> tuple[Toy, RoutedModel]:
    """One model for all tests of a case: what makes it takes as long as they do."""
    return routed(name, group, attention)


@pytest.fixture
def case(made: tuple[Toy, RoutedModel]) -> Iterator[tuple[Toy, RoutedModel]]:
    """The case's model, whose modes and gradients a test may change."""
    yield made
    made[1].eval().zero_grad()


@pytest.mark.parametrize(("name", "group", "attention"), cases(), scope="class")
class TestContract:
    @torch.no_grad()
    def test_keeping_everything_is_bit_identical_and_detach_restores(
        self, name: str, group: str, attention: str
    ) -> None:
        toy = families.make(name, attention)
        batch = toy.batch(LENGTHS)
        before = toy.model.requires_grad_(False)(**batch).logits  # kernels may differ where a gradient is asked for
        toy.model.requires_grad_(True)
        keys = set(toy.model.state_dict())
        model = attach(toy.model, RouterConfig(group=group))
        assert torch.equal(model(**batch).logits, before)
        assert model.routing.keep.all()
        assert (model.routing.keep_rate == 1).all()
        bare = decide(model).detach()
        assert all(weight.requires_grad for weight in bare.parameters())
        assert torch.equal(bare.requires_grad_(False)(**batch).logits, before)
        assert set(bare.state_dict()) == keys
        assert not any("forward" in m.__dict__ or "_adaskip" in m.__dict__ for m in bare.modules())

    @torch.no_grad()
    def test_training_and_skipping_give_the_same_logits(self, case: tuple[Toy, RoutedModel]) -> None:
        toy, model = case
        for side in ("left", "right"):
            batch = toy.batch(LENGTHS, side)
            for keep in (None, some_keep(len(LENGTHS))):
                skipped = model(**batch, routing=keep).logits
                decided = model.routing.keep
                with model.soft():
                    soft = model(**batch, routing=keep).logits
                assert torch.equal(model.routing.keep, decided)
                assert 0 < decided.float().mean() < 1
                scale = real(skipped, batch).abs().max().clamp(min=1)
                assert (real(soft, batch) - real(skipped, batch)).abs().max() <= 1e-5 * scale

    @torch.no_grad()
    def test_rows_are_independent(self, case: tuple[Toy, RoutedModel], name: str) -> None:
        """Neither padding, nor its side, nor the other rows move a decision or a logit; a skip moves its own row."""
        toy, model = case
        rows = toy.rows([9] * len(LENGTHS) if name in PADDING_MOVES else LENGTHS)
        left, right = toy.collate(rows, "left"), toy.collate(rows, "right")
        together = model(**left).logits
        routing = model.routing
        scale = real(together, left).abs().max().clamp(min=1)
        other_side = model(**right).logits
        assert torch.equal(model.routing.keep, routing.keep)
        assert torch.allclose(model.routing.keep_rate, routing.keep_rate)
        assert (real(other_side, right) - real(together, left)).abs().max() <= 1e-4 * scale
        for i, row in enumerate(rows):
            logits = model(**toy.collate([row])).logits
            assert torch.equal(model.routing.keep[:, 0], routing.keep[:, i])
            assert torch.allclose(model.routing.keep_rate, routing.keep_rate[i])
            assert (logits[0] - together[i, left["attention_mask"][i].bool()]).abs().max() <= 1e-4 * scale
        keep = torch.ones(LAYERS, len(LENGTHS), dtype=torch.bool)
        whole = model(**left, routing=keep).logits
        keep[1, 2] = False
        changed = (model(**left, routing=keep).logits - whole)[:, -1].abs().amax(-1)
        assert changed[2] > 1e-3
        assert changed[[0, 1, 3, 4]].max() <= 1e-5 * scale

    def test_cached_decoding_equals_recomputation(self, case: tuple[Toy, RoutedModel]) -> None:
        toy, model = case
        batch = toy.batch(LENGTHS)
        options: dict[str, Any] = {"max_new_tokens": 6, "return_dict_in_generate": True, "output_logits": True}
        for keep in (None, some_keep(len(LENGTHS))):
            cached = model.generate(**batch, routing=keep, **options, **GREEDY)
            decided = model.routing.keep
            again = model.generate(**batch, routing=keep, **options, **GREEDY, use_cache=False)
            assert torch.equal(decided, model.routing.keep)
            scale = cached.logits[0].abs().max().clamp(min=1)
            assert (torch.stack(cached.logits) - torch.stack(again.logits)).abs().max() <= 1e-4 * scale
            assert torch.equal(cached.sequences, again.sequences)

    @torch.no_grad()
    def test_what_skips_is_neither_computed_nor_cached(self, case: tuple[Toy, RoutedModel], group: str) -> None:
        toy, model = case
        batch = toy.batch(LENGTHS)
        keep = some_keep(len(LENGTHS))
        text, width = text_tokens(batch), batch["input_ids"].shape[1]
        with count_tokens(model.spec.layers[1]) as seen:
            model(**batch, routing=keep)
        ran = width * int(keep[1].sum())
        if group == "vision":
            left = text[~keep[1]].sum(1)
            ran += int(left.max()) * len(left)
        assert sum(next(iter(seen.values()))) == ran
        if not caches(toy):
            return
        cache = model(**batch, routing=keep, use_cache=True).past_key_values
        assert cache.get_seq_length() == width
        with model.dense():
            per_slot = slot_bytes(toy)
        for layer, row_keeps, one in zip(cache.layers, keep, per_slot, strict=True):
            absent = text.sum(1) if group == "vision" else torch.zeros(len(LENGTHS)).long()
            assert layer.nbytes() == one * int(torch.where(row_keeps, width, absent).sum())

    def test_beam_search_and_samples(self, case: tuple[Toy, RoutedModel]) -> None:
        toy, model = case
        batch = toy.batch([4, 6])
        keep = some_keep(2)
        options = {"max_new_tokens": 4, "num_beams": 3, **GREEDY}
        beams = model.generate(**batch, routing=keep, **options)
        assert torch.equal(beams, model.generate(**batch, routing=keep, **options, use_cache=False))
        assert torch.equal(beams, model.generate(**batch, routing=keep.repeat_interleave(3, 1), **options))
        torch.manual_seed(0)
        several = model.generate(
            **batch, routing=keep, max_new_tokens=3, num_return_sequences=2, do_sample=True, suppress_tokens=[IMAGE]
        )
        assert len(several) == 4

    @torch.no_grad()
    def test_hooks_and_hidden_states_keep_their_length(self, case: tuple[Toy, RoutedModel]) -> None:
        toy, model = case
        batch = toy.batch(LENGTHS)
        with model.dense():
            length = len(model.backbone(**batch, output_hidden_states=True).hidden_states)
        seen: list[int] = []
        hooks = [
            layer.register_forward_hook(lambda module, args, out, i=i: seen.append(i))
            for i, layer in enumerate(model.spec.layers)
        ]
        out = model(**batch, routing=some_keep(len(LENGTHS)), output_hidden_states=True)
        for hook in hooks:
            hook.remove()
        assert len(out.hidden_states) == length
        assert seen == [*range(LAYERS)]

    def test_copy_save_and_load(self, case: tuple[Toy, RoutedModel], name: str, attention: str, tmp_path: Path) -> None:
        toy, model = case
        batch = toy.batch(LENGTHS)
        with torch.no_grad():
            before = model(**batch).logits
            twin = copy.deepcopy(model)
            for weight in twin.backbone.parameters():
                weight.mul_(1.3).add_(0.01)
            assert not torch.allclose(twin(**batch).logits, before)
            assert torch.equal(model(**batch).logits, before)
            model.save_pretrained(tmp_path)
            loaded = RoutedModel.from_pretrained(tmp_path, families.make(name, attention).model)
            assert torch.equal(loaded(**batch).logits, before)

    def test_gradient_reaches_routers_only(self, case: tuple[Toy, RoutedModel]) -> None:
        toy, model = case
        model.train()
        model(**toy.batch(LENGTHS)).logits.float().logsumexp(-1).sum().backward()
        assert all(w.grad is not None and w.grad.isfinite().all() for w in model.routers.parameters())
        assert any(w.grad.abs().sum() > 0 for w in model.routers.parameters())
        assert all(w.grad is None for w in model.backbone.parameters())


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_routed_is_refused_by_reason(name: str) -> None:
    model = families.make_refused(name)
    with pytest.raises(BackboneError, match=REFUSED[name][1]):
        attach(model)
    assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.skipif(not families.NEWEST, reason="the table speaks of the newest tested transformers")
def test_the_page_lists_them() -> None:
    block = architectures.BLOCK.search(architectures.PAGE.read_text(encoding="utf-8"))
    assert block is not None
    assert block[0] == f"{block[1]}{architectures.table()}{block[2]}", "type: python -m tests.architectures"


def test_enough_families() -> None:
    assert len({*TEXT, *VISION}) >= 40
    assert len(VISION) >= 15


@pytest.mark.parametrize("name", sorted(PADDING_MOVES & TEXT.keys()))
@torch.no_grad()
def test_families_whose_rows_padding_moves_are_so_without_adaskip(name: str) -> None:
    toy = families.make(name)
    left, right = toy.batch(LENGTHS, "left"), toy.batch(LENGTHS, "right")
    gap = (real(toy.model(**left).logits, left) - real(toy.model(**right).logits, right)).abs().max()
    assert gap > 1e-3


@pytest.mark.skipif(not families.NEWEST, reason="the list speaks of the newest tested transformers")
@pytest.mark.parametrize("name", sorted(EAGER_ONLY & TEXT.keys()))
def test_families_left_out_of_sdpa_have_none(name: str) -> None:
    assert not families.make(name).model._supports_sdpa


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
@pytest.mark.parametrize(
    "plan", [SkipPlan.late_entry(2, "vision"), SkipPlan.early_exit(1, "vision"), SkipPlan.static([0, 3], "vision")]
)
def test_static_vision_plans(name: str, plan: SkipPlan) -> None:
    toy = families.make(name, "sdpa")
    model = attach(toy.model, plan)
    batch = toy.batch(LENGTHS)
    skipped = model(**batch).logits
    with model.soft():
        soft = model(**batch).logits
    assert (real(skipped, batch) - real(soft, batch)).abs().max() <= 1e-5
    assert (model.routing.keep_rate < 1).all()
    options = {"max_new_tokens": 5, **GREEDY}
    assert torch.equal(model.generate(**batch, **options), model.generate(**batch, **options, use_cache=False))


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_absent_vision_cannot_be_attended_to(name: str) -> None:
    """With vision absent everywhere, text is blind: another picture gives the same logits."""
    toy = families.make(name, "sdpa")
    model = attach(toy.model, SkipPlan.early_exit(0, "vision"))
    batch = toy.batch([6])
    other = {**batch, "pixel_values": torch.randn_like(batch["pixel_values"])}
    text = batch["input_ids"][0] != 5
    blind = model(**batch).logits[0, text]
    assert torch.equal(model(**other).logits[0, text], blind)
    with model.dense():
        assert not torch.allclose(model(**other).logits[0, text], model(**batch).logits[0, text], atol=1e-4)


def test_a_later_turn_follows_the_first_decision() -> None:
    toy, model = routed("llama", "all")
    batch = toy.batch([5, 8])
    del batch["position_ids"]
    first = model(**batch, use_cache=True)
    keep = model.routing.keep
    more = torch.randint(10, 90, (2, 3))
    mask = torch.cat([batch["attention_mask"], torch.ones(2, 3).long()], 1)
    second = model(input_ids=more, attention_mask=mask, past_key_values=first.past_key_values, use_cache=True)
    assert torch.equal(model.routing.keep, keep)
    prompt = torch.cat([batch["attention_mask"].bool(), torch.zeros(2, 3).bool()], 1)
    whole = model(input_ids=torch.cat([batch["input_ids"], more], 1), attention_mask=mask, prompt_mask=prompt)
    assert (whole.logits[:, -3:] - second.logits).abs().max() <= 1e-4


def test_labels_bound_the_prompt() -> None:
    """What the routers see ends before the first supervised token."""
    toy, model = routed("llama", "all")
    batch = toy.batch([9])
    labels = batch["input_ids"].clone()
    labels[:, :6] = -100
    model(**batch, labels=labels)
    keep, logits = model.routing.keep, model.routing.logits
    changed = batch["input_ids"].clone()
    changed[:, 6:] = 11
    model(input_ids=changed, attention_mask=batch["attention_mask"], labels=labels)
    assert torch.equal(model.routing.keep, keep)
    assert torch.allclose(model.routing.logits, logits)
