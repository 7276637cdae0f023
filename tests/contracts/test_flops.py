"""The FLOPs that are claimed are those that torch counts in the decoder layers as they run; the bytes are the cache's.

Rows are equally long here: filling that a batch computes along with its rows is nobody's work in the claim. Then
nothing is left to tolerate, and the comparison is exact, but for the rounding of a mean. Attention is eager, since the
counter gives no FLOPs to SDPA's CPU kernel, and so are experts, since it has no formula for grouped products.

No family is an exception in a prefill. Two things are counted as they run, not as they are meant: llama4_text computes
every expert for every token, on zeros where the token was not routed to it; diffllama asks its attention twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from adaskip.backbone.inspect import inspect_backbone
from adaskip.plan import SkipPlan
from adaskip.policies.learned.config import RouterConfig
from adaskip.runtime.attach import RoutedModel, attach
from adaskip.runtime.cost import CostModel, Flops
from tests import families, toys
from tests.families import EAGER_ONLY, LAYERS, TEXT, VISION
from tests.routing import GREEDY, LENGTHS, caches, some_keep

MIXED = torch.tensor([[True, True], [True, False], [False, True], [False, False]])
ALL = [(unit, "all", "absent") for unit in ("block", "attention", "mlp")]
PICTURE = [*((unit, "vision", "absent") for unit in ("block", "mlp")), ("block", "vision", "kept")]
HALVES = [("llama", "sublayers", "all", "absent"), ("llava", "sublayers", "vision", "kept")]
CASES = [(name, *case) for name in toys.MAKERS for case in (*ALL, *(PICTURE if toys.make(name).images else ()))]
CASES += [case for case in HALVES if case[0] in toys.MAKERS]
REDONE = frozenset(["axk1", "deepseek_v2", "deepseek_v3", "doge", "glm4_moe_lite", "minicpm3", "youtu"])
"""Families that in every step make something anew of all that is cached: keys and values out of latents (doge: the
weights of its mask out of values). The claim has it once a token, as it would be if it were kept; only their prefill is
compared."""
MIXTURES = ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "jetmoe", "aria_text"]


@torch.no_grad()
def counted(layers: tuple[nn.Module, ...], call: Callable[[], Any]) -> tuple[Tensor, Any]:
    """float64 (3 l) of a call: the layers' products with weights but the MLP's, those of states, and the MLP's."""
    found = torch.zeros(3, len(layers), dtype=torch.float64)
    counter = FlopCounterMode(display=False)

    def now() -> Tensor:
        by_kind = counter.get_flop_counts().get("Global", {})
        paired = sum(flops for kind, flops in by_kind.items() if "bmm" in str(kind))
        return torch.tensor([sum(by_kind.values()) - paired, paired], dtype=torch.float64)

    def watch(module: nn.Module, *signs: tuple[int, int, int]) -> None:
        started: list[Tensor] = []

        def leave(*_: Any) -> None:
            spent = now() - started.pop()
            for part, index, sign in signs:
                found[part, index] += sign * spent[min(part, 1) if sign > 0 and part < 2 else 0]

        handles.append(module.register_forward_pre_hook(lambda *_: started.append(now())))
        handles.append(module.register_forward_hook(leave))

    handles: list[Any] = []
    for index, layer in enumerate(layers):
        watch(layer, (0, index, 1), (1, index, 1))
        if isinstance(mlp := getattr(layer, "mlp", None), nn.Module):
            watch(mlp, (0, index, -1), (2, index, 1))
    try:
        with counter:
            out = call()
    finally:
        for handle in handles:
            handle.remove()
    return found, out


def claimed(flops: Flops) -> Tensor:
    """float64 (3 l): all rows together, and the sites of each layer."""
    parts = torch.stack([flops.projections, flops.attention, flops.mlp]).sum(-1)
    return parts.unflatten(1, (LAYERS, -1)).sum(-1)


def step(batch: dict[str, Tensor], cache: Any) -> dict[str, Any]:
    """Another token for each row."""
    mask = torch.cat([batch["attention_mask"], torch.ones_like(batch["input_ids"][:, :1])], 1)
    given = {"input_ids": batch["input_ids"][:, -1:], "attention_mask": mask, "past_key_values": cache}
    if "mm_token_type_ids" in batch:  # it reads its places off a mask unless it is told
        given["mm_token_type_ids"] = torch.zeros_like(given["input_ids"])
        given["position_ids"] = mask.sum(1).sub(1).expand(3, -1)[..., None]
    return given


