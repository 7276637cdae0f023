"""Skip-Vision's rule by hand, what its merged tokens run and leave behind, and keys that are really freed."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import adaskip
from adaskip import Batch
from adaskip.backbone.tower import find_tower_layer, spread_attention
from adaskip.errors import BackboneError, ConfigError, DataError
from adaskip.policies.skip_vision import Groups, SkipVision, group_tokens
from adaskip.runtime.sight import Sight
from tests import families
from tests.routing import GREEDY, count_tokens, real

LENGTHS = [5, 9, 7]
PATCHES = 4


def routed(kept: float = 0.25, left: float = 0.25, attention: str = "eager", **more: Any) -> Any:
    """Of four patches, with the shares given here, one is kept, one left, and two are merged into it."""
    toy = families.make("llava", attention)
    return toy, adaskip.attach(toy.model, SkipVision(kept, left, **more)).eval()


# -- the rule ---------------------------------------------------------------------------------------------------------


def test_groups_by_hand() -> None:
    """Of seven patches (and a text token, 0) 1 and 7 are kept by rank; 2 to 6 are x, (.8 .6), y, x and (.6 .8).

    Their similarities to the rest, themselves included, sum up to 3.4 for x, twice, 4.16 for (.8 .6), 3.96 for (.6 .8)
    and 2.4 for y: y and the first x are left. Into the more similar of them go (.8 .6) and the second x, to x, and
    (.6 .8), to y. Catches ranks that count text, a sum over what is kept too, and the most similar ones left.
    """
    x, y = [1.0, 0.0], [0.0, 1.0]
    states = torch.tensor([[[9.0, 9.0], y, x, [0.8, 0.6], y, x, [0.6, 0.8], y]])
    attention = torch.tensor([[9.0, 8.0, 0.1, 0.2, 0.3, 0.4, 0.5, 7.0]])
    there = torch.tensor([[False, *[True] * 7]])
    groups = group_tokens(attention, states, there, 2 / 7, 2 / 7)
    assert groups.kept.nonzero()[:, 1].tolist() == [1, 7]
    assert groups.left.nonzero()[:, 1].tolist() == [2, 4]
    assert groups.merged.nonzero()[:, 1].tolist() == [3, 5, 6]
    assert groups.into[0].tolist() == [0, 1, 2, 2, 4, 2, 4, 7]


def test_groups_do_not_look_at_other_rows_or_at_length() -> None:
    """Of 576 patches 100 and 156, as published; a state's length counts for nothing; nothing left, no group."""
    draw = torch.Generator().manual_seed(0)
    states, attention = torch.randn(2, 576, 8, generator=draw), torch.rand(2, 576, generator=draw)
    there = torch.ones(2, 576).bool()
    groups = group_tokens(attention, states, there, 100 / 576, 156 / 576)
    assert [mask.sum(1).tolist() for mask in (groups.kept, groups.left, groups.merged)] == [
        [100, 100],
        [156, 156],
        [320, 320],
    ]
    assert groups.left.gather(1, groups.into)[groups.merged].all()
    longer = group_tokens(attention[1:], states[1:] * torch.rand(576, 1) * 9, there[1:], 100 / 576, 156 / 576)
    assert torch.equal(longer.merged[0], groups.merged[1])
    assert torch.equal(longer.into[0], groups.into[1])
    alone = group_tokens(attention, states, there, 0.5, 0.0)
    assert not alone.left.any()
    assert torch.equal(alone.into[0], torch.arange(576))
    none = group_tokens(attention, states, torch.zeros_like(there), 0.5, 0.2)
    assert not (none.kept | none.left | none.merged).any()


def test_the_summary_by_hand() -> None:
    """Two members are like the summary's token by 1 and .6: weights e^(1/T) to e^(.6/T), and trained ones on top."""
    _, model = routed(temperature=0.4)
    policy = model.policy
    states = torch.tensor([[[2.0, 0.0], [0.0, 7.0], [0.6, 0.8]]])
    kept, left, merged = (torch.tensor([[place == other for other in range(3)]]) for place in (1, 0, 2))
    request: Any = SimpleNamespace(memo={"groups": Groups(kept, left, merged, torch.tensor([[0, 1, 0]]))})
    share = 1 / (1 + torch.tensor((1 - 0.6) / 0.4).exp().reciprocal())
    expected = share * states[0, 0] + (1 - share) * states[0, 2]
    found = policy.enter(states, request)
    assert torch.allclose(found[0, 0], expected)
    assert torch.equal(found[0, 1:], states[0, 1:])
    policy.weight = nn.Parameter(torch.tensor([0.0, 5.0]))  # of the second dimension, .8 of the merged one
    share = 1 / (1 + torch.tensor(0.6 / 0.4 - 1 / 0.4 + 5.0 * 0.8).exp())
    assert torch.allclose(policy.enter(states, request)[0, 0], share * states[0, 0] + (1 - share) * states[0, 2])


