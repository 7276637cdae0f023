"""lm-eval scores of a routed model: routes come from the context alone, at any batch size."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import pytest
import torch

import adaskip
from adaskip.errors import AdaSkipError, DataError
from adaskip.plan import SkipPlan
from adaskip.policies.learned.config import RouterConfig
from tests.routed_toys import llama, routed, spread, tokenizer

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is an extra: pip install 'adaskip[eval]'")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.model import CachingLM  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402

CONTEXTS = ["abc def", "hello world 12 and more words", "x", "what is 3 4?", "the quick brown fox", "a b c", ""]
ANSWERS = [" yes", " no it is", " maybe so or not", "a", "b"]


def harness(model: Any, **options: Any) -> Any:
    from adaskip.harness import RoutedLM

    return RoutedLM(model, tokenizer(), **options)


def pairs() -> list[tuple[str, str]]:
    return [(context, answer) for context in CONTEXTS for answer in ANSWERS]


def ask(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, one, number) for number, one in enumerate(arguments)]


def scores(lm: Any) -> list[tuple[float, bool]]:
    return lm.loglikelihood(ask("loglikelihood", pairs()), disable_tqdm=True)


def alone(model: adaskip.RoutedModel, context: list[int], answer: list[int]) -> float:
    """One row without padding, routed on its context: what a score should be."""
    mask = torch.zeros(1, len(context) + len(answer), dtype=torch.bool)
    mask[:, : len(context)] = True
    ids = torch.tensor([context + answer])
    with torch.no_grad():
        logits = model(input_ids=ids, prompt_mask=mask, use_cache=False).logits[0].log_softmax(-1)
    return float(sum(logits[len(context) - 1 + place, token] for place, token in enumerate(answer)))


def encode(text: str) -> list[int]:
    return tokenizer()(text)["input_ids"]


MODELS = {
    "routers": lambda: routed(),
    "token": lambda: spread(adaskip.attach(llama(), RouterConfig(scope="token"))),
    "mlp": lambda: spread(adaskip.attach(llama(), RouterConfig(unit="mlp"))),
    "plan": lambda: adaskip.attach(llama(), SkipPlan.static([1])),
}


@pytest.mark.parametrize("kind", MODELS)
def test_scores_are_routed_on_the_context_alone(kind: str) -> None:
    """Somebody scores multiple choice with a routed model; catches routes that read the answer or the padding."""
    model = MODELS[kind]()
    expected = [alone(model, encode(context) or [1], encode(answer)) for context, answer in pairs()]
    for size in (1, 3, 8):
        found = [score for score, _ in scores(harness(model, batch_size=size))]
        assert found == pytest.approx(expected, abs=2e-4), size


def test_the_cases_tell_routes_apart() -> None:
    """The same scores through lm-eval's own class differ, so the test above can fail."""
    model = routed()
    plain = [s for s, _ in scores(HFLM(pretrained=model.backbone, tokenizer=tokenizer(), batch_size=8))]
    ours = [s for s, _ in scores(harness(model, batch_size=8))]
    assert sum(abs(one - two) > 1e-2 for one, two in zip(plain, ours, strict=True)) > 5


def test_dense_scores_are_those_of_lm_eval() -> None:
    """Somebody compares routed with dense scores; catches an adapter that counts other tokens than lm-eval does."""
    model = routed()
    expected = scores(HFLM(pretrained=llama(), tokenizer=tokenizer(), batch_size=4))
    with model.dense():
        found = scores(harness(model, batch_size=4))
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], abs=2e-4)


def test_long_contexts_are_cut_as_lm_eval_cuts_them() -> None:
    """A context is longer than the model reads; catches tokens scored at the wrong place after the cut."""
    model = routed()
    (ours,) = harness(model, max_length=10).loglikelihood(ask("loglikelihood", [("what is it that", " yes")]))
    assert ours[0] == pytest.approx(alone(model, encode("what is it that")[-7:], encode(" yes")), abs=2e-4)
    with pytest.raises(DataError, match="expected a context and 1 to 3 scored tokens, got 2 and 4"):
        harness(model, max_length=3).loglikelihood(ask("loglikelihood", [("ab", " yes")]))


