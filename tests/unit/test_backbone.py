"""What can be routed, what is refused, and what a plan or configuration may say."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    BertConfig,
    BertLMHeadModel,
    LlamaModel,
    MambaConfig,
    MambaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from adaskip.backbone.inspect import inspect_backbone
from adaskip.errors import BackboneError, ConfigError, DataError
from adaskip.plan import SkipPlan
from adaskip.policies.learned.config import RouterConfig
from adaskip.runtime.attach import attach
from adaskip.runtime.fingerprint import check_fingerprint, fingerprint
from tests import toys


@pytest.mark.parametrize("name", toys.MAKERS)
def test_finds_the_decoder(name: str) -> None:
    found = inspect_backbone(toys.make(name).model)
    assert len(found.layers) == 4
    assert found.width == 32
    assert found.path.endswith("layers")
    assert bool(found.vision_ids) == (name in ("llava", "qwen2_vl"))


def bert() -> torch.nn.Module:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    return BertLMHeadModel(BertConfig(vocab_size=32, **sizes))


def refused() -> list[tuple[torch.nn.Module, str]]:
    mamba = MambaForCausalLM(MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=2, state_size=4))
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=32, d_model=16, num_layers=1, num_heads=2, d_kv=8, d_ff=16))
    return [
        (torch.nn.Linear(2, 2), "expected a transformers PreTrainedModel, got Linear"),
        (LlamaModel(toys.llama().config), "expected a model with a language-model head"),
        (bert(), "it is no decoder; expected a causal language model"),
        (t5, "an encoder-decoder model cannot be routed"),
        (mamba, "MambaForCausalLM"),
    ]


def test_what_cannot_be_routed_is_refused_untouched() -> None:
    for model, text in refused():
        with pytest.raises(BackboneError, match=text):
            attach(model)  # type: ignore[arg-type]
        assert not any("forward" in module.__dict__ for module in model.modules())


def test_attaching_twice_is_refused() -> None:
    model = toys.make("llama").model
    attach(model)
    with pytest.raises(BackboneError, match=r"already carries adaskip; call detach\(\)"):
        attach(model)


def test_group_vision_needs_images() -> None:
    with pytest.raises(BackboneError, match=r"has no vision tokens .* use group='all'"):
        attach(toys.make("llama").model, RouterConfig(group="vision"))


def test_bad_inputs_are_told() -> None:
    toy = toys.make("llama")
    model = attach(toy.model)
    batch = toy.batch([5, 6])
    with pytest.raises(DataError, match="expected input_ids or inputs_embeds"):
        model(attention_mask=batch["attention_mask"])
    with pytest.raises(ConfigError, match=r"routing: expected keep of shape \(layers=4, batch\), got \(3, 2\)"):
        model(**batch, routing=torch.ones(3, 2, dtype=torch.bool))
    with pytest.raises(DataError, match=r"prompt_mask: expected shape \(2, 6\)"):
        model(**batch, prompt_mask=torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(ConfigError, match="prefill_chunk_size"):
        model.generate(**batch, prefill_chunk_size=2)
    with pytest.raises(ConfigError, match="cache_implementation='static' cannot hold skipped layers"):
        model.generate(**batch, cache_implementation="static")
    with pytest.raises(BackboneError, match="decoder layer 0 was called outside the model"):
        toy.model.model(input_ids=batch["input_ids"])
    model(**batch)  # still fine after every error


def test_configurations_report_every_fault() -> None:
    with pytest.raises(ConfigError) as caught:
        RouterConfig(scope="promt", group="visoin", hidden=-1)  # type: ignore[arg-type]
    text = str(caught.value)
    assert "scope: expected prompt | token, got 'promt'; did you mean 'prompt'?" in text
    assert "group: expected all | vision, got 'visoin'; did you mean 'vision'?" in text
    assert "hidden: expected an integer >= 0, got -1" in text
    with pytest.raises(ConfigError, match="hiden: no such field, did you mean 'hidden'"):
        RouterConfig.from_dict({"hiden": 3})


def test_plans_name_layers_the_model_does_not_have() -> None:
    with pytest.raises(ConfigError, match=r"layer 7, leave=9 is outside the model: it has 4 layers, 0 to 3"):
        attach(toys.make("llama").model, SkipPlan(skip=(1, 7), leave=9))


def test_fingerprint_tells_models_apart_but_not_precisions() -> None:
    one, same, other = (toys.make("llama", seed=s).model for s in (0, 0, 1))
    taken = fingerprint(inspect_backbone(one))
    for model in (one, same, one.to(torch.bfloat16)):
        check_fingerprint(taken, inspect_backbone(model), strict=True)
    with pytest.raises(BackboneError, match=r"another backbone: weights: \d+ of \d+ differ, such as model\."):
        check_fingerprint(taken, inspect_backbone(other), strict=True)
    assert (
        taken.digest() == fingerprint(inspect_backbone(same)).digest() != fingerprint(inspect_backbone(other)).digest()
    )


def test_keep_rate_counts_what_ran() -> None:
    """Half the layers of equal cost: half the FLOPs, in prefill and while decoding."""
    toy = toys.make("llama")
    model = attach(toy.model, SkipPlan.static([0, 2]))
    model.generate(**toy.batch([5, 9]), max_new_tokens=4, do_sample=False)
    assert model.routing.keep_rate.tolist() == [0.5, 0.5]
    assert str(model.routing) == ".#.#\n.#.#"


def test_dense_flops_agree_with_the_flop_counter() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    for name in ("llama", "qwen2"):
        toy = toys.make(name, "eager")
        model = attach(toy.model, SkipPlan.static([1]))
        batch = toy.batch([8])
        with FlopCounterMode(display=False) as counter:
            model(**batch, use_cache=False)
        counted = counter.get_total_flops() - 2 * 8 * 32 * toys.VOCABULARY  # the language-model head
        rotary = 4 * 2 * 8  # the outer product of positions and frequencies, once a forward
        assert abs(counted - float(model.routing.executed[0])) <= 2 * rotary
