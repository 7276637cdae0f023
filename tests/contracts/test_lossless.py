"""Lossless decoding: whatever is drafted, the tokens are the dense model's own, and the cache is too."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from tokenizers import Tokenizer, models
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from adaskip.demo.backbone import load
from adaskip.demo.digits import examples
from adaskip.errors import ConfigError
from adaskip.plan import SkipPlan, Target
from adaskip.policies.learned.config import RouterConfig
from adaskip.runtime.attach import RoutedModel, attach
from adaskip.training.data import Collator
from tests import families
from tests.drafts import drafting, opposed
from tests.routing import GREEDY, LENGTHS, decide

NAMES = {"llama": 0.1, "qwen2": 0.1, "gemma2": 0.5, "qwen2_vl": 0.1, "llava": 0.1}
"""How much of the layer that drafts leave out is in the model: so much that drafts are accepted and refused."""
NEW: dict[str, Any] = {"max_new_tokens": 21, **GREEDY}


def dense(model: RoutedModel, batch: dict[str, Tensor], **options: Any) -> Any:
    with model.dense():
        return model.generate(**batch, **options)


@pytest.mark.parametrize("batches", [16, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", NAMES)
def test_greedy_tokens_are_the_dense_models(name: str, batches: int) -> None:
    """Rows of any length, drafts of any length, some accepted and some refused; with 80 or 500 prompts a model.

    In every other batch rows end at an end token. It fails where a refused token is kept, where the token after a draft
    is the drafter's, or where drafts' keys stay.
    """
    toy, model = drafting(name, NAMES[name])
    accepted = refused = 0
    for seed in range(batches):
        batch = toy.batch(LENGTHS, seed=seed)
        options = NEW | (OPTIONS["an end token"] if seed % 2 else {})
        expected = dense(model, batch, **options)
        for lossless in (True, 1 + seed % 5):
            assert torch.equal(model.generate(**batch, **options, lossless=lossless), expected), (seed, lossless)
        accepted += model.lossless.accepted  # of drafts of a given length; others depend on the machine's speed
        refused += model.lossless.tried - model.lossless.accepted
    assert accepted > 10
    assert refused > 10


@pytest.mark.parametrize("name", NAMES)
def test_a_row_alone_drafts_and_is_the_dense_models(name: str) -> None:
    """Without padding masks are left out, and a pass of several tokens behind a cache needs one of its own."""
    toy, model = drafting(name, NAMES[name])
    accepted = refused = 0
    for seed in range(10):
        row = toy.batch([9], seed=seed)
        expected = dense(model, row, **NEW)
        assert torch.equal(model.generate(**row, **NEW, lossless=3), expected)
        accepted += model.lossless.accepted
        refused += model.lossless.tried - model.lossless.accepted
    assert accepted > 10
    assert refused > 10


@pytest.mark.parametrize("unit", ["attention", "mlp"])
def test_sublayers_draft_too(unit: str) -> None:
    toy, model = drafting("llama", 0.3, unit=unit)
    batch = toy.batch(LENGTHS)
    assert torch.equal(model.generate(**batch, **NEW, lossless=3), dense(model, batch, **NEW))
    assert model.lossless.tried


@pytest.mark.parametrize(("rows", "each"), [(1, 20), (12, 20), pytest.param(12, 84, marks=pytest.mark.slow)])
@pytest.mark.parametrize("policy", ["plan", "routers"])
def test_questions_of_the_demo(rows: int, each: int, policy: str) -> None:
    """120 or 504 real questions on a trained model, one by one and in batches, along a plan or routers' paths."""
    base, processor = load()
    model = attach(base, SkipPlan.static([2, 5, 7]) if policy == "plan" else RouterConfig())
    if policy == "routers":
        torch.manual_seed(2)
        for head in model.routers:
            torch.nn.init.normal_(head.outer.weight, std=2.0)
            torch.nn.init.normal_(head.outer.bias, mean=0.0, std=0.3)
    questions, collate = examples("test", each, seed=5), Collator(processor, answers=False)
    assert len(questions) == 6 * each
    paths = set()
    for begin in range(0, len(questions), rows):
        inputs = collate(questions[begin : begin + rows]).inputs
        options = {"max_new_tokens": 6, "do_sample": False}
        expected = dense(model, inputs, **options)
        assert torch.equal(model.generate(**inputs, **options, lossless=3), expected)
        paths.add(model.lossless.path)
    model.detach()
    assert len(paths) > 1 or policy == "plan" or rows > 1  # in batches of twelve some row keeps every layer


