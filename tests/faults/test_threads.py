"""Several threads or tasks use one routed model at once: a server, a trainer that samples while it trains."""

from __future__ import annotations

import asyncio
import copy
import random
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import adaskip
from adaskip import RoutedModel, RouterConfig
from adaskip.backbone.attention import intercept_attention
from adaskip.errors import ConfigError
from tests import toys
from tests.routed_toys import GREEDY, answers, batch, llama, routed, spread


@pytest.fixture(autouse=True)
def _switch_often() -> Iterator[None]:
    """Let threads take turns fifty times as often as they do by themselves."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(before)


def together(jobs: list[Callable[[], Any]], threads: int = 4) -> list[Any]:
    """The jobs' results, from threads that run them at once; the first error is raised."""
    with ThreadPoolExecutor(threads) as pool:
        return [future.result() for future in [pool.submit(job) for job in jobs]]


def in_a_thread(job: Callable[[], Any]) -> Any:
    return together([job], 1)[0]


def prompts(count: int) -> list[dict[str, Tensor]]:
    toy = toys.make("llama")
    return [toy.batch([4 + i % 5, 5 + i % 4], seed=i) for i in range(count)]


def tokens(model: Any, inputs: dict[str, Tensor]) -> list[list[int]]:
    return model.generate(**inputs, **GREEDY).tolist()


@pytest.mark.parametrize("which", ["model", "backbone", "mlp", "token"])
def test_answers_are_those_of_one_thread(which: str) -> None:
    """A server answers several users at once; catches answers along another user's path, and errors out of nowhere."""
    config = {"mlp": RouterConfig(unit="mlp"), "token": RouterConfig(scope="token", kv="kept")}.get(which)
    model = spread(adaskip.attach(llama(), config))
    asked: Any = model.backbone if which == "backbone" else model
    alone = [tokens(asked, inputs) for inputs in prompts(16)]
    jobs = [lambda inputs=inputs: tokens(asked, inputs) for inputs in prompts(16) * 3]
    assert together(jobs) == alone * 3


def test_routing_is_that_of_the_own_thread() -> None:
    """A worker reads model.routing after its answer; catches the decisions and costs of another user's request."""
    model = routed()

    def cost(inputs: dict[str, Tensor]) -> tuple[Any, ...]:
        model.generate(**inputs, **GREEDY)
        routing = model.routing
        return routing.keep.tolist(), routing.executed.tolist(), model.flops()[0].tolist()

    alone = [cost(inputs) for inputs in prompts(16)]
    assert len({str(keep) for keep, *_ in alone}) > 4
    assert together([lambda inputs=inputs: cost(inputs) for inputs in prompts(16) * 3]) == alone * 3
    cost(prompts(1)[0])
    before = model.routing.keep
    in_a_thread(lambda: cost(prompts(9)[8]))
    assert torch.equal(model.routing.keep, before)
    with pytest.raises(ConfigError, match="no routed request has run yet in this thread"):
        in_a_thread(lambda: model.routing)


@pytest.mark.parametrize("manager", ["dense", "keep_all", "soft"])
def test_a_setting_stays_in_its_thread(manager: str) -> None:
    """A reference answer is made in one thread while others serve; catches answers of the dense model for all."""
    model = routed()
    expected = answers(model)
    with getattr(model, manager)():
        assert torch.equal(in_a_thread(lambda: answers(model)), expected)
    inside, leave = threading.Event(), threading.Event()

    def hold() -> Tensor:
        with model.dense():
            inside.set()
            assert leave.wait(20)
            return answers(model)

    with ThreadPoolExecutor(1) as pool:
        dense = pool.submit(hold)
        assert inside.wait(20)
        assert torch.equal(answers(model), expected)
        leave.set()
        assert torch.equal(dense.result(), answers(llama()))
        assert not torch.equal(dense.result(), expected)


def test_an_observer_sees_its_own_thread() -> None:
    """A survey records states while others serve; catches states of other users' prompts among them."""
    model, seen = routed(), []
    ready, done = threading.Event(), threading.Event()

    def others() -> None:
        ready.set()
        while not done.is_set():
            answers(model)

    with ThreadPoolExecutor(1) as pool:
        serving = pool.submit(others)
        assert ready.wait(20)
        with torch.no_grad(), model.dense(), model.observe(lambda index, before, after: seen.append((index, before))):
            for _ in range(20):
                model(**batch(3), use_cache=False)
        done.set()
        serving.result()
    assert [index for index, _ in seen] == [0, 1, 2, 3] * 20
    assert all(before.shape[:2] == (1, 3) for _, before in seen)