def test_rolling_windows_do_not_depend_on_the_batch() -> None:
    """Somebody measures perplexity; catches a window that is routed on the tokens which it scores."""
    model = routed()
    texts = [("hello world, this is a text",), ("short",), ("another one of them",)]
    expected = []
    for (text,) in texts:
        tokens, total = encode(text), alone(model, [1], encode(text)[:12])
        for start in range(12, len(tokens), 12):
            window = tokens[start : start + 12]
            before = tokens[:start][-(13 - len(window)) :]
            total += alone(model, before, window)
        expected.append(total)
    for size in (1, 2, 8):
        lm = harness(model, batch_size=size, max_length=12)
        found = lm.loglikelihood_rolling(ask("loglikelihood_rolling", texts), disable_tqdm=True)
        assert found == pytest.approx(expected, abs=5e-4), size


def test_generation_is_that_of_the_routed_model() -> None:
    """Somebody runs a generative task; catches answers that differ from model.generate, or from batch to batch."""
    model = routed()
    model.generation_config.eos_token_id = 2
    options = {"until": ["zz"], "max_gen_toks": 8}
    requests = [(context, options) for context in CONTEXTS if context]
    expected = []
    for context, _ in requests:
        ids = torch.tensor([encode(context)])
        new = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
        expected.append(tokenizer().decode(new, skip_special_tokens=True))
    for size in (1, 4):
        found = harness(model, batch_size=size).generate_until(ask("generate_until", requests), disable_tqdm=True)
        assert [text.strip() for text in found] == [text.strip() for text in expected]
    refused = ask("generate_until", [("abc", {**options, "prefill_chunk_size": 2})])
    with pytest.raises(AdaSkipError, match="prefill_chunk_size shows the routers only the first chunk"):
        harness(model).generate_until(refused, disable_tqdm=True)


def test_scores_come_back_from_the_cache(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody repeats a run with lm-eval's cache; catches scores not written, or in another order."""
    pytest.importorskip("sqlitedict", reason="what lm-eval caches with")
    lm = CachingLM(harness(routed(), batch_size=4), str(tmp_path / "cache.db"))
    first = lm.loglikelihood(ask("loglikelihood", pairs()))
    monkeypatch.setattr(adaskip.RoutedModel, "forward", lambda *args, **kwargs: pytest.fail("not read from the cache"))
    assert [tuple(one) for one in lm.loglikelihood(ask("loglikelihood", pairs()))] == first


def test_batch_size_auto_and_a_saved_folder(tmp_path) -> None:
    """Somebody passes a folder and batch_size='auto'; catches an adapter that knows neither."""
    model = spread(adaskip.attach(adaskip_demo()))
    model.save_pretrained(tmp_path)
    texts = [("loglikelihood", ("how many", " 3"))]
    from adaskip.harness import RoutedLM

    lm = RoutedLM(tmp_path, batch_size="auto", max_batch_size=2, max_length=16)
    (score, _) = lm.loglikelihood(ask(texts[0][0], [texts[0][1]]), disable_tqdm=True)[0]
    assert score < 0


def adaskip_demo() -> Any:
    from adaskip.demo.backbone import load

    return load()[0]


@pytest.mark.parametrize("options", [{}, {"tokenizer": "yes"}])
def test_lm_evals_own_class_says_what_to_use(options: dict[str, Any]) -> None:
    """Somebody passes the routed model to HFLM; catches an AttributeError that names no way out."""
    options = {"tokenizer": tokenizer()} if options else {}
    with pytest.raises(AdaSkipError, match=r"for lm-eval use adaskip\.harness\.RoutedLM\(model, tokenizer\)"):
        HFLM(pretrained=routed(), **options)


def test_without_lm_eval_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval is not installed; catches an error that does not name the extra."""
    monkeypatch.delitem(sys.modules, "adaskip.harness", raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", None)
    with pytest.raises(ImportError, match=r"adaskip\.harness needs lm-eval; type: pip install 'adaskip\[eval\]'"):
        importlib.import_module("adaskip.harness")
