"""What every architecture must hold: exact skipping, exact caching, rows that do not see one another."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from adaskip.plan import RouterConfig, SkipPlan
from adaskip.runtime.attach import RoutedModel, attach
from tests.toys import MAKERS, Toy, make

LENGTHS = [5, 9, 3, 9, 7]
GREEDY = {"do_sample": False, "suppress_tokens": [5, 6, 7, 8]}  # a random model would write placeholders of pictures
CASES = [
    (name, group) for name in MAKERS for group in ("all", "vision") if group == "all" or name in ("llava", "qwen2_vl")
]


def routed(name: str, group: str, attention: str = "sdpa") -> tuple[Toy, RoutedModel]:
    """A toy whose routers really decide, differently for each row."""
    toy = make(name, attention)
    model = attach(toy.model, RouterConfig(group=group))
    torch.manual_seed(1)
    for head in model.routers:
        torch.nn.init.normal_(head.outer.weight, std=3.0)
        torch.nn.init.normal_(head.outer.bias, std=0.3)
    return toy, model


def some_keep(batch: int, layers: int = 4) -> Tensor:
    """bool (l b): mixed, with a layer nobody runs, first, and one that everybody runs."""
    keep = torch.rand(layers, batch, generator=torch.Generator().manual_seed(3)) > 0.5
    keep[0], keep[2] = False, True
    return keep


def real(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return logits[batch["attention_mask"].bool()]


@pytest.fixture(params=["sdpa", "eager"])
def attention(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize(("name", "group"), CASES)
class TestContract:
    def test_keeping_everything_is_bit_identical(self, name: str, group: str, attention: str) -> None:
        toy = make(name, attention)
        batch = toy.batch(LENGTHS)
        before = toy.model(**batch).logits
        model = attach(toy.model, RouterConfig(group=group))
        assert torch.equal(model(**batch).logits, before)
        assert model.routing.keep.all()
        assert (model.routing.keep_rate == 1).all()

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_training_and_skipping_give_the_same_logits(self, name: str, group: str, attention: str, side: str) -> None:
        toy, model = routed(name, group, attention)
        batch = toy.batch(LENGTHS, side)
        skipped = model(**batch).logits
        keep = model.routing.keep
        assert 0 < keep.float().mean() < 1
        with model.soft():
            soft = model(**batch).logits
        assert torch.equal(model.routing.keep, keep)
        assert (real(soft, batch) - real(skipped, batch)).abs().max() <= 1e-5

    def test_a_skip_changes_the_logits(self, name: str, group: str, attention: str) -> None:
        toy, model = routed(name, group, attention)
        batch = toy.batch(LENGTHS)
        with model.dense():
            dense = model(**batch).logits
        keep = torch.ones(4, len(LENGTHS), dtype=torch.bool)
        keep[1, 2] = False
        changed = (model(**batch, routing=keep).logits - dense)[:, -1].abs().amax(-1)
        assert changed[2] > 1e-3
        assert changed[[0, 1, 3, 4]].max() <= 1e-5

    def test_cached_decoding_equals_recomputation(self, name: str, group: str, attention: str) -> None:
        toy, model = routed(name, group, attention)
        batch = toy.batch(LENGTHS)
        options = {"max_new_tokens": 6, **GREEDY}
        cached = model.generate(**batch, **options)
        keep = model.routing.keep
        again = model.generate(**batch, **options, use_cache=False)
        assert torch.equal(cached, again)
        assert torch.equal(keep, model.routing.keep)
        assert torch.equal(cached, model.backbone.generate(**batch, **options))

    def test_cached_logits_equal_uncached(self, name: str, group: str, attention: str) -> None:
        toy, model = routed(name, group, attention)
        batch = toy.batch(LENGTHS)
        out = model.generate(**batch, max_new_tokens=5, **GREEDY, return_dict_in_generate=True, output_logits=True)
        prompt = torch.zeros_like(out.sequences, dtype=torch.bool)
        prompt[:, : batch["input_ids"].shape[1]] = True
        new = out.sequences.shape[1] - batch["input_ids"].shape[1]
        whole = {**batch, "input_ids": out.sequences}
        for key in ("attention_mask", "mm_token_type_ids"):
            if key in whole:
                fill = 1 if key == "attention_mask" else 0
                whole[key] = torch.nn.functional.pad(whole[key], (0, new), value=fill)
        logits = model(**whole, prompt_mask=prompt, use_cache=False).logits[:, -new - 1 : -1]
        assert (logits - torch.stack(out.logits, 1)).abs().max() <= 1e-4

    def test_rows_are_independent(self, name: str, group: str, attention: str) -> None:
        toy, model = routed(name, group, attention)
        left, right = toy.batch(LENGTHS, "left"), toy.batch(LENGTHS, "right")
        together = model(**left).logits
        routing = model.routing
        other_side = model(**right).logits
        assert torch.equal(model.routing.keep, routing.keep)
        assert torch.allclose(model.routing.keep_rate, routing.keep_rate)
        assert (real(other_side, right) - real(together, left)).abs().max() <= 1e-4
        for i in range(len(LENGTHS)):
            mask = left["attention_mask"][i].bool()
            alone = {
                key: left[key][i : i + 1, mask]
                for key in ("input_ids", "attention_mask", "mm_token_type_ids")
                if key in left
            }
            if toy.images:
                size = 16 if toy.qwen else 1
                alone["pixel_values"] = left["pixel_values"][i * size : (i + 1) * size]
            if toy.qwen:
                alone["image_grid_thw"] = left["image_grid_thw"][i : i + 1]
            logits = model(**alone).logits
            assert torch.equal(model.routing.keep[:, 0], routing.keep[:, i])
            assert torch.allclose(model.routing.keep_rate, routing.keep_rate[i])
            assert (logits[0] - together[i, mask]).abs().max() <= 1e-4

    def test_the_cache_holds_what_ran(self, name: str, group: str, attention: str) -> None:
        toy, model = routed(name, group, attention)
        batch = toy.batch(LENGTHS)
        keep = some_keep(len(LENGTHS))
        cache = model(**batch, routing=keep, use_cache=True).past_key_values
        width = batch["input_ids"].shape[1]
        assert cache.get_seq_length() == width
        full = width * 2 * 2 * 8 * 4  # slots x (keys, values) x heads x head width x bytes
        for layer, row_keeps in zip(cache.layers, keep, strict=True):
            if group == "all":
                assert layer.nbytes() == full * int(row_keeps.sum())
            else:
                text = (batch["input_ids"] != 5) & batch["attention_mask"].bool()
                slots = sum(width if kept else int(text[i].sum()) for i, kept in enumerate(row_keeps))
                assert layer.nbytes() == slots * full // width

    def test_skipped_rows_are_not_computed(self, name: str, group: str, attention: str) -> None:
        toy, model = routed(name, group, attention)
        batch = toy.batch(LENGTHS)
        keep = some_keep(len(LENGTHS))
        tokens: list[int] = []
        hook = model.described.layers[1].self_attn.q_proj.register_forward_hook(
            lambda module, args, out: tokens.append(out.shape[0] * out.shape[1])
        )
        model(**batch, routing=keep)
        hook.remove()
        width = batch["input_ids"].shape[1]
        ran = width * int(keep[1].sum())
        if group == "vision":
            text = ((batch["input_ids"] != 5) & batch["attention_mask"].bool())[~keep[1]].sum(1)
            ran += int(text.max()) * len(text)
        assert sum(tokens) == ran

    def test_beam_search_and_sampling(self, name: str, group: str, attention: str) -> None:
        toy, model = routed(name, group, attention)
        batch = toy.batch([4, 6])
        options = {"max_new_tokens": 5, "num_beams": 3, **GREEDY}
        assert torch.equal(model.generate(**batch, **options), model.generate(**batch, **options, use_cache=False))
        several = model.generate(**batch, max_new_tokens=3, num_return_sequences=2, do_sample=True)
        assert len(several) == 4
        keep = some_keep(2)
        beams = model.generate(**batch, routing=keep, **options)
        assert torch.equal(beams, model.generate(**batch, routing=keep.repeat_interleave(3, 1), **options))

    def test_hooks_and_hidden_states_keep_their_length(self, name: str, group: str, attention: str) -> None:
        toy, model = routed(name, group, attention)
        batch = toy.batch(LENGTHS)
        seen: list[int] = []
        for i, layer in enumerate(model.described.layers):
            layer.register_forward_hook(lambda module, args, out, i=i: seen.append(i))
        out = model(**batch, routing=some_keep(len(LENGTHS)), output_hidden_states=True)
        assert len(out.hidden_states) == 5
        assert seen == [0, 1, 2, 3]

    def test_copy_and_detach(self, name: str, group: str, attention: str) -> None:
        toy, model = routed(name, group, attention)
        batch = toy.batch(LENGTHS)
        before = model(**batch).logits
        twin = copy.deepcopy(model)
        with torch.no_grad():
            for weight in twin.backbone.parameters():
                weight.mul_(1.1)
        assert not torch.allclose(twin(**batch).logits, before)
        assert torch.equal(model(**batch).logits, before)
        with model.dense():
            dense = model(**batch).logits
        keys = set(dict(toy.model.named_parameters()))
        bare = model.detach()
        assert torch.equal(bare(**batch).logits, dense)
        assert set(dict(bare.named_parameters())) == keys
        assert not any("forward" in layer.__dict__ or "_adaskip" in layer.__dict__ for layer in model.described.layers)
        assert all(weight.requires_grad for weight in bare.parameters())
        attach(bare)

    def test_gradient_reaches_routers_only(self, name: str, group: str, attention: str) -> None:
        toy, model = routed(name, group, attention)
        model.train()
        model(**toy.batch(LENGTHS)).logits.float().logsumexp(-1).sum().backward()
        assert all(w.grad is not None and w.grad.isfinite().all() for w in model.routers.parameters())
        assert any(w.grad.abs().sum() > 0 for w in model.routers.parameters())
        assert all(w.grad is None for w in model.backbone.parameters())


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
@pytest.mark.parametrize("plan", [SkipPlan.late_entry(2), SkipPlan.early_exit(1), SkipPlan.static([0, 3], "vision")])
def test_static_vision_plans(name: str, plan: SkipPlan) -> None:
    toy = make(name)
    model = attach(toy.model, plan=plan)
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
    toy = make(name)
    model = attach(toy.model, plan=SkipPlan.early_exit(0))
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