@pytest.mark.parametrize(("name", "unit", "group", "kv"), CASES)
def test_parts_are_what_ran_in_prefill_and_in_a_step(name: str, unit: Any, group: Any, kv: Any) -> None:
    """The untouched model, rows that decide differently, and a static plan."""
    toy = toys.make(name, "eager")
    batch, layers = toy.batch([6, 6]), inspect_backbone(toy.model).layers
    prefill, out = counted(layers, lambda: toy.model(**batch, use_cache=True))
    one, _ = counted(layers, lambda: toy.model(**step(batch, out.past_key_values)))
    assert (prefill > 0).all()
    for plan in (None, SkipPlan.static([0, 3], group, unit=unit, kv=kv)):
        policy = plan or RouterConfig(unit=unit, group=group, kv=kv)
        model = attach(toy.model, policy)
        routing = None if plan else torch.cat([MIXED, MIXED.roll(1, 0)])[: len(model.sites)]
        ran, out = counted(layers, lambda: model(**batch, routing=routing, use_cache=True))  # noqa: B023
        first, dense = (claimed(model.flops_by_part(dense)) for dense in (False, True))
        assert torch.equal(first, ran)
        assert torch.equal(dense, prefill)
        assert model.routing.executed.sum() == ran.sum() < prefill.sum()
        ran, _ = counted(layers, lambda: model(**step(batch, out.past_key_values)))  # noqa: B023
        later = claimed(model.flops_by_part()) - first
        if plan is None and (unit, group, kv) == ("block", "vision", "absent"):
            assert (later[1] <= ran[1]).all()  # beside a row that holds the picture, one that does not is filled up
            later[1] = ran[1]
        assert torch.equal(later, ran)
        assert torch.equal(claimed(model.flops_by_part(dense=True)) - dense, one)
        model.detach()


def test_tokens_that_decide_for_themselves() -> None:
    toy = toys.make("llama", "eager")
    model = attach(toy.model, RouterConfig(scope="token"))
    keep = torch.tensor([[1, 0, 1, 1, 0, 0], [0, 1, 0, 0, 1, 1]]).bool().expand(4, -1, -1)
    ran, _ = counted(model.spec.layers, lambda: model(**toy.batch([6, 6]), routing=keep))
    assert torch.equal(claimed(model.flops_by_part()), ran)
    assert model.routing.executed.sum() == ran.sum()


@pytest.mark.parametrize("name", [*TEXT, *VISION])
def test_every_family(name: str) -> None:
    """Prefill of the untouched model, and prefill and a step of a routed one, layer by layer."""
    toy = families.make(name, "eager")
    if toy.model._can_set_experts_implementation():
        toy.model.set_experts_implementation("eager")
    batch = toy.batch([9, 9])
    layers = inspect_backbone(toy.model).layers
    untouched, _ = counted(layers, lambda: toy.model(**batch))
    model = attach(toy.model)
    keep = torch.cat([MIXED[:3], torch.ones(1, 2).bool()])
    ran, out = counted(layers, lambda: model(**batch, routing=keep, use_cache=caches(toy) or None))
    first = claimed(model.flops_by_part()).sum(0)
    assert first.tolist() == pytest.approx(ran.sum(0).tolist(), rel=1e-9)
    assert claimed(model.flops_by_part(dense=True)).sum(0).tolist() == pytest.approx(
        untouched.sum(0).tolist(), rel=1e-9
    )
    if caches(toy) and name in TEXT and name not in REDONE:
        more = step(batch, out.past_key_values)
        if "position_ids" in batch:
            more["position_ids"] = batch["position_ids"][:, -1:] + 1
        ran, _ = counted(layers, lambda: model(**more))
        later = claimed(model.flops_by_part()).sum(0) - first
        assert later.tolist() == pytest.approx(ran.sum(0).tolist(), rel=1e-9)


@pytest.mark.parametrize("name", [name for name in (*MIXTURES, "llama", "gpt2", "llava") if name in {**TEXT, **VISION}])
def test_no_kernel_changes_what_a_model_costs(name: str) -> None:
    """Eager or SDPA; experts one by one, gathered, or grouped; in half precision; in inference mode."""

    def figures(kernel: str = "eager", experts: str | None = None, dtype: torch.dtype = torch.float32) -> Any:
        model = families.make(name, kernel).model.to(dtype)
        if experts:
            model.set_experts_implementation(experts)
        cost = CostModel.of(inspect_backbone(model))
        return cost.token.tolist(), cost.pair.tolist(), cost.head

    plain = figures()
    with torch.inference_mode():
        assert figures() == plain
        assert figures("eager" if name in EAGER_ONLY else "sdpa") == plain
    assert figures(dtype=torch.bfloat16) == plain
    if name not in EAGER_ONLY:
        assert figures("sdpa") == plain
    if families.make(name).model._can_set_experts_implementation():
        for experts in ("eager", "batched_mm", "grouped_mm"):
            assert figures(experts=experts) == plain


def test_a_mixture_counts_the_experts_that_a_token_meets() -> None:
    """Two of four experts: the MLP's figure is that of two experts and the gate."""
    model = families.make("mixtral").model
    layer = model.config
    expert = 3 * layer.hidden_size * layer.intermediate_size
    cost = CostModel.of(inspect_backbone(model))
    assert cost.token[2].tolist() == [2.0 * (2 * expert + 4 * layer.hidden_size)] * LAYERS