# -- passes ---------------------------------------------------------------------------------------------------------


def test_a_draft_that_always_agrees_takes_as_few_passes_as_it_can() -> None:
    """The prompt's pass gives the first of 21 tokens; four rounds of four drafts and one dense pass give the others.

    It fails where the token behind an accepted draft is thrown away, or where a round that was accepted whole is not.
    """
    toy, model = drafting("llama", 0.0)
    batch = toy.batch(LENGTHS)
    expected = dense(model, batch, **NEW)
    passes = []
    handle = model.spec.layers[0].register_forward_hook(lambda *call: passes.append(call[1][0].shape[1]))
    assert torch.equal(model.generate(**batch, **NEW, lossless=4), expected)
    handle.remove()
    assert passes[1:] == [1, 1, 1, 1, 5] * 4
    result = model.lossless
    assert (result.drafted, result.tried, result.accepted, result.verified, result.plain) == (16, 16, 16, 4, 0)
    assert (result.acceptance, result.accepted_length, result.tokens) == (1.0, 4.0, 21)
    assert result.path == (True, False, True, True)


def test_the_flops_of_drafts_are_counted() -> None:
    """As torch counts them; it fails where a layer that drafts skip is charged, or a pass is priced elsewhere."""
    toy, model = drafting("llama", 0.1)
    model.backbone.set_attn_implementation("eager")  # torch counts no FLOPs of sdpa on a CPU
    row = toy.batch([9])
    with FlopCounterMode(display=False) as drafted:
        model.generate(**row, **NEW, lossless=3)
    result = model.lossless
    with FlopCounterMode(display=False) as plain:
        dense(model, row, **NEW)
    # the head's: each draft has one position, each pass that verifies one for every token that it holds
    positions = result.drafted + result.drafted + result.verified + result.plain - 20
    counted = drafted.get_total_flops() - plain.get_total_flops() - positions * model.runtime.cost.head
    assert result.executed - result.dense == pytest.approx(counted)
    assert 0 < result.accepted < result.tried


def test_a_draft_that_never_agrees_costs_its_passes_and_nothing_else() -> None:
    """Every round gives the one dense token; the drafts of the last ones are cut to the room that is left.

    It fails where a refused token is counted as accepted, or where drafts run beyond the limit.
    """
    toy, model = opposed("llama")
    batch = toy.batch([5])
    expected = dense(model, batch, **NEW)
    assert torch.equal(model.generate(**batch, **NEW, lossless=4), expected)
    result = model.lossless
    assert (result.accepted, result.tried, result.verified, result.plain) == (0, 19, 19, 1)
    assert result.drafted == sum(min(4, left - 1) for left in range(1, 21))


def test_a_row_that_has_ended_has_no_say() -> None:
    """Beside a row that ends at once the other drafts as it does alone; it fails where padding is verified as well."""
    toy, model = drafting("llama", 0.1)
    batch = toy.batch([9, 9], seed=3)
    alone = {name: value[1:] for name, value in batch.items()}
    tokens = dense(model, alone, **NEW)
    first = dense(model, batch, **NEW | {"max_new_tokens": 1})[:, -1].tolist()
    assert first[0] not in tokens[0, 9:]
    model.generate(**alone, **NEW, lossless=3)
    expected = model.lossless
    both = model.generate(**batch, **NEW, lossless=3, eos_token_id=first[0], pad_token_id=0)
    assert torch.equal(both[1:], tokens)
    assert not both[0, 10:].any()
    counts = ("drafted", "tried", "accepted", "verified")
    assert [getattr(model.lossless, name) for name in counts] == [getattr(expected, name) for name in counts]
    assert 0 < expected.accepted < expected.tried


def test_drafts_that_never_agree_are_left_out() -> None:
    """It fails where the draft's length does not follow what was accepted."""
    toy, model = opposed("llama")
    batch = toy.batch([5])
    options = NEW | {"max_new_tokens": 100}
    assert torch.equal(model.generate(**batch, **options, lossless=True), dense(model, batch, **options))
    assert model.lossless.plain > 80
    assert model.lossless.tried <= 10