def test_training_goes_on_while_others_generate() -> None:
    """Somebody samples from a model in training; catches gradients of another pass, and sampled soft mixtures."""
    inputs = batch(5, 9)

    def step(model: RoutedModel) -> Tensor:
        with model.soft():
            logits = model(**inputs, use_cache=False).logits
        loss = logits.square().mean() + torch.stack(model.gates()).mean()
        assert model.routers is not None
        return torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, [*model.routers.parameters()])])

    model = routed()
    gradient, expected = step(model), answers(model)
    jobs: list[Callable[[], Tensor]] = [lambda: step(model), lambda: answers(model)] * 20
    results = together(jobs)
    assert all(torch.equal(result, gradient) for result in results[::2])
    assert all(torch.equal(result, expected) for result in results[1::2])


@pytest.mark.slow
def test_thirty_two_threads_with_fifty_requests_each() -> None:
    """A busy server gets every kind of request; catches whatever of one request is seen by another."""
    model, inputs = routed(), prompts(6)
    draw = torch.Generator().manual_seed(0)
    plans = [torch.rand(4, 2, generator=draw) > 0.5 for _ in inputs]
    kinds: dict[str, Callable[[int], Any]] = {
        "generate": lambda i: (tokens(model, inputs[i]), model.routing.keep.tolist()),
        "forward": lambda i: model(**inputs[i]).logits,
        "plan": lambda i: (model.generate(**inputs[i], routing=plans[i], **GREEDY), model.routing.keep),
        "given": lambda i: model(**inputs[i], routing=plans[i], use_cache=False).logits,
        "masked": lambda i: model(**inputs[i], prompt_mask=inputs[i]["input_ids"] > 40, use_cache=False).logits,
        "many": lambda i: [(a.tokens, a.path) for a in model.generate_many([inputs[i]], max_new_tokens=2).answers],
    }

    def within(manager: Callable[[], Any], kind: str) -> Callable[[int], Any]:
        def run(i: int) -> Any:
            with manager():
                return kinds[kind](i) if kind == "forward" else tokens(model, inputs[i])

        return run

    kinds |= {f"dense {kind}": within(model.dense, kind) for kind in ("forward", "generate")}
    kinds |= {f"all {kind}": within(model.keep_all, kind) for kind in ("forward", "generate")}

    def plain(result: Any) -> str:
        return str(result.tolist() if isinstance(result, Tensor) else result)

    with torch.no_grad():
        alone = {(kind, i): plain(run(i)) for kind, run in kinds.items() for i in range(len(inputs))}

    def user(number: int) -> list[str]:
        pick = random.Random(number)
        wrong = []
        with torch.no_grad():
            for _ in range(50):
                kind, i = pick.choice([*kinds]), pick.randrange(len(inputs))
                if plain(kinds[kind](i)) != alone[kind, i]:
                    wrong.append(kind)
        return wrong

    assert together([lambda number=number: user(number) for number in range(32)], 32) == [[]] * 32


def test_tasks_of_one_event_loop() -> None:
    """An asynchronous server awaits inside `dense()`; catches settings that others see, or its worker does not."""
    model = routed()
    expected, dense = answers(model), answers(llama())

    async def plainly() -> list[Tensor]:
        results = []
        for _ in range(4):
            results.append(answers(model))
            await asyncio.sleep(0)
            results.append(await asyncio.to_thread(answers, model))
        return results

    async def densely() -> list[Tensor]:
        with model.dense():
            return await plainly()

    async def serve() -> list[list[Tensor]]:
        return await asyncio.gather(plainly(), densely(), plainly(), densely())

    for results, right in zip(asyncio.run(serve()), [expected, dense] * 2, strict=True):
        assert all(torch.equal(result, right) for result in results)


def test_a_compiled_model_follows_its_thread() -> None:
    """One compiled graph serves several threads; catches a graph with the settings of the thread that compiled it."""
    model = adaskip.attach(llama(), adaskip.SkipPlan.static([0, 2]))
    torch._dynamo.reset()
    compiled, inputs = torch.compile(model, backend="eager", fullgraph=True), batch(6)

    @torch.no_grad()
    def logits(asked: Any) -> Tensor:
        return asked(**inputs, use_cache=False).logits

    routed_logits = logits(model)
    with model.dense():
        dense_logits = logits(model)
        assert torch.allclose(logits(compiled), dense_logits, atol=1e-6)
        assert torch.allclose(in_a_thread(lambda: logits(compiled)), routed_logits, atol=1e-6)
    assert torch.allclose(logits(compiled), routed_logits, atol=1e-6)
    assert not torch.allclose(dense_logits, routed_logits, atol=1e-3)