# -- the tower --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(("place", "index"), [(-1, 1), (-2, 0), (1, 0), (2, 1)])
def test_ranks_are_the_towers_own(attention: str, place: int, index: int) -> None:
    """The tower's own eager weights, line of the class token, summed over heads; catches a layer whose states are not
    taken, the mean of patches, a causal mask, and the class token left among the patches."""
    toy = families.make("llava", attention)
    toy.model.config.vision_feature_layer = place
    batch = toy.batch(LENGTHS)
    tower = families.make("llava", "eager").model.model.vision_tower
    with torch.no_grad():
        weights = tower(batch["pixel_values"], output_attentions=True).attentions[index]
    model = adaskip.attach(toy.model, SkipVision(0.5, 0.0))
    with torch.no_grad():
        model(**batch)
    best = weights.sum(1)[:, 0, 1:].topk(2).indices
    assert find_tower_layer(toy.model, model.spec.layers, "x") is toy.model.model.vision_tower.encoder.layers[index]
    for row, first in enumerate((batch["input_ids"] == families.IMAGE).long().argmax(1).tolist()):
        kept = model.routing.keep[1, row, first : first + PATCHES]
        assert sorted(kept.nonzero().flatten().tolist()) == sorted(best[row].tolist())


def test_patches_that_are_no_tokens_are_refused() -> None:
    vision = torch.tensor([[True, True, False], [True, True, True]])
    with pytest.raises(
        DataError, match="expected one for each patch of the vision tower, got 5 for 8 patches; pass the"
    ):
        spread_attention([torch.rand(2, 5)], vision)
    whole = torch.rand(1, 5)  # a model that takes the class token along
    assert torch.equal(spread_attention([whole], vision)[vision], whole[0])
    once = torch.tensor([[True, True], [False, True]])
    assert spread_attention([torch.tensor([[0.0, 1.0, 2.0, 3.0]])], once.repeat_interleave(2, 0)).tolist() == [
        [1.0, 2.0],
        [1.0, 2.0],
        [0.0, 3.0],
        [0.0, 3.0],
    ]
    toy, model = routed()
    batch = toy.batch(LENGTHS)
    pictures = batch.pop("pixel_values")
    with pytest.raises(DataError, match="got 12 for 0 patches; pass the processor's pixel_values along"):
        model(**batch)
    model(**batch, pixel_values=pictures)  # and nothing is left behind of the call that failed


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "qwen2_vl",
            "Qwen2VLForConditionalGeneration: SkipVision ranks vision tokens by .* this tower has no class token",
        ),
        (
            "llava_onevision",
            "SkipVision ranks vision tokens by .* this tower has no class token; choose another policy",
        ),
        ("video_llava", "SkipVision reads the attention of one vision tower, and 2 were found"),
        ("llama", "group 'vision': LlamaForCausalLM has no vision tokens in its sequence"),
    ],
)
def test_models_that_it_refuses(name: str, text: str) -> None:
    """Before anything is touched; catches one that attaches, and fails at its first picture."""
    toy = families.make(name)
    with pytest.raises(BackboneError, match=text):
        adaskip.attach(toy.model, SkipVision())
    assert all("forward" not in module.__dict__ for module in toy.model.modules())


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"kept": 1.5}, r"kept: expected a share in \[0, 1\], got 1.5"),
        ({"kept": 0.7, "left": 0.4}, r"kept, left: expected shares that together are in \(0, 1\], got 0.7 and 0.4"),
        ({"kept": 0, "left": 0}, "kept, left: expected shares that together"),
        ({"temperature": 0}, "temperature: expected a number above 0, got 0"),
        ({"learns": 1}, "learns: expected True or False, got 1"),
        ({"target": adaskip.Target(group="vision")}, "target: expected scope='token', unit='sublayers'; single vision"),
    ],
)
def test_what_it_cannot_be(given: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        SkipVision(**given)


# -- what runs, and what stays ----------------------------------------------------------------------------------------


def test_merged_tokens_attend_and_run_no_mlp() -> None:
    """Two of a row's four patches leave every MLP, none an attention; catches sites that are taken for layers."""
    toy, model = routed()
    batch = toy.batch([7, 7, 7])
    layer = model.spec.layers[2]
    with torch.no_grad(), count_tokens(layer) as seen:
        model(**batch)
    tokens = int(batch["attention_mask"].sum())
    assert seen[layer.self_attn.q_proj] == [tokens]
    assert seen[layer.mlp.gate_proj] == [tokens - 3 * 2]
    share = model.routing.share
    assert torch.equal(share[0::2], torch.ones(4, 3))
    assert torch.equal(share[1::2], torch.full((4, 3), 0.5))


def stored(cache: Any) -> list[int]:
    """Bytes that the cache's tensors hold on to, storage and not view, by layer."""
    return [sum(x.untyped_storage().nbytes() for x in (layer.keys, layer.values)) for layer in cache.layers]


def test_keys_are_freed() -> None:
    """Two of the four patches of every row are gone from memory, in every layer; catches keys that are only hidden, a
    view of what was there, and a routing that claims bytes which are gone."""
    toy, model = routed()
    batch = toy.batch(LENGTHS)
    with torch.no_grad():
        with model.dense():
            dense = model.backbone(**batch, use_cache=True).past_key_values
        cache = model(**batch, use_cache=True).past_key_values
    length, rows = batch["input_ids"].shape[1], len(LENGTHS)
    slot = stored(dense)[0] // (rows * length)
    assert stored(cache) == [rows * (length - 2) * slot] * 4
    assert cache.nbytes() == 4 * rows * (length - 2) * slot == int(model.routing.kv_bytes.sum())
    assert cache.get_seq_length() == length
    gone = ~model.routing.keep[1] & (batch["input_ids"] == families.IMAGE)
    for layer in cache.layers:
        for row in range(rows):
            assert {*range(length)} - {*layer.index[row].tolist()} == {*gone[row].nonzero().flatten().tolist()}


def test_rows_that_free_different_numbers() -> None:
    """A row without a picture frees nothing, and the other's holes are no bytes; catches a cut that is one for all."""
    toy, model = routed()
    batch = toy.batch([9, 9])
    batch["input_ids"][1] = batch["input_ids"][1].masked_fill(batch["input_ids"][1] == families.IMAGE, 20)
    batch["pixel_values"] = batch["pixel_values"][:1]
    with torch.no_grad():
        cache = model(**batch, use_cache=True).past_key_values
    length = batch["input_ids"].shape[1]
    assert (cache.layers[0].index >= 0).sum(1).tolist() == [length - 2, length]
    ratio = model.routing.kv_bytes.tolist()
    assert ratio[0] / ratio[1] == (length - 2) / length
    options = {"max_new_tokens": 4, **GREEDY}
    assert torch.equal(model.generate(**batch, **options), model.generate(**batch, **options, use_cache=False))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_an_answer_reads_the_same_with_a_cache_and_without(attention: str, side: str) -> None:
    """Whole, in one pass, and token after token from a cache whose keys are freed; then a policy that frees nothing
    reads another answer. Catches keys that stay visible in a whole pass, or hidden ones of the wrong tokens."""
    toy, model = routed(attention=attention)
    batch = toy.collate(toy.rows([7, 7, 7] if side == "right" else LENGTHS), side)
    answer = torch.randint(16, 80, (3, 4), generator=torch.Generator().manual_seed(0))
    length = batch["input_ids"].shape[1]
    ids, mask = (
        torch.cat([batch["input_ids"], answer], 1),
        torch.nn.functional.pad(batch["attention_mask"], (0, 4), value=1),
    )
    prompt = mask.bool() & (torch.arange(length + 4) < length)
    whole: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "pixel_values": batch["pixel_values"]}
    with torch.no_grad():
        expected = model(**whole, prompt_mask=prompt, use_cache=False).logits[:, length - 1 :]
        with model.soft():
            soft = model(**whole, prompt_mask=prompt).logits[:, length - 1 :]
        mixed = model(**whole, prompt_mask=prompt, use_cache=True)
        out = model(**batch, use_cache=True)
        steps = [out.logits[:, -1:]]
        for i in range(4):
            out = model(
                input_ids=answer[:, i : i + 1],
                attention_mask=mask[:, : length + i + 1],
                past_key_values=out.past_key_values,
            )
            steps.append(out.logits)
    assert (torch.cat(steps, 1) - expected).abs().max() <= 1e-4
    assert (soft - expected).abs().max() <= 1e-4
    assert (mixed.logits[:, length - 1 :] - expected).abs().max() <= 1e-4
    assert stored(mixed.past_key_values) == stored(out.past_key_values)
    model.policy.forget = lambda request: torch.zeros_like(request.prompt)
    with torch.no_grad():
        other = model(**whole, prompt_mask=prompt, use_cache=False).logits[:, length - 1 :]
    assert torch.equal(other[:, 0], expected[:, 0]) or (other[:, 0] - expected[:, 0]).abs().max() <= 1e-5
    assert (other[:, 1:] - expected[:, 1:]).abs().max() > 1e-3


