"""What the CPU's contracts promise, on a GPU: `python -m pytest -m gpu`; ADASKIP_TEST_DEVICE=cpu runs them without.

There are other kernels, backward runs in a thread of its own, and what is read from the device waits for it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

import adaskip
from adaskip.policies.learned.config import RouterConfig
from adaskip.runtime.attach import RoutedModel, attach
from tests import families, tuning
from tests.families import EAGER_ONLY, LAYERS, Toy
from tests.routed_toys import spread
from tests.routing import GREEDY, LENGTHS, check_saving, decide, real, same_both_ways, some_keep

DEVICE = os.environ.get("ADASKIP_TEST_DEVICE", "cuda")
FAMILIES = ["llama", "gemma2", "mixtral", "llava", "qwen2_vl", "qwen2_5_vl"]
CASES = [(name, group) for name in FAMILIES for group in ("all", "vision") if group == "all" or name in families.VISION]
KINDS: list[dict[str, Any]] = [
    {"unit": "attention"},
    {"unit": "mlp"},
    {"scope": "token"},
    {"scope": "token", "kv": "kept"},
    {"scope": "token", "unit": "mlp"},
]
OPTIONS: dict[str, Any] = {"max_new_tokens": 5, **GREEDY}

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    """Float32 is float32: convolutions use TF32 unless told otherwise."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def toy(name: str, device: str = DEVICE) -> Toy:
    """A small model on the device."""
    made = families.make(name, "eager" if name in EAGER_ONLY else "sdpa")
    made.model.to(device)
    return made


def routed(name: str, **config: Any) -> tuple[Toy, RoutedModel]:
    made = toy(name)
    return made, decide(attach(made.model, RouterConfig(**config)))


def there(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.to(DEVICE) for name, value in batch.items()}


@pytest.mark.parametrize(("name", "group"), CASES)
class TestContract:
    @torch.no_grad()
    def test_it_computes_what_a_cpu_does(self, name: str, group: str) -> None:
        """The same decisions, and under each way of running the same logits."""
        made, model = routed(name, group=group)
        other = decide(attach(toy(name, "cpu").model, RouterConfig(group=group)))
        batch = made.batch(LENGTHS)
        for manager in ("dense", "soft", "keep_all", None):
            with ExitStack() as stack:
                if manager is not None:
                    stack.enter_context(getattr(model, manager)())
                    stack.enter_context(getattr(other, manager)())
                wanted, found = real(other(**batch).logits, batch), real(model(**there(batch)).logits.cpu(), batch)
            assert (found - wanted).abs().max() <= 1e-3 * wanted.abs().max()
        assert torch.equal(model.routing.keep.cpu(), other.routing.keep)
        assert torch.allclose(model.routing.keep_rate.cpu(), other.routing.keep_rate)
        assert 0 < other.routing.keep.float().mean() < 1

    @torch.no_grad()
    def test_keeping_everything_is_bit_identical(self, name: str, group: str) -> None:
        made = toy(name)
        batch = there(made.batch(LENGTHS))
        before = made.model.requires_grad_(False)(**batch).logits
        model = attach(made.model, RouterConfig(group=group))
        assert torch.equal(model(**batch).logits, before)
        assert torch.equal(decide(model).detach()(**batch).logits, before)

    @pytest.mark.parametrize("side", ["left", "right"])
    @torch.no_grad()
    def test_training_and_skipping_give_the_same_logits(self, name: str, group: str, side: str) -> None:
        made, model = routed(name, group=group)
        batch = there(made.batch(LENGTHS, side))
        for keep in (None, some_keep(len(LENGTHS))):
            skipped = model(**batch, routing=keep).logits
            with model.soft():
                soft = model(**batch, routing=keep).logits
            scale = real(skipped, batch).abs().max().clamp(min=1)
            assert (real(soft, batch) - real(skipped, batch)).abs().max() <= 1e-4 * scale

    def test_cached_equals_uncached_equals_row_by_row(self, name: str, group: str) -> None:
        """Rows of all lengths, padded, that go different paths."""
        made, model = routed(name, group=group)
        rows = made.rows(LENGTHS)
        batch = there(made.collate(rows))
        for keep in (None, some_keep(len(LENGTHS))):
            cached = model.generate(**batch, routing=keep, **OPTIONS)
            decided = model.routing.keep
            assert torch.equal(cached, model.generate(**batch, routing=keep, **OPTIONS, use_cache=False))
            for i, row in enumerate(rows):
                alone = there(made.collate([row]))
                one = model.generate(**alone, routing=None if keep is None else keep[:, i : i + 1], **OPTIONS)
                assert torch.equal(model.routing.keep[:, 0], decided[:, i])
                assert torch.equal(one[0, -5:], cached[i, -5:])

    @torch.no_grad()
    def test_half_precision(self, name: str, group: str) -> None:
        made, model = routed(name, group=group)
        model.backbone.to(torch.bfloat16)
        batch = there(made.batch(LENGTHS))
        batch = {key: value.bfloat16() if value.is_floating_point() else value for key, value in batch.items()}
        keep = some_keep(len(LENGTHS))
        skipped = model(**batch, routing=keep).logits
        with model.soft():
            soft = model(**batch, routing=keep).logits
        assert skipped.dtype == torch.bfloat16
        scale = real(skipped, batch).abs().max()
        assert (real(soft, batch) - real(skipped, batch)).abs().mean() <= 0.02 * scale
        assert model.generate(**batch, **OPTIONS).shape[1] == batch["input_ids"].shape[1] + 5

    def test_what_is_saved_here_loads_there(self, name: str, group: str, tmp_path: Path) -> None:
        """Onto a backbone on the CPU, which then moves, and onto one that is on the device already."""
        made, model = routed(name, group=group)
        batch = there(made.batch(LENGTHS))
        model.save_pretrained(tmp_path)
        with torch.no_grad():
            wanted = model(**batch).logits
            for loaded in (
                RoutedModel.from_pretrained(tmp_path, toy(name, "cpu").model).to(DEVICE),
                RoutedModel.from_pretrained(tmp_path, toy(name).model),
            ):
                assert torch.allclose(loaded(**batch).logits, wanted, atol=1e-5)


