"""DeLask by hand, against hooks that change an untouched model's layers, and that its compute is the dense model's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import adaskip
from adaskip.backbone.inspect import inspect_backbone
from adaskip.batch import Batch
from adaskip.errors import ConfigError
from adaskip.policies import DeLask
from adaskip.survey.record import record
from tests import families, toys, tuning
from tests.routing import GREEDY, LENGTHS, real


def test_a_result_is_blended_where_it_takes_back_what_the_layer_before_added() -> None:
    """Catches a blend where the two agree, the wrong share, and updates that are taken of states."""
    earlier = torch.zeros(1, 4, 2)
    before = torch.tensor([[[2.0, 0.0], [2.0, 0.0], [2.0, 0.0], [0.0, 0.0]]])
    after = torch.tensor([[[1.0, 4.0], [3.0, 4.0], [2.0, 4.0], [-8.0, 4.0]]])  # updates -1 4, 1 4, 0 4, -8 4
    got = DeLask(0.25).amend(3, earlier, before, after, request=None)  # type: ignore[arg-type]
    assert got.tolist() == [[[1.25, 3.0], [3.0, 4.0], [2.0, 4.0], [-8.0, 4.0]]]
    assert torch.equal(DeLask(1.0).amend(3, earlier, before, after, None)[0, 0], before[0, 0])  # type: ignore[arg-type]


@contextmanager
def blended(layers: Any, alpha: float, start: int, tokens: Tensor) -> Iterator[list[int]]:
    """The reference: hooks on an untouched model's layers; counts the tokens (b t) that are blended."""
    entered: list[Tensor] = []
    counts: list[int] = []

    def hook(module: Any, args: Any, kwargs: dict[str, Any], out: Any) -> Any:
        before, after = args[0] if args else kwargs["hidden_states"], out[0] if isinstance(out, tuple) else out
        entered.append(before)
        index = len(entered) - 1
        if index < start:
            return out
        cosine = torch.cosine_similarity(before - entered[index - 1], after - before, dim=-1)
        moved = (cosine < 0) & tokens
        counts.append(int(moved.sum()))
        after = torch.where(moved[..., None], (1 - alpha) * after + alpha * before, after)
        return (after, *out[1:]) if isinstance(out, tuple) else after

    handles = [layer.register_forward_hook(hook, with_kwargs=True) for layer in layers]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize(
    ("name", "start", "target"),
    [
        *((name, start, {}) for name in ("llama", "llava", "gemma2") for start in (None, 1)),
        ("llava", 1, {"group": "vision"}),
        ("llama", 1, {"phase": "prefill"}),
        ("llava", 2, {"phase": "prefill"}),
    ],
)
def test_it_is_what_hooks_make_of_the_model(name: str, start: int | None, target: dict[str, Any]) -> None:
    """Catches another layer's update, layers before the first, and tokens that the target does not speak of."""
    toy = families.make(name)
    batch = toy.collate(toy.rows(LENGTHS))
    tokens = batch["attention_mask"].bool()
    if target.get("group") == "vision":
        tokens = tokens & (batch["input_ids"] == families.IMAGE)
    prompt = tokens.clone()
    if "phase" in target:
        prompt[:, -2:] = False
        tokens = prompt
    layers = inspect_backbone(toy.model).layers
    with torch.no_grad(), blended(layers, 0.3, start or 2, tokens) as counts:
        expected = toy.model(**batch).logits
    assert min(counts) > 0
    model = adaskip.attach(toy.model, DeLask(0.3, start, adaskip.Target(**target))).eval()
    with torch.no_grad():
        got = model(**batch, prompt_mask=prompt).logits
    torch.testing.assert_close(real(got, batch), real(expected, batch), atol=1e-4, rtol=1e-4)
    with model.dense(), torch.no_grad():
        assert (real(model(**batch).logits, batch) - real(got, batch)).abs().max() > 1e-2


def test_generated_tokens_are_blended_too_and_nothing_is_saved() -> None:
    """Cached decoding follows a plan, so its decisions are fixed; catches blending in the prompt alone."""
    toy = families.make("llama")
    batch = toy.collate(toy.rows(LENGTHS))
    answers = {}
    for phase in ("both", "prefill"):
        model = adaskip.attach(toy.model, DeLask(0.9, 1, adaskip.Target(phase=phase))).eval()  # type: ignore[arg-type]
        answers[phase] = model.generate(**batch, max_new_tokens=8, **GREEDY)
        assert torch.equal(answers[phase], model.generate(**batch, max_new_tokens=8, use_cache=False, **GREEDY))
        assert model.routing.keep_rate.tolist() == [1.0] * len(LENGTHS)
        toy.model = model.detach()
    assert not torch.equal(answers["both"], answers["prefill"])


def test_a_suffix_that_runs_again_is_blended_as_in_the_whole_pass() -> None:
    """A survey hands out the first layers' results; catches an update that is lost where they are not computed."""
    model = adaskip.attach(toys.make("llama").model, DeLask(0.5, 2)).eval()
    (batch,) = tuning.batches(1, rows=4)
    recorded = record(model, batch, routed=True)
    keep = torch.ones_like(recorded.keep)
    keep[3] = False
    whole = _predicted(model, batch, keep)
    torch.testing.assert_close(recorded.rerun(keep), whole, atol=1e-5, rtol=1e-5)
    keep[1:, 0] = False  # a row that leaves layers: its state is blended with nothing of theirs
    torch.testing.assert_close(recorded.rerun(keep), _predicted(model, batch, keep), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def _predicted(model: adaskip.RoutedModel, batch: Batch, keep: Tensor) -> Tensor:
    logits = model(**batch.arguments(), routing=keep).logits
    return logits[:, :-1][batch.supervised]


@torch.no_grad()
def test_it_compiles_to_one_graph() -> None:
    """Decisions are known beforehand; catches what the tracer cannot follow, in prefill and in decoding."""
    toy = families.make("llama", "sdpa")
    batch = toy.batch([6, 6])
    del batch["position_ids"]
    model = adaskip.attach(toy.model, DeLask(0.5, 1)).eval()
    torch._dynamo.reset()
    found = []
    for run in (model, torch.compile(model, backend="eager", fullgraph=True)):
        out = run(**batch, use_cache=True)
        token = batch["input_ids"][:, :1]
        found.append((out.logits, run(input_ids=token, past_key_values=out.past_key_values, use_cache=True).logits))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_the_blend(checkpointing: bool) -> None:
    """Layers run again from the last to the first; catches an update of another layer that was seen last."""
    toy = toys.make("llama")
    model = adaskip.attach(toy.model, DeLask(0.5, 1))
    (batch,) = tuning.batches(1, rows=4)
    grads = []
    for again in (False, checkpointing):
        if again:
            toy.model.gradient_checkpointing_enable()
        model.train()
        toy.model.zero_grad()
        for weight in toy.model.parameters():
            weight.requires_grad_(True)
        model(**batch.arguments()).logits.square().mean().backward()
        grads.append([weight.grad.clone() for weight in toy.model.parameters() if weight.grad is not None])
    assert grads[0]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"alpha": 1.5}, r"alpha: expected a share in \[0, 1\], got 1.5"),
        ({"first": 0}, "first: expected a layer of at least 1, which has one before it, got 0"),
        ({"first": 4}, "first: expected a layer 1 to 3, got 4"),
        ({"target": adaskip.Target(unit="mlp")}, "target: expected unit='block'; no token leaves a layer"),
    ],
)
def test_what_it_cannot_be(given: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        adaskip.attach(toys.make("llama").model, DeLask(**given))