def test_a_path_of_every_layer_is_the_dense_model_and_drafts_nothing() -> None:
    toy, model = drafting("llama", 1.0)
    batch = toy.batch([5])
    model.hold(range(families.LAYERS))
    assert torch.equal(model.generate(**batch, **NEW, lossless=4), dense(model, batch, **NEW))
    assert (model.lossless.drafted, model.lossless.plain, model.lossless.acceptance) == (0, 20, None)


# -- what is left behind --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [0.0, 0.3])
def test_the_cache_is_the_dense_one(factor: float) -> None:
    """Every layer holds all tokens but the last, drafts left out, and the dense model goes on from it.

    It fails where drafts stay in the cache, and where a layer holds what the draft made of a token.
    """
    toy, model = drafting("llama", factor)
    batch = toy.batch(LENGTHS)
    options = NEW | {"return_dict_in_generate": True, "output_logits": True, "output_scores": True}
    expected, got = dense(model, batch, **options), model.generate(**batch, **options, lossless=3)
    assert torch.equal(got.sequences, expected.sequences)
    for mine, theirs in zip(got.past_key_values.layers, expected.past_key_values.layers, strict=True):
        assert mine.keys.shape == theirs.keys.shape
        assert torch.allclose(mine.keys, theirs.keys, atol=1e-4)
        assert torch.allclose(mine.values, theirs.values, atol=1e-4)
    for mine, theirs in ((got.logits, expected.logits), (got.scores, expected.scores)):
        assert torch.allclose(torch.stack(mine), torch.stack(theirs), atol=1e-3)
    mask = torch.cat([batch["attention_mask"], batch["attention_mask"].new_ones(len(LENGTHS), 21)], 1)
    with model.dense(), torch.no_grad():
        ids = got.sequences[:, -1:]
        after = [
            model(input_ids=ids, attention_mask=mask, past_key_values=one.past_key_values).logits
            for one in (got, expected)
        ]
    assert torch.allclose(after[0], after[1], atol=1e-3)


def test_the_routing_counts_the_answer_as_dense() -> None:
    """Decisions are the policy's, from the dense prompt, as phase ``decode`` takes them; the FLOPs are the answer's."""
    toy = families.make("llama")
    model = decide(attach(toy.model, RouterConfig(phase="decode")))
    batch = toy.batch(LENGTHS)
    model.generate(**batch, **NEW)
    expected = model.routing
    assert len({tuple(row) for row in expected.keep.T.tolist()}) > 1
    model.detach()
    model = decide(attach(toy.model, RouterConfig()))
    tokens = model.generate(**batch, **NEW, lossless=2)
    assert torch.equal(model.routing.keep, expected.keep)
    assert torch.equal(model.routing.executed, model.routing.dense)
    assert torch.equal(model.routing.dense, expected.dense)
    assert torch.equal(tokens, dense(model, batch, **NEW))
    assert model.lossless.path == tuple(expected.keep.any(1).tolist())
    model.generate(**batch, **NEW)  # nothing of it stays behind
    assert bool((model.routing.executed < model.routing.dense).any())


def test_drafts_are_no_part_of_what_the_answer_cost() -> None:
    """It fails where drafts, or what was refused, are left in the ledger."""
    toy, model = drafting("llama", 0.1)
    batch = toy.batch(LENGTHS)
    model.generate(**batch, **NEW | {"max_new_tokens": 1})
    prompt = model.routing.dense
    model.generate(**batch, **NEW)
    expected = model.routing
    model.generate(**batch, **NEW, lossless=3)
    assert model.lossless.drafted
    assert torch.equal(model.routing.dense, expected.dense)
    assert torch.equal(model.routing.executed, expected.dense)
    assert model.lossless.dense == pytest.approx(float((expected.dense - prompt).sum()))
    assert torch.equal(
        model.flops_by_part().head, torch.full((5,), 21.0, dtype=torch.float64) * model.runtime.cost.head
    )


def test_given_decisions_are_drafted_along() -> None:
    toy, model = drafting("llama", 0.3)
    batch = toy.batch([5])
    path = torch.tensor([True, True, False, True])[:, None]
    assert torch.equal(model.generate(**batch, **NEW, lossless=2, routing=path), dense(model, batch, **NEW))
    assert model.lossless.path == (True, True, False, True)