def test_the_flops_that_are_saved_are_those_that_are_not_computed() -> None:
    """Prompt and answer from a cache, as torch counts them; catches keys that are freed and still paid for."""
    toy, model = routed()
    batch = toy.batch([8])
    options = {"max_new_tokens": 5, **GREEDY}
    with FlopCounterMode(display=False) as dense, model.dense():
        model.backbone.generate(**batch, **options)
    with FlopCounterMode(display=False) as counted:
        model.generate(**batch, **options)
    # what ranks: one query of the tower's layer, in two heads over five keys of eight numbers
    own = 2 * 2 * 5 * 8 + _grouping(batch)
    saved = float((model.routing.dense - model.routing.executed).sum())
    assert saved == dense.get_total_flops() - (counted.get_total_flops() - own) > 0


def _grouping(batch: dict[str, Tensor]) -> int:
    """FLOPs of the similarities: each token with the sum of all, and with each other."""
    tokens = batch["input_ids"].shape[1]
    return 2 * tokens * 32 + 2 * tokens * tokens * 32


def test_beams_samples_and_assistants() -> None:
    """Rows that are reordered, repeated, and rolled back; catches a cache or a ledger that loses who was freed."""
    toy, model = routed()
    batch = toy.batch(LENGTHS)
    options = {"max_new_tokens": 5, **GREEDY}
    for more in ({"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}):
        cached = model.generate(**batch, **options, **more)
        assert torch.equal(cached, model.generate(**batch, **options, **more, use_cache=False))
    one = toy.batch([6])
    plain = model.generate(**one, **options)
    assert torch.equal(model.generate(**one, **options, prompt_lookup_num_tokens=2), plain)


def test_rolled_back_keys_stay_freed() -> None:
    toy, model = routed()
    batch = toy.batch(LENGTHS)
    with torch.no_grad():
        cache = model(**batch, use_cache=True).past_key_values
        before, length = stored(cache), cache.length
        more = torch.full((3, 2), 30)
        mask = torch.nn.functional.pad(batch["attention_mask"], (0, 2), value=1)
        model(input_ids=more, attention_mask=mask, past_key_values=cache)
        cache.crop(-2)
    assert (cache.length, stored(cache)) == (length, before)
    cache.batch_select_indices(torch.tensor([2, 0]))
    assert cache.nbytes() == before[0] * 4 * 2 // 3
    assert cache.ledger.lost[0].shape[0] == 2


def test_decisions_that_are_given_are_followed_whole() -> None:
    """A pass that is told what another decided gives what that gave; told to run everything, the dense model's."""
    toy, model = routed()
    batch = toy.batch(LENGTHS)
    labels = batch["input_ids"].masked_fill(torch.arange(batch["input_ids"].shape[1]) < 10, -100)
    with torch.no_grad():
        own = real(model(**batch, labels=labels, use_cache=False).logits, batch)
        keep = model.routing.keep
        assert torch.equal(real(model(**batch, labels=labels, routing=keep, use_cache=False).logits, batch), own)
        dense = real(model(**batch, labels=labels, routing=torch.ones_like(keep), use_cache=False).logits, batch)
        with model.keep_all():
            kept = real(model(**batch, labels=labels, use_cache=False).logits, batch)
        with model.dense():
            expected = real(model.backbone(**batch).logits, batch)
    assert (dense - expected).abs().max() <= 1e-5
    assert (kept - expected).abs().max() <= 1e-5
    assert (own - expected).abs().max() > 1e-3


def test_threads_and_copies() -> None:
    """Each thread ranks by its own pictures, a copy by what its own tower sees; catches hooks of the first model."""
    toy, model = routed()
    batches = [toy.batch(LENGTHS, seed=seed) for seed in range(4)]
    options = {"max_new_tokens": 3, **GREEDY}
    expected = [model.generate(**batch, **options) for batch in batches]
    found: dict[int, Tensor] = {}

    def answer(number: int) -> None:
        for _ in range(3):
            found[number] = model.generate(**batches[number], **options)

    threads = [threading.Thread(target=answer, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[number], expected[number]) for number in range(4))
    twin = copy.deepcopy(model)
    model.detach()
    assert torch.equal(twin.generate(**batches[0], **options), expected[0])
    layer = find_tower_layer(model.backbone, model.spec.layers, "x")
    hooks = [*layer._forward_hooks.values(), *layer._forward_pre_hooks.values()]
    assert not [hook for hook in hooks if isinstance(getattr(hook, "__self__", None), Sight)]


def test_a_prompt_that_goes_on_frees_its_new_pictures_too() -> None:
    """A second turn from the cache of the first, by generate, which knows how long the prompt is."""
    toy, model = routed()
    first, second = toy.batch([5]), toy.batch([6], seed=1)
    with torch.no_grad():
        cache = model(**first, use_cache=True).past_key_values
    ids = torch.cat([first["input_ids"], second["input_ids"]], 1)
    one = ids.shape[1]
    model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=second["pixel_values"],
        past_key_values=cache,
        max_new_tokens=2,
        **GREEDY,
    )
    held = {*cache.layers[0].index[0].tolist()}
    assert len(held) == one - 4 + 1


def test_an_answer_behind_a_second_turn_in_one_pass() -> None:
    """Prompt and answer from a cache, in one pass as in two; catches past keys that are hidden in place of new ones."""
    toy, model = routed()
    first, second = toy.batch([5]), toy.batch([6], seed=1)
    answer, length = torch.tensor([[31, 44, 57]]), first["input_ids"].shape[1] + second["input_ids"].shape[1]
    mask = torch.ones(1, length + 3).long()
    found = []
    for parts in ([torch.cat([second["input_ids"], answer], 1)], [second["input_ids"], answer]):
        with torch.no_grad(), model.runtime.state.using(prompt_length=length):
            cache = model.backbone(**first, use_cache=True).past_key_values
            for number, ids in enumerate(parts):
                logits = model.backbone(
                    input_ids=ids,
                    attention_mask=mask[:, : cache.length + ids.shape[1]],
                    pixel_values=second["pixel_values"] if number == 0 else None,
                    past_key_values=cache,
                ).logits
        found.append((logits[:, -3:], cache.nbytes()))
    assert (found[0][0] - found[1][0]).abs().max() <= 1e-5
    assert found[0][1] == found[1][1]


# -- training ---------------------------------------------------------------------------------------------------------


def test_summary_weights_are_trained_and_saved(tmp_path: Path) -> None:
    """`RouterTuner` moves them, what they give is what is read back, and from 0 on they give what no training does."""
    toy, model = routed(learns=True)
    batch = toy.batch([8, 8])
    labels = batch["input_ids"].masked_fill(torch.arange(batch["input_ids"].shape[1]) < 10, -100)
    data = Batch(batch, labels, prompt_mask=labels == -100, kind=["a", "b"])
    with torch.no_grad():
        before = model(**batch).logits
        _, plain = routed()
        assert torch.equal(plain(**batch).logits, before)
    objective = adaskip.Objective(keep=0.5, bound_weight=0.0, warmup=0.0)
    tuner = adaskip.RouterTuner(model, objective, learning_rate=0.1)
    trainer = lightning.Trainer(
        max_steps=4, logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu"
    )
    trainer.fit(tuner, torch.utils.data.DataLoader([data] * 4, batch_size=None), None)
    assert (model.policy.weight != 0).all()
    model.eval()
    with torch.no_grad():
        after = model(**batch).logits
    assert (after - before).abs().max() > 1e-4
    model.save_pretrained(tmp_path)
    again = adaskip.RoutedModel.from_pretrained(tmp_path, families.make("llava", "eager").model)
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, after)