@pytest.mark.parametrize(
    ("unit", "passes"),
    # two passes through MLPs, which get nothing but their states, are refused: see the next test
    [("block", 1), ("block", 2), ("attention", 1), ("attention", 2), ("mlp", 1)],
)
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_reruns_the_right_request(unit: Any, reentrant: bool, passes: int) -> None:
    """Two losses are added up before backward(), which runs elsewhere, as autograd does on a GPU; catches gradients
    of a layer that ran again along the last layer's, another pass's or no decision.
    """

    def gradients(checkpointing: bool) -> Tensor:
        model = spread(adaskip.attach(llama(), RouterConfig(unit=unit)))
        model.train()
        if checkpointing:
            model.backbone.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.backbone.enable_input_require_grads()
            model.backbone.train()
        loss = torch.stack([model(**batch(5 + i, 9 - i), use_cache=False).logits.mean() for i in range(passes)]).sum()
        with torch.no_grad():
            model(**batch(3), use_cache=False)
        in_a_thread(loss.backward)
        assert model.routers is not None
        return torch.cat([weight.grad.flatten() for weight in model.routers.parameters() if weight.grad is not None])

    expected = gradients(False)
    assert expected.abs().max() > 1e-4
    assert torch.allclose(gradients(True), expected, atol=1e-7)


@pytest.mark.parametrize(
    ("unit", "reentrant"),
    # a reentrant checkpoint of sublayers alone, as transformers 5.23 makes it, cannot share its gates with a loss
    [("block", False), ("block", True), ("attention", False), ("mlp", False)],
)
def test_gradient_checkpointing_of_a_trainer_s_loss(unit: Any, reentrant: bool) -> None:
    """As `RouterTuner` does: gates are drawn, and the loss speaks of them too; catches other draws for a layer that
    runs again (transformers before 5.23), and gates that a reentrant checkpoint leaves without a gradient.
    """

    def gradients(checkpointing: bool) -> Tensor:
        model = spread(adaskip.attach(llama(), RouterConfig(unit=unit)))
        model.train()
        if checkpointing:
            model.backbone.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.backbone.enable_input_require_grads()
            model.backbone.train()
        with model.explore(torch.Generator().manual_seed(3)):
            loss = model(**batch(5, 9), use_cache=False).logits.square().mean()
        in_a_thread((loss + torch.stack(model.gates()).mean()).backward)
        assert model.routers is not None
        return torch.cat([weight.grad.flatten() for weight in model.routers.parameters() if weight.grad is not None])

    expected = gradients(False)
    assert expected.abs().max() > 1e-2
    assert torch.allclose(gradients(True), expected, atol=1e-6)


def mlp_gradients(checkpointed: str) -> Tensor:
    """Gradients of two passes' losses through routed MLPs, with checkpoints around layers, MLPs alone or nothing."""
    model = spread(adaskip.attach(llama(), RouterConfig(unit="mlp")))
    model.train()
    assert model.routers is not None
    if checkpointed == "layers":
        model.backbone.gradient_checkpointing_enable({"use_reentrant": False})
        model.backbone.train()
    for layer in model.spec.layers if checkpointed == "mlps" else ():
        mlp: Any = layer.mlp
        mlp.forward = partial(checkpoint, mlp.forward, use_reentrant=False)
    losses = [model(**batch(5 + i, 9), use_cache=False).logits.mean() for i in range(2)]
    torch.stack(losses).sum().backward()
    return torch.cat([weight.grad.flatten() for weight in model.routers.parameters() if weight.grad is not None])


def test_an_ambiguous_rerun_is_refused() -> None:
    """As above with MLPs, which get nothing that tells passes apart; catches silently wrong gradients."""
    with pytest.raises(ConfigError, match=r"run backward\(\) after every forward pass"):
        mlp_gradients("mlps")


def test_two_passes_through_mlps_are_right_or_refused() -> None:
    """As above by transformers, before 5.23 with whole layers, whose masks tell, since then with what is routed in
    them; catches silently wrong gradients.
    """
    expected = mlp_gradients("nothing")
    with suppress(ConfigError):
        assert torch.allclose(mlp_gradients("layers"), expected, atol=1e-7)


def test_visitors_of_attention_see_their_own_thread() -> None:
    """Two surveys read attention at once, one ends first; catches visits by the other, and a patch left behind."""
    from transformers.modeling_utils import AttentionInterface

    own, model = AttentionInterface.get_interface, routed()
    barrier = threading.Barrier(2, timeout=20)

    def survey(times: int) -> list[int]:
        seen: list[int] = []

        def visit(call: Any) -> Any:
            seen.append(call.layer)
            return call.run()

        with torch.no_grad(), model.dense(), intercept_attention(model.spec.layers, visit):
            barrier.wait()
            for _ in range(times):
                model(**batch(4), use_cache=False)
        return seen

    assert together([lambda: survey(3), lambda: survey(30)], 2) == [[0, 1, 2, 3] * 3, [0, 1, 2, 3] * 30]
    assert AttentionInterface.get_interface is own


def test_a_copy_made_inside_takes_no_setting_along() -> None:
    """Somebody copies a model while it serves densely; catches a copy that is dense for good."""
    model = routed()
    expected = answers(model)
    with model.dense():
        assert torch.equal(answers(copy.deepcopy(model)), expected)
