"""What users of transformers type: positional arguments, PEFT's order, tools that expect a Hugging Face model."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, Trainer, TrainingArguments, pipeline

import adaskip
from adaskip.errors import AdaSkipError, BackboneError, ConfigError, DataError
from adaskip.policies.learned.config import RouterConfig
from tests.routed_toys import GREEDY, answers, batch, llama, routed, spread, tokenizer


def test_inputs_by_position() -> None:
    """Somebody writes model(ids, mask), as for any Hugging Face model; catches TypeError and a mask that is lost."""
    model, inputs = routed(), batch()
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    named = model(input_ids=ids, attention_mask=mask).logits
    assert torch.equal(model(ids, mask).logits, named)
    assert torch.equal(model(ids, attention_mask=mask).logits, named)
    assert torch.equal(model.backbone(ids, mask).logits, named)
    assert not torch.equal(model(ids).logits, named)


def test_generate_by_position() -> None:
    """Somebody writes model.generate(ids, generation_config); catches another order than Hugging Face's."""
    model = routed()
    ids = batch(7)["input_ids"]
    expected = model.generate(input_ids=ids, **GREEDY)
    assert torch.equal(model.generate(ids, **GREEDY), expected)
    assert torch.equal(model.generate(ids, GenerationConfig(**GREEDY)), expected)
    assert torch.equal(model.generate(inputs=ids, generation_config=GenerationConfig(**GREEDY)), expected)
    with pytest.raises(ConfigError, match="prefill_chunk_size"):
        model.generate(ids, GenerationConfig(**GREEDY, prefill_chunk_size=2))


@pytest.mark.parametrize("options", [{"use_cache": False}, {}], ids=["no cache", "cache"])
def test_generate_of_the_backbone(options: dict[str, Any]) -> None:
    """Somebody hands model.backbone to a tool that generates without a cache; catches routes decided anew by every
    token, from the answer so far."""
    model, inputs = routed(), batch(7, 12)
    expected = model.generate(**inputs, **GREEDY, **options)
    decisions = model.routing.keep
    assert not decisions.all()
    assert torch.equal(model.backbone.generate(**inputs, **GREEDY, **options), expected)
    assert torch.equal(model.routing.keep, decisions)
    found = pipeline("text-generation", model=model.backbone, tokenizer=tokenizer())(
        "abc, def", return_tensors=True, **GREEDY, **options
    )
    ids = tokenizer()("abc, def", return_tensors="pt")["input_ids"]
    assert found[0]["generated_token_ids"] == model.generate(ids, **GREEDY, **options)[0].tolist()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"prefill_chunk_size": 2}, "only the first chunk"),
        ({"cache_implementation": "static"}, "cannot hold skipped layers"),
        ({"guidance_scale": 2.0}, "a second prompt"),
    ],
)
def test_what_generate_of_the_backbone_cannot_do(options: dict[str, Any], text: str) -> None:
    """The same options on model.backbone.generate; catches wrong answers and texts about a layer deep inside. Inside
    dense() and after detach() the model can do whatever it could."""
    model, inputs = routed(), batch(7)
    with pytest.raises(ConfigError, match=text):
        model.backbone.generate(**inputs, **GREEDY, **options)
    expected = llama().generate(**inputs, **GREEDY, **options)
    with model.dense():
        assert torch.equal(model.backbone.generate(**inputs, **GREEDY, **options), expected)
        assert torch.equal(model.generate(**inputs, **GREEDY, **options), expected)
    base = model.detach()
    assert "generate" not in vars(base)
    assert torch.equal(base.generate(**inputs, **GREEDY, **options), expected)


def test_a_copy_of_the_backbone_generates_by_itself() -> None:
    """Somebody copies the routed backbone; catches a copy whose generate runs the first one's weights."""
    model, inputs = routed(), batch(7)
    twin = copy.deepcopy(model.backbone)
    expected = model.generate(**inputs, **GREEDY)
    with torch.no_grad():
        model.backbone.get_output_embeddings().weight.mul_(-1.0)
    assert torch.equal(twin.generate(**inputs, **GREEDY), expected)
    assert not torch.equal(model.generate(**inputs, **GREEDY), expected)


def test_slips_of_the_call() -> None:
    """Somebody forgets the stars, passes text, or an argument twice; catches an AttributeError deep in a layer."""
    model, inputs = routed(), batch()
    with pytest.raises(DataError, match=r"expected a tensor first, got a dict; write model\(\*\*inputs\)"):
        model(inputs)
    with pytest.raises(DataError, match=r"got a BatchEncoding; write model\.generate\(\*\*inputs\)"):
        model.generate(tokenizer()("abc", return_tensors="pt"))
    with pytest.raises(DataError, match=r"inputs: expected token ids in a tensor .* got a str; write .*tokenizer"):
        model.generate("abc")
    with pytest.raises(DataError, match=r"input_ids: expected token ids in a tensor .* got a list"):
        model(input_ids=[[1, 2]])
    with pytest.raises(DataError, match="input_ids given twice"):
        model(inputs["input_ids"], input_ids=inputs["input_ids"])
    with pytest.raises(DataError, match="input_ids given twice"):
        model.backbone(inputs["input_ids"], input_ids=inputs["input_ids"])
    with pytest.raises(DataError, match="expected at most"):
        model(*[None] * 40)