@pytest.mark.parametrize("config", KINDS, ids=lambda config: "-".join(config.values()))
@pytest.mark.parametrize("name", ["llama", "qwen2_vl"])
def test_other_units_and_scopes(name: str, config: dict[str, Any]) -> None:
    made, model = routed(name, **config)
    same_both_ways(model, there(made.batch(LENGTHS)))


def test_what_is_saved_is_not_computed() -> None:
    made = toy("llama")
    made.model.set_attn_implementation("eager")  # of SDPA's kernels torch counts some otherwise
    with torch.no_grad():
        check_saving(attach(made.model), there(made.batch([9, 9, 9])), some_keep(3))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["llama", "llava"])
def test_gradient_checkpointing_gives_the_same_gradients(name: str, reentrant: bool) -> None:
    """Backward, and with it what is run again, is in a thread that has not seen the forward pass."""

    def gradients(checkpointing: bool) -> Tensor:
        made = toy(name)
        model = spread(attach(made.model))
        model.train()
        if checkpointing:
            model.backbone.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.backbone.enable_input_require_grads()
            model.backbone.train()
        loss = sum(model(**there(made.batch([5 + i, 9])), use_cache=False).logits.mean() for i in range(2))
        with torch.no_grad():
            model(**there(made.batch([3])), use_cache=False)
        loss.backward()  # type: ignore[union-attr]
        return torch.cat([weight.grad.flatten() for weight in model.routers.parameters() if weight.grad is not None])

    expected = gradients(False)
    assert expected.abs().max() > 1e-4
    assert torch.allclose(gradients(True), expected, atol=1e-6)


def test_two_threads_answer_as_one() -> None:
    made, model = routed("llama")
    prompts = [there(made.batch([4 + i % 5, 5 + i % 4], seed=i)) for i in range(8)]

    def answer(i: int) -> tuple[Any, Any]:
        return model.generate(**prompts[i], **OPTIONS).tolist(), model.routing.keep.tolist()

    alone = [answer(i) for i in range(8)]
    with ThreadPoolExecutor(2) as pool:
        assert [*pool.map(answer, [*range(8)] * 2)] == alone * 2


def test_many_prompts_answer_as_one_by_one() -> None:
    made, model = routed("llava")
    prompts = [there(made.batch([4 + i], seed=i)) for i in range(6)]
    many = model.generate_many(prompts, paths=2, measure=True, **OPTIONS)
    assert len(many.groups) <= 2
    for prompt, answer in zip(prompts, many.answers, strict=True):
        keep = torch.tensor(answer.path)[:, None]
        assert torch.equal(model.generate(**prompt, routing=keep, **OPTIONS)[0, -5:].cpu(), answer.tokens.cpu())


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen2_vl"])
def test_a_path_that_is_cut_out_answers_as_before(name: str) -> None:
    """With the static cache that ``generate`` compiles and captures on a GPU."""
    made, model = routed(name)
    batch = there(made.batch([9, 7]))
    path = torch.tensor([True, False, True, True])
    wanted = model.generate(**batch, routing=path[:, None].expand(-1, 2), **OPTIONS)
    plain = adaskip.cut(model, path)
    plain.generation_config.disable_compile = True
    assert torch.equal(plain.generate(**batch, **OPTIONS, cache_implementation="static"), wanted)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("price", ["calibrated", "gates", "fisher", "functional"])
def test_routers_train(price: Any, precision: Any, tmp_path: Path) -> None:
    """Calibrated, checked and validated under Lightning, which moves batches and model."""
    model = attach(families.make("llama", "sdpa").model)
    data: Callable[..., Any] = lambda a, b: DataLoader(tuning.DATA[a:b], **tuning.WHOLE)  # noqa: E731
    tuner = adaskip.RouterTuner(
        model, adaskip.Objective(keep=0.5, price=price, warmup=0.0), calibration=data(8, 12), learning_rate=0.05
    )
    before = torch.cat([weight.detach().flatten().cpu().clone() for weight in model.routers.parameters()])
    lightning.Trainer(
        max_steps=4,
        accelerator="cpu" if DEVICE == "cpu" else "gpu",
        devices=1,
        precision=precision,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=[adaskip.ConditionCheck(every=2)],
    ).fit(tuner, data(0, 4), data(4, 8))
    after = torch.cat([weight.detach().flatten().cpu() for weight in model.routers.parameters()])
    assert after.isfinite().all()
    assert not torch.equal(before, after)


def test_a_profile_is_that_of_a_cpu() -> None:
    costs = []
    for device in ("cpu", DEVICE):
        batches = [batch.to(torch.device(device)) for batch in tuning.DATA[:5]]
        layers = adaskip.profile(toy("llama", device).model, batches).to_dict()["layers"]
        costs.append([layer["functional"]["estimate"] for layer in layers])
    assert len(costs[0]) == LAYERS
    assert costs[1] == pytest.approx(costs[0], rel=1e-3, abs=1e-4)
