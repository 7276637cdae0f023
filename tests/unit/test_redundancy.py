import json
import math

import pytest
import torch

import adaskip
from adaskip.batch import Batch
from adaskip.errors import BackboneError, DataError
from adaskip.plan import SkipPlan
from adaskip.report.redundancy import profile_plot
from adaskip.runtime.attach import attach
from adaskip.survey.layers import _spread, survey_layers
from adaskip.survey.skips import measure_skips
from adaskip.theory import bounds, prediction
from adaskip.theory.claims import judge_claims
from adaskip.verbs.profile import profile_model, summary
from tests import toys


def batches_of(toy, n=48, size=16, lengths=(7, 4, 6, 5)):
    """Teacher-forced batches of a toy: the last two tokens are the answer."""
    found = []
    for start in range(0, n, size):
        inputs = toy.batch([*lengths] * (size // 4), seed=start)
        labels = torch.full_like(inputs["input_ids"], -100)
        labels[:, -2:] = inputs["input_ids"][:, -2:]
        prompt = inputs["attention_mask"].bool() & (labels == -100)
        found.append(Batch(inputs, labels, prompt))
    return found


@pytest.fixture(scope="module")
def llava_profile():
    toy = toys.make("llava")
    with torch.no_grad():  # layer 2 does nothing: exactly redundant
        layer = toy.model.model.language_model.layers[2]
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    before = {name: weight.clone() for name, weight in toy.model.state_dict().items()}
    found = adaskip.profile(toy.model, batches_of(toy, 64, 32), tolerance=1e-3, tangents=32)
    assert all(torch.equal(weight, before[name]) for name, weight in toy.model.state_dict().items())
    assert all(weight.requires_grad for weight in toy.model.parameters())
    return found


def test_a_profile_holds_every_notion_of_every_layer_and_group(llava_profile):
    found = json.loads(json.dumps(llava_profile.to_dict(), allow_nan=False))
    assert [(row["group"], row["layer"]) for row in found["layers"]] == [
        (group, layer) for group in ("all", "vision") for layer in range(4)
    ]
    assert found["group"] == "vision"
    assert found["chain_violations"] == 0
    checks = found["groups"]["vision"]["chain"]
    assert checks["3b two-point"] == {"checked": 4 * 64 * 2, "violated": 0}
    assert {"1 proximal", "5 fano", "6b band", "3d margin"} <= set(checks)
    notions = {"cosine", "rho", "cka", "svcca", "usable_information_lost", "first_order", "score", "bound"}
    vision = {"attention_mass", "value_weighted_mass", "key_removal"}
    for row in found["layers"]:
        assert notions <= set(row)
        assert (vision <= set(row)) == (row["group"] == "vision")
        assert row["functional"]["low"] <= row["functional"]["estimate"] <= row["functional"]["high"]
        assert row["proximal"]["share_above"] == sorted(row["proximal"]["share_above"], reverse=True)
        assert [codes["codes"] for codes in row["code_entropy"]] == [2, 4]
    assert set(found["rank_correlation"]) >= vision | {"cosine", "bound", "first_order", "code_entropy"}


def test_the_redundant_layer_is_found_by_every_notion(llava_profile):
    for group in llava_profile.groups:
        still = group.layers[2]
        assert still["functional"]["estimate"] == pytest.approx(0.0, abs=1e-9)
        for name in ("cosine", "rho", "first_order", "score"):
            values = [row[name]["estimate"] for row in group.layers]
            assert values[2] == min(values) == pytest.approx(0.0, abs=1e-6)
        assert all(codes["entropy"] == 0.0 for codes in still["code_entropy"])
        assert still["cka"]["estimate"] == pytest.approx(0.0, abs=1e-9)
        assert still["verdict"] != "inadmissible"
        for row in group.layers:
            assert row["layer"] == 2 or row["functional"]["estimate"] > 1e-3
    first_order = llava_profile.groups[0].rank_correlation["first_order"]
    assert first_order["low"] <= first_order["estimate"] <= first_order["high"]


def test_curves_end_where_nothing_is_skipped(llava_profile):
    for group in llava_profile.groups:
        entry, leave = group.late_entry, group.early_exit
        assert [row["k"] for row in entry] == [row["k"] for row in leave] == [0, 1, 2, 3, 4]
        assert entry[0]["kl"]["estimate"] == leave[4]["kl"]["estimate"] == 0.0
        assert entry[4]["kl"]["estimate"] == pytest.approx(leave[0]["kl"]["estimate"])
        assert entry[4]["kl"]["estimate"] > 0.01


def test_the_picture_and_the_tables_show_the_claims(llava_profile, tmp_path):
    found = llava_profile.to_dict()
    figure = profile_plot(found, tmp_path / "profile.png")
    assert (tmp_path / "profile.png").stat().st_size > 20_000
    shown = " ".join(text.get_text() for axes in figure.axes for text in axes.texts)
    for group in llava_profile.groups:
        for claim in group.claims:
            assert claim.claim in shown
    assert "violations of the chain of bounds: 0" in figure.get_suptitle()
    tables = list(summary(found))
    assert len(tables) == 8
    assert {row[""] for row in tables[3]} <= {"holds", "FAILS", "undecided"}
    with pytest.raises(DataError, match="the profile holds no layers"):
        profile_plot({"layers": []})


def test_text_only_models_have_group_all_and_one_layer_is_undecided():
    toy = toys.make("llama")
    del toy.model.model.layers[1:]
    toy.model.config.num_hidden_layers = 1
    found = adaskip.profile(toy.model, batches_of(toy, 48), tangents=8).to_dict()
    assert list(found["groups"]) == ["all"]
    assert set(found["rank_correlation"].values()) == {None}
    assert "attention_mass" not in found["layers"][0]
    json.dumps(found, allow_nan=False)
    profile_plot(found)
    with pytest.raises(BackboneError, match="group 'vision': LlamaForCausalLM has no vision tokens"):
        adaskip.profile(toy.model, batches_of(toy), ("vision",))
    assert not hasattr(toy.model, "_adaskip")


def test_what_cannot_be_measured_is_a_plain_error():
    toy = toys.make("llava")
    kept = batches_of(toy, 48)
    for few in ([], batches_of(toy, 16)):
        count = sum(len(batch) for batch in few)
        with pytest.raises(DataError, match=rf"expected at least 33 inputs, .* at alpha=0\.1, got {count}"):
            adaskip.profile(toy.model, few, ("all",), tangents=0)
    kept[0].labels[3] = -100
    with pytest.raises(DataError, match=r"input 3 of a batch has no supervised token \(group 'all'\); leave it out"):
        adaskip.profile(toy.model, kept, ("all",))
    kept = batches_of(toy, 48)
    kept[0].inputs["input_ids"][2, kept[0].inputs["input_ids"][2] == toys.IMAGE] = 11
    kept[0].inputs["pixel_values"] = kept[0].inputs["pixel_values"][1:]
    with pytest.raises(DataError, match=r"input 2 of a batch has no token of its group \(group 'vision'\)"):
        adaskip.profile(toy.model, kept, ("vision",))
    toy.model.model.language_model.layers[1].mlp.down_proj.weight.data.fill_(math.nan)
    with pytest.raises(DataError, match="not finite"):
        adaskip.profile(toy.model, batches_of(toy, 48), ("all",))


def test_a_wide_vocabulary_is_compared_a_few_tokens_at_a_time(monkeypatch):
    """Would catch: float64 copies of all logits, gigabytes at a real vocabulary; or tokens that are left out."""
    model = attach(toys.make("llama").model, SkipPlan())
    whole = survey_layers(model, batches_of(toys.make("llama"), 16), tangents=0)
    widths = []
    exact = bounds.kl_exact
    monkeypatch.setattr("adaskip.theory.bounds.kl_exact", lambda p, q: widths.append(len(p)) or exact(p, q))
    monkeypatch.setattr("adaskip.survey.layers._AT_ONCE", 3 * toys.VOCABULARY)
    parts = survey_layers(model, batches_of(toys.make("llama"), 16), tangents=0)
    assert max(widths) == 3
    assert parts.chain == whole.chain
    for name in ("kl", "s", "u"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("group", ["all", "vision"])
def test_exact_costs_of_all_layers_take_at_most_half_the_passes(group):
    toy = toys.make("llava")
    model = attach(toy.model, SkipPlan(group=group))
    tokens = [0]

    def count(module, args, kwargs):
        tokens[0] += kwargs["hidden_states"].shape[:2].numel()

    for layer in model.spec.layers:
        layer.self_attn.register_forward_pre_hook(count, with_kwargs=True)
    batch = batches_of(toy, 16, lengths=(2, 3, 2, 3))
    measure_skips(model, batch)
    layers, whole = 4, batch[0].labels.numel()
    passes = tokens[0] / (layers * whole)
    # under group vision a skipped layer still runs on the text, here half of the prompt
    assert passes <= layers / 2 + 1


def test_sampled_tokens_lie_in_the_group_and_are_spread():
    group = torch.tensor([[0, 1, 1, 1, 1, 0], [0, 0, 0, 0, 1, 0]]).bool()
    assert _spread(group, 2).tolist() == [[2, 4], [4, 4]]
    toy = toys.make("llava")
    model = attach(toy.model, SkipPlan(group="vision"))
    found = survey_layers(model, batches_of(toy, 16), tangents=4, tokens=3)
    assert found.tokens.shape == (16, 3, 5, 32)
    assert found.tangent[:4].isfinite().all()
    assert found.tangent[4:].isnan().all()
    assert (found.mass > 0).all()


def test_claims_hold_fail_or_stay_open():
    draw = torch.Generator().manual_seed(0)

    def costs(*means):
        return torch.tensor(means) * (0.5 + torch.rand(200, len(means), generator=draw))

    curves = {"late_entry": costs(0, 3.0, 4.0, 5.0), "early_exit": costs(5.0, 1.0, 0.001, 0)}
    none, every = [False] * 3, [True] * 3
    sets = {"admissible": [False, False, True], "inadmissible": [True, True, False], "cheap": none}
    single = costs(3.0, 1.0, 0.001)
    claims = judge_claims("vision", curves, single, single[:, 2], sets, 0.05)
    assert [claim.holds for claim in claims] == [True, False, True, True, None, True]
    assert claims[0].about == "vision tokens absent from the last 1 of 3 layers"
    assert claims[3].about == "layers 0, 1"
    assert (claims[4].about, claims[4].n) == ("no layer", 0)
    close = judge_claims("all", curves, costs(0.05, 0.05, 0.05), single[:, 2], dict.fromkeys(sets, every), 0.05)
    assert close[2].holds is None


def test_rank_correlation_of_notions_that_rank_do_not_or_cannot():
    draw = torch.Generator().manual_seed(0)
    cost = torch.rand(50, 1, generator=draw) + torch.arange(6.0)
    good = prediction.rank_over_layers(cost + 0.1 * torch.rand(50, 6, generator=draw), cost)
    assert (good.estimate, good.low, good.high, good.n) == (1.0, 1.0, 1.0, 50)
    noise = prediction.rank_over_layers(torch.rand(50, 6, generator=draw), cost)
    assert noise.low < noise.estimate < noise.high
    assert noise.high - noise.low > 0.3
    assert prediction.rank_over_layers(torch.ones(50, 6), cost) is None
    assert prediction.rank_over_layers(cost[:, :2], cost[:, :2]) is None
    holes = cost.clone()
    holes[:30, 0] = math.nan
    assert prediction.rank_over_layers(holes, cost).n == 20
    assert prediction.rank_over_inputs(cost, cost) == pytest.approx(1.0)
    assert prediction.rank_over_inputs(torch.ones(50, 6), cost) is None


def test_the_verb_needs_nothing_more_for_the_demo_and_data_for_others(tmp_path):
    found = profile_model("digits-vlm", group="vision", examples=40, oracle=0, output=tmp_path).to_dict()
    assert json.loads((tmp_path / "profile.json").read_text())["rank_correlation"] == found["rank_correlation"]
    assert (tmp_path / "profile.png").is_file()
    assert found["chain_violations"] == 0
    assert found["oracle"] is None
    assert len(found["layers"]) >= 8
    with pytest.raises(adaskip.AdaSkipError, match="needs prompts with answers; expected --data SOURCE"):
        profile_model("some/model")
    with pytest.raises(adaskip.AdaSkipError, match="expected group all or vision, got 'visoin'"):
        profile_model("digits-vlm", group="visoin")
