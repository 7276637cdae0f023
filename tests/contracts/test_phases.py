"""Skipping only while the prompt is read, or only in what is generated: exact, cached, in training, counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from adaskip import RoutedModel, RouterConfig, SkipPlan, Target, attach, cut
from adaskip.errors import ConfigError
from tests import families
from tests.families import LAYERS, Toy
from tests.routing import GREEDY, LENGTHS, decide, masked, real, some_keep, watched

ANSWER = 3
"""Tokens of the answer that stands behind each prompt in a whole pass; rows are padded on the left."""

CASES = [
    (name, target)
    for name, targets in {
        "llama": [
            {"phase": "prefill"},
            {"phase": "decode"},
            {"phase": "prefill", "kv": "kept"},
            {"phase": "prefill", "unit": "attention"},
            {"phase": "decode", "unit": "attention"},
            {"phase": "prefill", "unit": "mlp"},
            {"phase": "decode", "unit": "mlp"},
            {"phase": "prefill", "unit": "sublayers", "kv": "kept"},
            {"phase": "decode", "unit": "sublayers"},
            {"phase": "prefill", "scope": "token"},
            {"phase": "decode", "scope": "token"},
            {"phase": "decode", "scope": "token", "kv": "kept"},
        ],
        "llava": [{"phase": "prefill", "group": "vision"}, {"phase": "decode"}, {"phase": "prefill"}],
        "qwen2_vl": [{"phase": "decode"}, {"phase": "prefill"}],
        "gemma2": [{"phase": "decode"}, {"phase": "prefill", "kv": "kept"}],
        "falcon": [{"phase": "decode"}],
        "mixtral": [{"phase": "prefill"}],
        "deepseek_v3": [{"phase": "decode"}],
    }.items()
    for target in targets
]


def routed(name: str, target: dict[str, Any]) -> tuple[Toy, RoutedModel]:
    toy = families.make(name, "eager")
    return toy, decide(attach(toy.model, RouterConfig(**target)))


def whole(toy: Toy, lengths: list[int] = LENGTHS) -> tuple[dict[str, Tensor], Tensor]:
    """Prompts with answers, and which of their tokens are prompt."""
    batch = toy.batch(lengths)
    prompt = batch["attention_mask"].bool().clone()
    prompt[:, -ANSWER:] = False
    return batch, prompt


ids = [f"{name}-{'-'.join(target.values())}" for name, target in CASES]


@pytest.mark.parametrize(("name", "target"), CASES, ids=ids)
class TestPhase:
    @torch.no_grad()
    def test_training_equals_skipping(self, name: str, target: dict[str, Any]) -> None:
        toy, model = routed(name, target)
        batch, prompt = whole(toy)
        for keep in (None, some_keep(len(LENGTHS), target.get("unit", "block"))):
            skipped = model(**batch, prompt_mask=prompt, routing=keep).logits
            decided = model.routing.keep
            with model.soft():
                soft = model(**batch, prompt_mask=prompt, routing=keep).logits
            assert torch.equal(model.routing.keep, decided)
            assert not decided.all()
            assert (real(soft, batch) - real(skipped, batch)).abs().max() <= 1e-4
            with model.dense():
                dense = model(**batch).logits
            before = (dense - skipped)[prompt].abs().max()
            behind = (dense - skipped)[:, -ANSWER:].abs().max()
            assert behind > 1e-3
            if target["phase"] == "decode":  # the prompt runs whole
                assert before <= 1e-5
            else:
                assert before > 1e-3

    @torch.no_grad()
    def test_what_is_computed_is_that_and_no_more(self, name: str, target: dict[str, Any]) -> None:
        """Against a model whose layers all run and are overwritten where decisions say so, and torch's own count."""
        toy, model = routed(name, target)
        batch, prompt = whole(toy)
        unit = target.get("unit", "block")
        keep = some_keep(len(LENGTHS), unit)
        speaks = batch["attention_mask"].bool() & (prompt if target["phase"] == "prefill" else ~prompt)
        if target.get("group") == "vision":
            speaks &= batch["input_ids"] == families.IMAGE
        with watched(model, unit) as left:
            skipped = model(**batch, prompt_mask=prompt, routing=keep, use_cache=False).logits
        for index, gone in left.items():
            assert torch.equal(real(gone, batch), real(speaks & ~keep[index][:, None], batch))
        assert len(left) == len(model.sites)
        with model.dense(), masked(model, keep[..., None] | ~speaks, batch, unit, "all"):
            expected = model.backbone(**batch, use_cache=False).logits
        gap = (real(expected, batch) - real(skipped, batch)).abs().max()
        if target["phase"] == "prefill" and target.get("kv") != "kept" and unit != "mlp":  # the answer misses keys
            assert gap > 1e-3
        else:
            assert gap <= 1e-4
        assert torch.equal(model.routing.keep_rate < 1, speaks.any(1) & ~keep.all(0))
        if name in ("mixtral", "falcon", "deepseek_v3") or target.get("scope") == "token":
            return  # what torch counts of their attention depends on the cut, and single tokens are filled up to rows
        batch, prompt = whole(toy, [9] * len(LENGTHS))
        with FlopCounterMode(display=False) as dense, model.dense():
            model.backbone(**batch, use_cache=False)
        with FlopCounterMode(display=False) as sparse:
            model(**batch, prompt_mask=prompt, routing=keep, use_cache=False)
        saved = float((model.routing.dense - model.routing.executed).sum())
        assert saved == dense.get_total_flops() - sparse.get_total_flops() > 0

    def test_cached_equals_uncached(self, name: str, target: dict[str, Any]) -> None:
        toy, model = routed(name, target)
        batch = toy.batch(LENGTHS)
        options: dict[str, Any] = {"max_new_tokens": 6, "return_dict_in_generate": True, "output_logits": True}
        for keep in (None, some_keep(len(LENGTHS), target.get("unit", "block"))):
            cached = model.generate(**batch, routing=keep, **options, **GREEDY)
            decided, rate = model.routing.keep, model.routing.keep_rate
            again = model.generate(**batch, routing=keep, **options, **GREEDY, use_cache=False)
            scale = cached.logits[0].abs().max().clamp(min=1)
            assert (torch.stack(cached.logits) - torch.stack(again.logits)).abs().max() <= 1e-4 * scale
            assert torch.equal(cached.sequences, again.sequences)
            assert ((rate > 0) & (rate <= 1)).all()
            assert (rate < 1).any()
            if target.get("scope") != "token":
                assert torch.equal(decided, model.routing.keep)
            if target["phase"] == "decode":  # nothing is skipped yet
                with model.dense():
                    first = model(**batch).logits[:, -1]
                assert (cached.logits[0] - first).abs().max() <= 1e-4 * scale

    def test_rows_are_independent(self, name: str, target: dict[str, Any]) -> None:
        toy, model = routed(name, target)
        rows = toy.rows(LENGTHS)
        together = model.generate(**toy.collate(rows), max_new_tokens=5, **GREEDY)[:, -5:]
        routing = model.routing
        for i, row in enumerate(rows):
            alone = model.generate(**toy.collate([row]), max_new_tokens=5, **GREEDY)[:, -5:]
            assert torch.equal(alone[0], together[i])
            assert torch.allclose(model.routing.keep_rate, routing.keep_rate[i])

    def test_saving(self, name: str, target: dict[str, Any], tmp_path: Path) -> None:
        toy, model = routed(name, target)
        batch = toy.batch(LENGTHS)
        expected = model.generate(**batch, max_new_tokens=4, **GREEDY)
        model.save_pretrained(tmp_path)
        again = RoutedModel.from_pretrained(tmp_path, families.make(name, "eager").model)
        assert again.target == model.target
        assert torch.equal(again.generate(**batch, max_new_tokens=4, **GREEDY), expected)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("name", ["llama", "llava"])