# -- how answers end, and what changes logits ------------------------------------------------------------------------


class _Heard(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


class _Sum(StoppingCriteria):
    """End each row where the sum of its tokens first comes to a multiple of 7."""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return input_ids.sum(1) % 7 == 0


OPTIONS: dict[str, dict[str, Any]] = {
    "an end token": {"eos_token_id": [20, 31, 40, 52, 63, 70], "pad_token_id": 0},
    "not before": {"eos_token_id": [*range(16, 90, 3)], "pad_token_id": 0, "min_new_tokens": 9},
    "a criterion": {"stopping_criteria": StoppingCriteriaList([_Sum()])},
    "a criterion and an end token": {
        "stopping_criteria": StoppingCriteriaList([_Sum()]),
        "eos_token_id": 20,
        "pad_token_id": 0,
    },
    "a penalty": {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2},
    "prefixes": {"prefix_allowed_tokens_fn": lambda row, ids: [16 + (int(ids[-1]) * 7 + i) % 70 for i in range(9)]},
    "two answers": {"num_return_sequences": 2, "do_sample": True, "top_k": 1},
}


@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("factor", [0.0, 0.3])
def test_answers_end_and_are_chosen_as_the_dense_models_are(kind: str, factor: float) -> None:
    """It fails where a draft runs beyond its row's end, or where processors are shown other tokens than the text's."""
    toy, model = drafting("llama", factor)
    ended = False
    for seed in range(6):
        batch = toy.batch(LENGTHS, seed=seed)
        options = NEW | OPTIONS[kind]
        expected = dense(model, batch, **options)
        for lossless in (2, 5):
            assert torch.equal(model.generate(**batch, **options, lossless=lossless), expected)
        ended |= bool((expected[:, -1] == 0).any()) or expected.shape[1] < max(LENGTHS) + 21
    assert ended or kind in ("a penalty", "prefixes", "two answers")


def test_stop_strings_end_within_a_draft() -> None:
    """Without a limit of 21 tokens to fall back on; the string is searched for after every token, not every round."""
    toy, model = drafting("llama", 0.0)
    row = toy.batch([9])
    words = {
        "abcdef": 0,
        **{f"w{i}.": i for i in range(1, families.VOCABULARY)},
    }  # transformers measures words by abcdef
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="abcdef")))
    plain = dense(model, row, **NEW)
    stops = {"stop_strings": [f"w{int(plain[0, 9 + 6])}."], "tokenizer": tokenizer}
    expected = dense(model, row, **NEW, **stops)
    assert expected.shape[1] < 9 + 21
    assert torch.equal(model.generate(**row, **NEW, **stops, lossless=8), expected)
    with pytest.raises(ConfigError, match="stop_strings need the tokenizer"):
        model.generate(**row, **NEW, stop_strings=["x"], lossless=True)


def test_a_streamer_hears_final_tokens_alone() -> None:
    """It fails where drafts are put before they are verified, or behind the answer's end."""
    toy, model = drafting("llama", 0.3)
    row = toy.batch([9])
    heard, told = _Heard(), _Heard()
    options = NEW | {"eos_token_id": [*range(16, 90, 11)], "pad_token_id": 0, "min_new_tokens": 5}
    dense(model, row, **options, streamer=told)
    tokens = model.generate(**row, **options, streamer=heard, lossless=4)
    assert heard.tokens == tokens[0].tolist() == told.tokens
    assert heard.ended


# -- sampling -------------------------------------------------------------------------------------------------------

WORDS, FIRST, ROWS = 6, 3, 8


@pytest.fixture(scope="module")
def speaker() -> Iterator[RoutedModel]:
    """A model of six words whose drafts are of another mind."""
    config = families.small_config("llama", vocab_size=WORDS, num_hidden_layers=2)
    config.update({"pad_token_id": None, "bos_token_id": None, "initializer_range": 0.4})
    torch.manual_seed(3)
    base = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    model = attach(base, SkipPlan.static([0]))
    yield model
    model.detach()