def test_folder_and_backbone_in_either_order(tmp_path) -> None:
    """Somebody writes from_pretrained(base, folder), as in PEFT; catches a TypeError of pathlib."""
    expected = answers(spread(adaskip.attach(llama())))
    routed().save_pretrained(tmp_path)
    assert torch.equal(answers(adaskip.RoutedModel.from_pretrained(llama(), tmp_path)), expected)
    assert torch.equal(answers(adaskip.RoutedModel.from_pretrained(llama(), str(tmp_path))), expected)
    assert torch.equal(answers(adaskip.RoutedModel.from_pretrained(tmp_path, llama())), expected)
    assert torch.equal(answers(adaskip.RoutedModel.from_pretrained(backbone=llama(), folder=tmp_path)), expected)
    with pytest.raises(ConfigError, match=r"got NoneType and LlamaForCausalLM; write RoutedModel\.from_pretrained"):
        adaskip.RoutedModel.from_pretrained(llama())
    with pytest.raises(ConfigError, match=r"got \w+ and str; write RoutedModel\.from_pretrained"):
        adaskip.RoutedModel.from_pretrained(str(tmp_path), str(tmp_path))
    with pytest.raises(ConfigError, match="dtype would load a backbone, but one is given already"):
        adaskip.RoutedModel.from_pretrained(tmp_path, llama(), dtype="float32")


def test_attributes_that_scripts_read() -> None:
    """A script reads model.device, model.dtype and model.generation_config; catches AttributeError."""
    model = routed()
    assert model.device == torch.device("cpu")
    assert model.dtype == torch.float32
    assert model.to(torch.bfloat16).dtype == torch.bfloat16
    assert model.generation_config is model.backbone.generation_config
    model.generation_config = GenerationConfig(max_new_tokens=3)
    assert model.backbone.generation_config.max_new_tokens == 3


def test_tools_take_the_backbone_or_say_so(tmp_path) -> None:
    """Somebody passes the routed model to pipeline or Trainer; catches errors that name no way out."""
    model = routed()
    with pytest.raises(AdaSkipError, match=r"pass model\.backbone, which follows the routing"):
        pipeline("text-generation", model=model, tokenizer=tokenizer())
    options = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    with pytest.raises(AdaSkipError, match=r"adaskip\.RouterTuner instead of transformers\.Trainer"):
        Trainer(model=model, args=options)
    asked = pipeline("text-generation", model=model.backbone, tokenizer=tokenizer())
    assert asked("abc", max_new_tokens=2)[0]["generated_text"].startswith("abc")
    assert model.routing.keep.shape == (4, 1)
    assert not hasattr(model, "no_such_thing")
    assert getattr(model, "hf_device_map", None) is None


def test_the_configuration_is_the_models() -> None:
    """A tool reads or sets model.config.use_cache; catches silence where model.backbone.config is meant."""
    model = routed()
    with pytest.raises(AttributeError, match=r"RoutedModel\.config has no 'vocab_size'.*model\.backbone"):
        model.config.vocab_size  # noqa: B018
    with pytest.raises(AdaSkipError, match=r"RoutedModel\.config has no 'use_cache'"):
        model.config.use_cache = False
    with pytest.raises(dataclasses.FrozenInstanceError):
        model.target.scope = "token"


def test_attach_of_the_wrong_thing_says_what_to_write() -> None:
    """Somebody attaches a compiled model, a routed one, a name, or a plan by position; catches useless advice."""
    with pytest.raises(BackboneError, match=r"got OptimizedModule around .*: adaskip\.attach\(model\._orig_mod\)"):
        adaskip.attach(torch.compile(llama(), backend="eager"))
    with pytest.raises(BackboneError, match=r"got DataParallel around .*: adaskip\.attach\(model\.module\)"):
        adaskip.attach(torch.nn.DataParallel(llama()))
    with pytest.raises(BackboneError, match=r"RoutedModel carries adaskip already; .*model\.detach\(\)"):
        adaskip.attach(routed())
    with pytest.raises(BackboneError, match="expected a transformers PreTrainedModel, got str; load one with"):
        adaskip.attach("some/model")
    with pytest.raises(ConfigError, match=r"a SkipPlan or another policy, got dict; write adaskip\.attach\(model, "):
        adaskip.attach(llama(), {"scope": "token"})
    with pytest.raises(ConfigError, match="or another policy, got RouterConfig"):
        adaskip.attach(llama(), RouterConfig)


def test_a_detached_handle_does_not_pretend_to_route() -> None:
    """Somebody goes on calling the handle after detach(); catches dense answers that look routed."""
    model = routed()
    bare = model.detach()
    assert model.detach() is bare
    with pytest.raises(BackboneError, match="this RoutedModel was detached"):
        answers(model)
    with pytest.raises(BackboneError, match="this RoutedModel was detached"):
        model(**batch())
    assert torch.equal(answers(bare), answers(llama()))
    assert torch.equal(answers(spread(adaskip.attach(bare))), answers(routed()))


def test_only_routers_train() -> None:
    """A script says model.requires_grad_(); catches a backbone that trains along silently."""
    model = routed().requires_grad_()
    assert not any(weight.requires_grad for weight in model.backbone.parameters())
    assert all(weight.requires_grad for weight in model.routers.parameters())
    assert not any(weight.requires_grad for weight in model.requires_grad_(False).parameters())


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [("prefill_chunk_size", 4, "only the first chunk"), ("cache_implementation", "static", "cannot hold skipped"),
     ("guidance_scale", 1.5, "a second prompt")],
)  # fmt: skip
def test_options_are_refused_wherever_they_stand(option: str, value: Any, message: str) -> None:
    """The model's own configuration says it, beside one that is given; catches routes of a part of the prompt."""
    model = routed()
    ids = torch.arange(3, 12)[None]
    with pytest.raises(ConfigError, match=message):
        model.generate(ids, max_new_tokens=2, **{option: value})
    setattr(model.generation_config, option, value)
    with pytest.raises(ConfigError, match=message):
        model.generate(ids, GenerationConfig(max_new_tokens=2))