def test_prompts_by_path(name: str, phase: Any) -> None:
    """`generate_many` gives each prompt what `generate` gives it, snapped to few paths too."""
    toy, model = routed(name, {"phase": phase})
    rows = toy.rows(LENGTHS)
    items = [toy.collate([row]) for row in rows]
    many = model.generate_many(items, max_new_tokens=4, **GREEDY)
    for item, answer in zip(items, many.answers, strict=True):
        assert torch.equal(model.generate(**item, max_new_tokens=4, **GREEDY)[0, -4:], answer.tokens)
        assert float(model.routing.executed) == pytest.approx(answer.executed, rel=0.02)  # one chunk, or two
        assert float(model.routing.dense) == pytest.approx(answer.dense, rel=0.02)
    snapped = model.generate_many(items, max_new_tokens=4, paths=1, **GREEDY)
    assert len({answer.path for answer in snapped.answers}) == 1
    assert snapped.keep_rate >= many.keep_rate


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_routers_learn_under_a_phase(phase: Any) -> None:
    """The gates' gradient comes from the answer alone; a layer's price is paid in the phase that skips."""
    toy, model = routed("llama", {"phase": phase})
    batch, prompt = whole(toy)
    model.train()
    with model.explore(torch.Generator().manual_seed(0)):
        loss = model(**batch, prompt_mask=prompt).logits[:, -ANSWER:].logsumexp(-1).sum()
    loss.backward()
    assert all(head.outer.weight.grad.abs().sum() > 0 for head in model.routers)
    run, left = model.flops()
    share = (left / run).mean()
    with torch.no_grad():
        model(**batch, prompt_mask=prompt)
    other = attach(families.make("llama").model, RouterConfig())
    with torch.no_grad():
        other(**batch, prompt_mask=prompt)
    assert (other.flops()[1] == 0).all()
    assert 0 < share < 1


def test_a_plan_of_one_phase() -> None:
    """A plan that leaves out layers in decoding alone: the first token is the dense model's."""
    toy = families.make("llama")
    batch = toy.batch(LENGTHS)
    dense = toy.model.generate(**batch, max_new_tokens=1, **GREEDY)
    model = attach(toy.model, SkipPlan.static([1, 2], phase="decode"))
    assert torch.equal(model.generate(**batch, max_new_tokens=1, **GREEDY), dense)
    model.generate(**batch, max_new_tokens=6, **GREEDY)
    assert (model.routing.keep_rate < 1).all()
    with pytest.raises(ConfigError, match="phase 'decode' a part of every layer still runs"):
        cut(model)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"phase": "decode", "group": "vision"}, "phase='decode' with group='vision' skips nothing"),
        ({"phase": "decode", "kv": "kept"}, "kv='kept' is pure waste for group 'all'"),
        ({"phase": "later"}, "phase: expected both | prefill | decode, got 'later'"),
    ],
)
def test_what_does_not_go_together(fields: dict[str, Any], text: str) -> None:
    for make in (Target, RouterConfig, SkipPlan):
        with pytest.raises(ConfigError, match=text.replace("|", r"\|")):
            make(**fields)
    assert LAYERS == 4