class Hidden(nn.Linear):
    """A linear map whose products no counter sees, as those of a fused kernel."""

    def forward(self, states: Tensor) -> Tensor:
        return (states[..., None, :] * self.weight).sum(-1)


def test_kernels_that_hide_their_products_and_weights_that_are_not_there() -> None:
    model = toys.make("llama").model
    plain = CostModel.of(inspect_backbone(model))
    for module in model.model.layers.modules():
        if type(module) is nn.Linear:
            module.__class__ = Hidden
    hidden = CostModel.of(inspect_backbone(model))
    nowhere = CostModel.of(inspect_backbone(model.to("meta")))
    assert torch.equal(hidden.token, plain.token)
    assert torch.equal(nowhere.token.sum(0), plain.token.sum(0))
    assert torch.equal(nowhere.pair, plain.pair)
    assert plain.head == hidden.head == nowhere.head == 2 * toys.VOCABULARY * 32


class Packed(Tensor):
    """A weight whose storage cannot be looked at, as of quantised and distributed models."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Packed:
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, strides=inner.stride())

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*(x.inner if isinstance(x, Packed) else x for x in args), **(kwargs or {}))
        return Packed(out) if func is torch.ops.aten.detach.default else out


def test_weights_that_cannot_be_looked_at() -> None:
    model = toys.make("llama").model
    plain = CostModel.of(inspect_backbone(model))
    for module in model.model.layers.modules():
        if type(module) is nn.Linear:
            module.weight = nn.Parameter(Packed(module.weight.data), requires_grad=False)
    assert torch.equal(CostModel.of(inspect_backbone(model)).token, plain.token)


def test_the_head_is_counted_apart() -> None:
    """At every position of a plain call, at one a token of a generation; never in a keep rate."""
    toy = toys.make("llava", "eager")
    model = attach(toy.model, SkipPlan.static([1, 2]))
    batch = toy.batch([6, 6])
    for call, positions in (
        (lambda: model(**batch), batch["input_ids"].shape[1]),
        (lambda: model.generate(**batch, max_new_tokens=3, **GREEDY), 3),
    ):
        ran, _ = counted((model.backbone.get_output_embeddings(),), call)
        flops = model.flops_by_part()
        assert flops.head.sum() == ran.sum() == 2 * positions * 2 * toys.VOCABULARY * 32
        assert torch.equal(flops.decoder, model.routing.executed)
        assert model.routing.keep_rate.tolist() == [0.5, 0.5]


# -- bytes ------------------------------------------------------------------------------------------------------------


def routed(name: str, **config: Any) -> tuple[toys.Toy, RoutedModel]:
    toy = toys.make(name)
    return toy, attach(toy.model, RouterConfig(**config))


@pytest.mark.parametrize(("name", "unit", "group", "kv"), CASES)
def test_kv_bytes_are_what_the_cache_holds(name: str, unit: Any, group: Any, kv: Any) -> None:
    """Of ragged rows, after a prefill, a step, beams, and what was taken back; none without a cache."""
    toy, model = routed(name, unit=unit, group=group, kv=kv)
    batch, keep = toy.batch(LENGTHS), some_keep(len(LENGTHS), unit)
    with torch.no_grad():
        cache = model(**batch, routing=keep, use_cache=True).past_key_values
        first = model.routing.kv_bytes
        assert first.shape == (len(LENGTHS),)
        assert first.sum() == cache.nbytes() > 0
        model(**step(batch, cache))
        assert model.routing.kv_bytes.sum() == cache.nbytes() > first.sum()
        cache.crop(-1)
        assert torch.equal(model.routing.kv_bytes, first)
        cache.batch_select_indices(torch.tensor([3, 0, 0]))
        assert torch.equal(cache.ledger.kv_bytes(), first[[3, 0, 0]])
        model(**batch, routing=keep, use_cache=False)
        assert model.routing.kv_bytes is None
    out = model.generate(**batch, routing=keep, max_new_tokens=3, num_beams=2, return_dict_in_generate=True, **GREEDY)
    assert model.routing.kv_bytes.sum() == out.past_key_values.nbytes()


def test_each_of_many_answers_says_what_it_held() -> None:
    """As much as alone, since here the prompts of a path are equally long."""
    toy, model = routed("llama")
    items = [toy.batch([6], seed=seed) for seed in range(3)]
    options = {"max_new_tokens": 3, **GREEDY}
    many = model.generate_many(items, **options)
    for item, answer in zip(items, many.answers, strict=True):
        model.generate(**item, **options)
        assert answer.kv_bytes == int(model.routing.kv_bytes) > 0
    assert many.kv_bytes == sum(answer.kv_bytes for answer in many.answers)
