"""Reruns give what whole passes give, and count what the runtime counts."""

from __future__ import annotations

import pytest
import torch

import adaskip
from adaskip.batch import Batch, exact_match
from adaskip.errors import ConfigError
from adaskip.survey.record import Recorded, record
from adaskip.theory.costs import predicted
from tests import families, toys


def prepared(name: str = "llama", group: str = "all", **options: bool) -> Recorded:
    """Record three inputs whose routers decide differently."""
    toy = toys.make(name)
    model = adaskip.attach(toy.model, adaskip.RouterConfig(group=group))
    torch.manual_seed(3)
    for head in model.routers:
        torch.nn.init.normal_(head.outer.weight, std=2.0)
    inputs = toy.batch([7, 4, 6])
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -2:] = inputs["input_ids"][:, -2:]
    labels[1, -2] = -100  # rows with one and with two predicted tokens
    return record(model, Batch(inputs, labels, inputs["attention_mask"].bool() & (labels == -100)), **options)


@torch.no_grad()
def whole(recorded: Recorded, keep: torch.Tensor) -> torch.Tensor:
    logits = recorded.model(**recorded.batch.arguments(), routing=keep).logits
    return predicted(logits, recorded.batch.supervised)


@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize(("name", "group"), [("llama", "all"), ("llava", "vision"), ("qwen2_vl", "vision")])
@torch.no_grad()
def test_a_rerun_gives_what_a_whole_pass_gives(name: str, group: str, routed: bool) -> None:
    recorded = prepared(name, group, routed=routed)
    assert recorded.keep.all() != routed
    drawn = torch.rand(5, *recorded.keep.shape, generator=torch.Generator().manual_seed(0)) > 0.5
    last = recorded.keep.clone()
    last[-1] = ~last[-1]
    for keep in (*drawn, last, recorded.keep):
        ran = []
        with recorded.model.observe(lambda layer, before, after, ran=ran: ran.append(layer)):
            logits = recorded.rerun(keep)
        same = int((keep == recorded.keep).all(1).long().cumprod(0).sum())
        assert ran == list(range(same, 4)), "only layers from the first that is decided otherwise are to run"
        rate = recorded.model.routing.keep_rate
        assert logits.equal(whole(recorded, keep))
        assert rate.equal(recorded.model.routing.keep_rate)


@pytest.mark.parametrize("name", ["llama", "llava"])
@torch.no_grad()
def test_a_wide_head_reads_no_prompt(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches logits of whole prompts over a vocabulary of 49,000, most of the memory of a survey."""
    narrow = prepared(name, "all")
    monkeypatch.setattr("adaskip.survey.record.WIDE", 0)
    read: list[int] = []
    head = narrow.model.backbone.get_output_embeddings()
    head.register_forward_pre_hook(lambda head, states: read.append(states[0].shape[1]))
    wide = record(narrow.model, narrow.batch)
    assert torch.allclose(wide.logits, narrow.logits, atol=1e-5)
    assert read == [3], "the last prompt token and the two of the answer"


@torch.no_grad()
def test_states_that_a_model_adds_to_between_layers_are_those_that_layers_got() -> None:
    """qwen3_vl adds picture features to the states between its first layers."""
    toy = families.make("qwen3_vl", "sdpa")
    model = adaskip.attach(toy.model, adaskip.SkipPlan(group="vision"))
    inputs = toy.batch([7, 4])
    real = inputs["attention_mask"].bool()
    recorded = record(model, Batch(inputs, torch.where(real, inputs["input_ids"], -100), real))
    between = [entered.equal(state) for entered, state in zip(recorded.entered, recorded.states, strict=False)]
    assert between[0]
    assert not all(between)
    for layer in range(len(between)):
        keep = recorded.skipping([layer])
        torch.testing.assert_close(recorded.rerun(keep), whole(recorded, keep), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_without_states_the_whole_batch_runs_again() -> None:
    recorded = prepared(states=False)
    assert not recorded.states
    keep = recorded.skipping([2, 3])
    assert keep.tolist() == [[True] * 3, [True] * 3, [False] * 3, [False] * 3]
    assert recorded.rerun(keep).equal(whole(recorded, keep))


@torch.no_grad()
def test_a_dense_rerun_runs_from_another_state() -> None:
    recorded = prepared(routed=True)
    with recorded.model.dense():
        logits = recorded.model(**recorded.batch.arguments()).logits
    assert recorded.rerun_dense(0).equal(predicted(logits, recorded.batch.supervised))
    assert recorded.rerun_dense(2).equal(whole(recorded, torch.cat([recorded.keep[:2], torch.ones(2, 3).bool()])))
    assert recorded.rerun_dense(4, recorded.states[4]).equal(recorded.logits)
    assert not recorded.rerun_dense(4, recorded.states[3]).equal(recorded.logits)
    assert len(recorded.states) == 5, "an entry is for one rerun"
    with pytest.raises(ConfigError, match="expected a start of at least 1 with an entry, got 0"):
        recorded.rerun_dense(0, recorded.states[0])


@torch.no_grad()
def test_matches_are_those_of_whole_logits() -> None:
    recorded = prepared()
    logits = recorded.model(**recorded.batch.arguments(), routing=recorded.skipping([])).logits
    supervised = recorded.batch.supervised
    recorded.batch.labels[:, 1:][supervised] = predicted(logits, supervised).argmax(-1)
    assert recorded.match(recorded.logits).tolist() == [True, True, True]
    recorded.batch.labels[0, -2] += 1  # the first of two
    recorded.batch.labels[1, 1:] = -100  # nothing to be wrong about
    assert exact_match(logits, recorded.batch.labels).tolist() == [False, True, True]
    assert recorded.match(predicted(logits, recorded.batch.supervised)).tolist() == [False, True, True]