@torch.no_grad()
def law_of_three(model: RoutedModel, prompt: Tensor, temperature: float) -> tuple[Tensor, float]:
    """The dense law of the first three tokens, float64 (words^3), and how far the drafter's is from it."""
    laws = torch.ones(1, dtype=torch.float64)
    texts, gap = prompt, 0.0
    for _ in range(FIRST):
        with model.dense():
            step = (model(input_ids=texts).logits[:, -1].double() / temperature).softmax(-1)
        draft = (model(input_ids=texts).logits[:, -1].double() / temperature).softmax(-1)
        gap = max(gap, float((step - draft).abs().sum(-1).mean() / 2))
        laws = (laws[:, None] * step).flatten()
        texts = torch.cat([texts.repeat_interleave(WORDS, 0), torch.arange(WORDS).repeat(len(texts))[:, None]], 1)
    return laws, gap


@pytest.mark.parametrize(
    ("lossless", "draws"),
    [(3, 4_000), pytest.param(3, 20_000, marks=pytest.mark.slow), pytest.param(True, 20_000, marks=pytest.mark.slow)],
)
def test_sampled_tokens_have_the_dense_law(speaker: RoutedModel, lossless: bool | int, draws: int) -> None:
    """The first three tokens of 20,000 draws, where the drafter's law is far from the dense one.

    Eight rows draw at once, so that a row's refusal cuts another's round. It fails where a refused token is redrawn
    from p in place of the residual, and where refusals are too few or too many.
    """
    prompt, temperature = torch.tensor([[1, 2, 0, 3]]), 1.2
    law, gap = law_of_three(speaker, prompt, temperature)
    assert gap > 0.15
    torch.manual_seed(0)
    counts = torch.zeros(WORDS**FIRST)
    accepted = tried = 0
    options: dict[str, Any] = {"max_new_tokens": FIRST + 1, "do_sample": True, "temperature": temperature, "top_k": 0}
    for _ in range(draws // ROWS):
        texts = speaker.generate(input_ids=prompt.expand(ROWS, -1), **options, lossless=lossless)
        tried, accepted = tried + speaker.lossless.tried, accepted + speaker.lossless.accepted
        words = texts[:, prompt.shape[1] :][:, :FIRST]
        counts += torch.bincount((words * torch.tensor([WORDS**2, WORDS, 1])).sum(1), minlength=WORDS**FIRST)
    assert counts.sum() == draws
    assert lossless is True or 0 < accepted < tried
    assert chisquare(counts.numpy(), (law / law.sum() * counts.sum()).numpy()).pvalue > 1e-3


# -- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "said"),
    [
        (Target(scope="token"), "under scope 'token' there is none"),
        (Target(phase="prefill"), "phase 'prefill' generated tokens run every layer"),
    ],
)
def test_what_has_no_path_to_draft_along_is_refused(target: Target, said: str) -> None:
    toy = families.make("llama")
    model = attach(toy.model, RouterConfig(scope=target.scope, phase=target.phase))
    with pytest.raises(ConfigError, match=said):
        model.generate(**toy.batch([5]), lossless=True)


def test_vision_routers_are_refused() -> None:
    toy = families.make("llava")
    model = attach(toy.model, RouterConfig(group="vision"))
    with pytest.raises(ConfigError, match="with group 'vision' and phase 'both' generated tokens run every layer"):
        model.generate(**toy.batch([5]), lossless=True)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lossless": 0}, "lossless: expected True, or a number"),
        ({"lossless": "yes"}, "lossless: expected True, or a number"),
        ({"num_beams": 2}, "num_beams does not go with lossless=True"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens does not go with lossless=True"),
        ({"use_cache": False}, "drafts go on from the dense cache"),
        ({"output_attentions": True}, "output_attentions does not go with lossless=True"),
    ],
)
def test_options_that_do_not_go_with_drafts_are_refused(options: dict[str, Any], said: str) -> None:
    toy, model = drafting("llama", 0.3)
    with pytest.raises(ConfigError, match=said):
        model.generate(**toy.batch([5]), **{"lossless": True, **options})
    with pytest.raises(ConfigError, match="nothing was drafted yet"):
        model.lossless  # noqa: B018 - the property itself raises


def test_inside_dense_there_is_nothing_to_draft_along() -> None:
    toy, model = drafting("llama", 0.3)
    with model.dense(), pytest.raises(ConfigError, match="inside dense"):
        model.generate(**toy.batch([5]), lossless=True)
