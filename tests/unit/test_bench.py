"""`adaskip bench`: what it compares is the same computation, what it reports adds up, what it cannot do it says."""

from __future__ import annotations

import gc
import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from transformers import Cache

from adaskip import cli
from adaskip.backbone.inspect import inspect_backbone, twin
from adaskip.bench import table
from adaskip.bench.forced import different, force, spread_out
from adaskip.bench.graph import Graph
from adaskip.bench.lossless import lossless_cell
from adaskip.bench.many import many_cell
from adaskip.bench.random_model import Size, random_subject
from adaskip.bench.rounds import LEAST, interleave, ratio, spread
from adaskip.bench.settings import BenchSettings, read
from adaskip.bench.sides import Side, ideal
from adaskip.bench.subject import Subject, stored_subject
from adaskip.errors import ConfigError
from adaskip.plan import KEEP_ALL, SkipPlan
from adaskip.policies.learned.config import RouterConfig
from adaskip.runtime.attach import attach
from adaskip.runtime.timing import cache_bytes, peak_memory
from tests import families

CPU = torch.device("cpu")


def bench(subject: Subject, skip: list[float] | None, batch: list[int], path: list[str], **options) -> list[dict]:
    """The rows of these settings; which model they name is nothing to the point."""
    return table.bench(subject, BenchSettings(target="a", skip=skip, batch=batch, path=path, **options))


TINY = ["--layers", "2", "--hidden", "64"]
SIZE = Size(layers=4, hidden=64, heads=2, vocabulary=96)


def small(backbone: str = "llama", image_tokens: int = 0) -> Subject:
    group = "vision" if image_tokens else "all"
    return random_subject(backbone, SIZE, 9, 3, image_tokens, group, "sdpa", torch.float32, CPU, seed=0)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "falcon", "bloom", "mixtral", "llava", "qwen2_vl"])
@torch.no_grad()
def test_a_twin_cut_to_some_layers_is_the_plan_that_leaves_the_others_out(name: str) -> None:
    toy = families.make(name)
    batch = toy.batch([7, 7])
    spec = inspect_backbone(toy.model.requires_grad_(False))
    short = twin(spec, [0, 2])
    assert {id(w) for w in short.parameters()} < {id(w) for w in toy.model.parameters()}
    whole = toy.model(**batch).logits
    assert torch.equal(twin(spec)(**batch).logits, whole)
    cut = short(**batch, use_cache=True)
    assert torch.equal(toy.model(**batch).logits, whole)
    assert cache_bytes(cut.past_key_values) * 2 == cache_bytes(toy.model(**batch, use_cache=True).past_key_values)
    routed = attach(toy.model, SkipPlan.static([1, 3]))
    assert torch.allclose(routed(**batch).logits, cut.logits, atol=1e-5)


def test_a_twin_keeps_at_least_one_layer() -> None:
    with pytest.raises(ConfigError, match="expected at least one layer to stay, got none"):
        twin(inspect_backbone(families.make("llama").model), [])


def test_layers_are_left_out_evenly_and_mixed_rows_leave_out_equally_many() -> None:
    assert spread_out(8, 0.25, 1, "uniform")[:, 0].tolist() == [True, True, False, True, True, True, False, True]
    mixed = spread_out(8, 0.25, 4, "mixed")
    assert (mixed.sum(0) == 6).all()
    assert len({tuple(row) for row in mixed.T.tolist()}) == 4
    assert spread_out(8, 0.0, 2, "mixed").all()


def test_so_many_different_ways_to_leave_out_equally_many_layers() -> None:
    keep = different(8, 0.5, 10, 4)
    assert (keep.sum(0) == 4).all()
    assert len({tuple(row) for row in keep.T.tolist()}) == 4
    assert torch.equal(keep[:, :4], keep[:, 4:8])
    assert torch.equal(keep, different(8, 0.5, 10, 4))
    assert len({tuple(row) for row in different(4, 0.25, 4, 4).T.tolist()}) == 4
    assert different(8, 0.0, 3, 4).all()


@pytest.mark.parametrize("image_tokens", [0, 4])
def test_routers_work_in_full_and_then_decide_as_they_are_told(image_tokens: int) -> None:
    """Every head sees every row of the forced pass; catches decisions that come without the work they should cost."""
    subject = small("llava" if image_tokens else "llama", image_tokens)
    inputs = subject.batch(4)
    worked: list[int] = []
    for head in subject.routed.routers:
        head.register_forward_hook(lambda head, args, logits: worked.append(len(logits)))
    draw = torch.Generator().manual_seed(0)
    for keep in (torch.rand(4, 4, generator=draw) > 0.5, spread_out(4, 0.5, 4, "uniform")):
        worked.clear()
        model = force(subject, keep)
        with torch.no_grad():
            model(**inputs)
        assert torch.equal(model.routing.keep, keep)
        assert worked == [4] * 4
        with torch.no_grad():
            expected = subject.routed(**inputs, routing=keep).logits
        assert torch.equal(model(**inputs).logits, expected)
    subject.routed.set_threshold(KEEP_ALL)  # as `adaskip calibrate` leaves it where it can certify none
    model = force(subject, keep)
    with torch.no_grad():
        model(**inputs)
    assert torch.equal(model.routing.keep, keep)


def test_a_plan_is_forced_beforehand_and_goes_one_way() -> None:
    """Its passes know their decisions without a look at the device, as the plan's own do."""
    subject = small()
    subject = replace(subject, routed=attach(twin(subject.spec), SkipPlan.static([1])))
    model = force(subject, spread_out(4, 0.5, 2, "uniform"))
    assert model.runtime.known_flags == (True, False, True, False)
    assert [row["keep"] for row in bench(subject, [0.5], [2], ["uniform"], new=2, budget=0)] == [0.5, 0.5]
    with pytest.raises(ConfigError, match="--path mixed: a plan sends every row the same way; expected --path uniform"):
        bench(subject, [0.5], [2], ["mixed"], new=2, budget=0)


@pytest.mark.parametrize(
    ("backbone", "image_tokens"), [("llama", 0), ("mixtral", 0), ("llava", 9), ("qwen2_vl", 6), ("qwen2_5_vl", 6)]
)
def test_every_row_adds_up(backbone: str, image_tokens: int) -> None:
    subject = small(backbone, image_tokens)
    rows = bench(subject, [0.0, 0.5], [1, 3], ["uniform", "mixed"], new=2, budget=0)
    assert [(r["phase"], r["batch"], r["path"], r["skip"]) for r in rows[::2]] == [
        ("prefill", 1, "uniform", 0.0),
        ("prefill", 1, "uniform", 0.5),
        ("prefill", 3, "uniform", 0.0),
        ("prefill", 3, "uniform", 0.5),
        ("prefill", 3, "mixed", 0.5),
    ]
    assert {r["phase"] for r in rows[1::2]} == {"decode"}
    for row in rows:
        assert row["rounds"] == 1
        assert row["rounds_s"]["routed"] == [row["routed_s"]]
        assert row["efficiency"] == pytest.approx(row["ideal_s"] / row["routed_s"])
        assert row["speedup"] == pytest.approx(row["dense_s"] / row["routed_s"])
        assert (row["overhead"] is None) == (row["skip"] != 0)
        assert row["efficiency_low"] is None  # one round has no interval
        assert row["keep"] == pytest.approx(row["flops"] / row["dense_flops"])
        if row["skip"] == 0:
            assert (row["keep"], row["kv_bytes"]) == (1, row["dense_kv_bytes"])
        elif image_tokens:
            assert 0.5 < row["keep"] < 1
            absent = row["batch"] * 2 * image_tokens * 2 * 2 * 32 * 4  # 2 layers; keys and values of 2 heads, float32
            assert row["dense_kv_bytes"] - row["kv_bytes"] == absent
        else:
            assert row["keep"] == 0.5
            assert row["kv_bytes"] * 2 == row["dense_kv_bytes"]
    json.dumps(rows)


@pytest.mark.parametrize(("backbone", "image_tokens"), [("llama", 0), ("llava", 9), ("qwen2_vl", 6), ("qwen2_5_vl", 6)])
def test_many_prompts_beside_their_paths_cut_out(backbone: str, image_tokens: int) -> None:
    subject = random_subject(backbone, SIZE, 9, 3, image_tokens, "all", "sdpa", torch.float32, CPU, seed=0)
    rows = bench(subject, [0.0, 0.5], [6], ["many"], new=2, budget=0, paths=3)
    assert [(r["phase"], r["path"], r["paths"], r["skip"]) for r in rows] == [
        ("prefill", "many", 1, 0.0),
        ("decode", "many", 1, 0.0),
        ("prefill", "many", 3, 0.5),
        ("decode", "many", 3, 0.5),
    ]
    past = torch.tensor([9, 10]) + image_tokens
    one = subject.routed.runtime.cost.chunk(torch.ones(2), past).sum((0, 1)).mean()
    for row in rows:
        assert row["rounds"] == 1
        assert row["efficiency"] == pytest.approx(row["ideal_s"] / row["routed_s"])
        assert row["keep"] == pytest.approx(1 - row["skip"])
        assert row["kv_bytes"] == row["dense_kv_bytes"] * (1 - row["skip"])
        if row["phase"] == "decode":
            assert row["dense_flops"] == pytest.approx(6 * float(one))
    json.dumps(rows)


def test_lossless_decoding_beside_the_dense_generate() -> None:
    """Both sides write the same tokens; drafts are work on top of the dense model's, and their acceptance is told.

    It fails where drafts are not among the FLOPs, or where a single row is measured on its uniform path instead.
    """
    rows = bench(small(), [0.0, 0.5], [1, 2], ["lossless"], new=12, budget=0)
    assert [(r["phase"], r["batch"], r["path"], r["skip"]) for r in rows] == [
        (phase, batch, "lossless", skip) for batch in (1, 2) for skip in (0.0, 0.5) for phase in ("prefill", "decode")
    ]
    for row in rows:
        assert row["rounds"] == 1
        assert row["kv_bytes"] == row["dense_kv_bytes"]
        if row["skip"] == 0 or row["phase"] == "prefill":
            assert row["keep"] == pytest.approx(1)
        if row["skip"] == 0:
            assert row["acceptance"] is None
    json.dumps(rows)
    subject = small()
    cell = lossless_cell(subject, 2, 0.5, 30)
    dense, routed = cell.sides["dense"], cell.sides["routed"]
    options = {"max_new_tokens": 30, "min_new_tokens": 30, "do_sample": False}
    assert torch.equal(dense.generate(**dense.inputs, **options), routed.generate(**routed.inputs, **options))
    executed, whole = cell.spent["decode"]
    past = 9 + torch.arange(30.0)
    assert whole == pytest.approx(2 / 30 * float(subject.routed.runtime.cost.chunk(torch.ones(30), past).sum()))
    assert executed >= whole
    assert 0 <= (cell.facts["acceptance"] or 0) <= 1  # None: seconds said that drafts do not pay


@pytest.mark.parametrize("phase", ["both", "decode"])
def test_lossless_decoding_of_a_runs_own_decisions(phase: str) -> None:
    """Without a share to leave out the policy decides; a plan is as good as routers, and drafts need no more than phase
    decode, whose paths the other kinds of path refuse."""
    subject = replace(small(), trained=True, routed=attach(twin(small().spec), SkipPlan.static([1], phase=phase)))
    rows = bench(subject, None, [1], ["lossless"], new=4, budget=0, phase="decode")
    assert [(row["path"], row["skip"], row["paths"]) for row in rows] == [("lossless", None, 1)]
    with pytest.raises(ConfigError, match="--path lossless: without vision no layer is left out of decoding"):
        bench(small("llava", 4), [0.5], [1], ["lossless"], new=2, budget=0)


@pytest.mark.parametrize("path", ["mixed", "many"])
def test_no_cache_but_its_own_counts_as_a_sides_memory(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[int] = []

    def seen(call, device):
        gc.collect()
        held.append(sum(isinstance(x, Cache) and x.get_seq_length() > 0 for x in gc.get_objects()))
        return call() and 1, "memory"

    monkeypatch.setattr("adaskip.bench.cell.peak_memory", seen)
    elsewhere = sum(isinstance(x, Cache) and x.get_seq_length() > 0 for x in gc.get_objects())
    bench(small(), [0.25, 0.5], [4], [path], new=2, budget=0)
    assert held == [elsewhere] * 4


@pytest.mark.parametrize(
    "router", [{"unit": "mlp"}, {"scope": "token"}, {"group": "vision", "kv": "kept"}, {"phase": "decode"}]
)
def test_routers_that_leave_no_layer_as_a_whole_have_no_ideal(router: dict[str, str]) -> None:
    subject = small("llava", 4) if "group" in router else small()
    routed = attach(twin(subject.spec), RouterConfig(**router))
    with pytest.raises(ConfigError, match="so there is no model to cut out for comparison"):
        bench(replace(subject, routed=routed), None, [1], ["uniform"], new=2, budget=0)


def test_a_prompt_longer_than_the_window_is_measured() -> None:
    size = Size(layers=2, hidden=64, vocabulary=128)
    subject = random_subject("gpt_oss", size, 140, 3, 0, "all", "eager", torch.float32, CPU, seed=0)
    assert [row["phase"] for row in bench(subject, [0.5], [1], ["uniform"], new=3, budget=0)] == ["prefill", "decode"]


def test_many_prompts_get_what_their_path_cut_out_says() -> None:
    """The sides whose seconds are compared write the same tokens, each group in one batch, and as many as asked."""
    subject = small()
    cell = many_cell(subject, 6, 3, 0.5, 4)
    many, cut = cell.sides["routed"], cell.sides["ideal"]
    answers = many.run(4).answers
    assert [count for _, count in many.run(4).groups] == [2, 2, 2]
    assert {len(answer.tokens) for answer in answers} == {4}
    for number, part in enumerate(cut.parts):
        assert len(part.model.get_decoder().layers) == 2
        tokens = part.model.generate(**part.inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)[:, 9:]
        assert torch.equal(tokens, torch.stack([answer.tokens for answer in answers[number::3]]))


def padded(subject: Subject, rows: int) -> dict[str, torch.Tensor]:
    """Its inputs with the first row two tokens longer than the others, whose padding is on the left."""
    inputs = subject.batch(rows)
    shape = inputs["input_ids"].shape
    for name, value in inputs.items():
        if value.shape == shape:
            inputs[name] = torch.nn.functional.pad(value, (2, 0))
            inputs[name][0] = torch.cat([value[0], value[0, -2:]])
    return inputs


@pytest.mark.parametrize(
    ("backbone", "image_tokens", "group"),
    [
        ("llama", 0, "all"),
        ("llava", 9, "all"),
        ("llava", 9, "vision"),
        ("qwen2_vl", 6, "all"),
        ("qwen2_vl", 6, "vision"),
    ],
)
def test_prompts_may_be_padded(backbone: str, image_tokens: int, group: str) -> None:
    subject = random_subject(backbone, SIZE, 9, 3, image_tokens, group, "sdpa", torch.float32, CPU, seed=0)
    kinds = ["uniform", "mixed", "many"] if group == "all" else ["mixed"]  # uniform: logits are compared
    rows = bench(replace(subject, batch=partial(padded, subject)), [0.5], [4], kinds, new=2, budget=0)
    assert [row["phase"] for row in rows] == ["prefill", "decode"] * len(kinds)


@torch.no_grad()
def test_a_token_after_a_padded_prompt_stands_behind_the_real_ones() -> None:
    subject = small()
    side = Side(subject.spec.model, padded(subject, 2), 2)
    side.settle()
    places = []
    side.model.register_forward_pre_hook(
        lambda model, args, given: places.append(given["position_ids"]), with_kwargs=True
    )
    side.decode()
    assert [place.tolist() for place in places] == [[[11], [9]], [[12], [10]]]


def test_vision_is_cut_out_of_the_layers_it_leaves() -> None:
    """Dense FLOPs of the two cut models together are the FLOPs that the routed model spends."""
    subject = small("llava", 9)
    inputs = subject.batch(2)
    keep = spread_out(4, 0.5, 2, "uniform")
    model = force(subject, keep)
    with torch.no_grad():
        model(**inputs)
    seen, text = ideal(subject, inputs, keep, 2).parts
    assert (len(text.inputs["input_ids"][0]), len(seen.inputs["input_ids"][0])) == (9, 18)
    assert not (text.inputs["input_ids"] == 5).any()
    cost = model.runtime.cost
    spent = sum(float(cost.chunk(torch.tensor([n]), torch.tensor([0]))[:, 0, 0].sum()) * 2 for n in (9, 18))
    assert float(model.routing.executed[0]) == pytest.approx(spent)


def test_the_embedded_model_decides_with_forced_routers() -> None:
    (row, _) = bench(stored_subject("digits-vlm", CPU, 0), [0.5], [2], ["uniform"], new=2, budget=0)
    assert row["backbone"] == "digits-vlm"
    assert row["keep"] == pytest.approx(0.5)


def test_rounds_go_forth_and_back_until_it_is_enough() -> None:
    order: list[str] = []

    def call(name: str, seconds: float):
        def one() -> float:
            order.append(name)
            return seconds + 0.1 * len(order)  # a drift that falls on both alike

        return one

    heard: list[int] = []
    found = interleave({"a": call("a", 2), "b": call("b", 2)}, lambda s: True, 60, lambda s: heard.append(len(s["a"])))
    assert order == ["a", "b", "b", "a"] * LEAST
    assert heard == list(range(1, LEAST + 1))
    assert found["a"] == pytest.approx(found["b"])
    assert len(interleave({"a": call("a", 1)}, lambda s: False, 0)["a"]) == 1


def test_a_ratio_is_paired() -> None:
    drift = [1.0, 2.0, 4.0, 8.0, 3.0]
    found = ratio([1.1 * x for x in drift], drift)
    assert (found.estimate, found.low, found.high) == pytest.approx((1.1, 1.1, 1.1))
    wide = ratio([1.0, 1.2, 0.9, 1.1, 1.0], [1.0] * 5)
    assert wide.low < wide.estimate < wide.high
    assert spread([4.0, 1.0, 2.0, 3.0]) == [1.75, 3.25]
    assert spread([1.0]) == [1.0, 1.0]


def test_peak_memory_sees_what_a_call_held() -> None:
    peak, what = peak_memory(lambda: torch.ones(2**26).sum(), CPU)
    if peak is None:
        pytest.skip("this system does not tell the peak of the resident set")
    least, _ = peak_memory(lambda: None, CPU)
    assert least is not None
    assert what == "resident set of the process"
    assert peak - least > 2**27


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "expected a run folder, digits-vlm, or --backbone TYPE for a random model, one of them"),
        (
            ["digits-vlm", "--prompt", "3"],
            "a stored model has its own sizes, prompts and dtype, got --prompt for it as well",
        ),
        (
            ["digits-vlm", "--dtype", "bfloat16"],
            "a stored model has its own sizes, prompts and dtype, got --dtype for it as well",
        ),
        (["--backbone", "llama", "--device", "meta"], "--device: expected cpu or cuda, got 'meta'"),
        (
            ["--backbone", "llava", "--image-tokens", "-5"],
            "--image-tokens: expected greater than or equal to 0, got '-5'",
        ),
        (["--backbone", "openai-gpt", *TINY, "--attention", "eager"], "--backbone openai-gpt: it keeps no KV cache"),
        (["--backbone", "gpt_neo", *TINY], "--backbone gpt_neo: "),
        (["--backbone", "gemma3", *TINY], "expected a model of 2 layers and width 64, but its configuration made one"),
        (
            ["nowhere"],
            "nowhere: expected digits-vlm or the folder of a run; for a random model type --backbone nowhere",
        ),
        (["--backbone", "lama"], "--backbone lama: transformers has no such model type"),
        (["--backbone", "llama", "--hidden", "96", "--heads", "5"], "--hidden 96: expected a multiple of twice the 5"),
        (
            ["--backbone", "llama", "--skip", "a"],
            "--skip: expected between commas a valid number, got 'a'",
        ),
        (["--backbone", "llama", "--dtype", "floot32"], "got 'floot32'; did you mean 'float32'?"),
        (["--backbone", "llava", "--layers", "2"], "say how long its picture is: --image-tokens 576"),
        (["--backbone", "llava", "--image-tokens", "7"], "--image-tokens 7: expected a square for llava, such as 9"),
        (["--backbone", "mamba", *TINY], "--backbone mamba: MambaForCausalLM does not support"),
        (["--backbone", "t5", *TINY], "--backbone t5: "),
        (["--backbone", "llama", *TINY, "--skip", "0.9,1"], "--skip: expected between commas less than 1, got '0.9,1'"),
        (["--backbone", "llama", *TINY, "--skip", "0.9"], "--skip 0.9: leaves no layer of 2"),
        (
            ["--backbone", "llama", *TINY, "--path", "main"],
            "--path: expected between commas uniform | mixed | many | lossless, got 'main'",
        ),
        (
            ["--backbone", "llama", *TINY, "--path", "many", "--skip", "0.5", "--batch", "3"],
            "--paths 4: expected at least so many prompts, got --batch 3; "
            "--paths 4: 1 of 2 layers can be left out in 2 ways only",
        ),
        (
            ["--backbone", "llama", *TINY, "--path", "many", "--paths", "0"],
            "--paths: expected greater than or equal to 1, got '0'",
        ),
        (
            ["--backbone", "llava", *TINY, "--image-tokens", "4", "--group", "vision", "--path", "many"],
            "--path many: without vision no layer is left out of decoding; expected --group all",
        ),
        (
            ["--backbone", "llama", *TINY, "--phase", "decode,prefil"],
            "--phase: expected between commas prefill | decode, got 'decode,prefil'; did you mean 'decode'?",
        ),
        (
            ["--backbone", "llama", *TINY, "--phase", "decode,decode"],
            "--phase: expected between commas prefill, decode or both, got 'decode,decode'",
        ),
    ],
)
def test_bad_input_is_a_plain_error(words: list[str], told: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", *words, *(["--vocabulary", "64"] if "--backbone" in words else [])])
    out, err = capfd.readouterr()
    assert (stop.value.code, out) == (2, "")
    assert told in err.replace("\n", " ")
    assert "Traceback" not in err


def test_all_faults_are_told_at_once() -> None:
    """A bench takes hours to prepare and a minute to type: the second fault must not show after the first is mended."""
    with pytest.raises(ConfigError) as error:
        read({"layers": "x", "batch": "1,0", "dtype": "float16", "device": "tpu", "laiers": 3})
    head, *told = str(error.value).splitlines()
    assert head == "bench:"
    assert sorted(told) == [
        "  --batch: expected between commas greater than or equal to 1, got '1,0'",
        "  --device: expected cpu or cuda, got 'tpu'",
        "  --laiers: no such key, got 3; did you mean 'layers'?",
        "  --layers: expected a valid integer, got 'x'",
        "  expected a run folder, digits-vlm, or --backbone TYPE for a random model, one of them",
    ]


def test_settings_are_the_same_typed_and_as_values() -> None:
    """Figures name the settings that made them, and these words must give the same settings again."""
    typed = read({"backbone": "llama", "skip": "0,0.5", "batch": "8", "path": "uniform,mixed", "phase": "decode"})
    values = BenchSettings(backbone="llama", skip=(0, 0.5), batch=(8,), path=("uniform", "mixed"), phase=("decode",))
    assert typed == values
    told = typed.to_dict()
    assert (told["skip"], told["batch"], told["path"], told["phase"]) == ("0,0.5", "8", "uniform,mixed", "decode")
    assert read({name: value for name, value in told.items() if value is not None}) == typed
    assert list(told)[:3] == ["target", "backbone", "layers"]
    stored = BenchSettings(target="digits-vlm").to_dict()
    assert list(stored) == [
        "target",
        "skip",
        "batch",
        "path",
        "paths",
        "phase",
        "new",
        "budget",
        "width",
        "device",
        "seed",
    ]


def test_help_names_every_setting(capfd: pytest.CaptureFixture[str]) -> None:
    """The options are derived from the section, when they are needed."""
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", "--help"])
    out, _ = capfd.readouterr()
    assert not stop.value.code
    for name, info in BenchSettings.model_fields.items():
        assert name == "target" or f"--{name.replace('_', '-')} " in out
        assert info.description
    assert "Its layers (24)." in out


def test_the_verb(capfd: pytest.CaptureFixture[str]) -> None:
    words = "bench --backbone llama --layers 2 --hidden 64 --vocabulary 96 --prompt 8 --new 2 --batch 1 --skip 0,0.5"
    with pytest.raises(SystemExit) as stop:
        cli.main([*words.split(), "--budget", "0.1", "--json"])
    out, _ = capfd.readouterr()
    found = json.loads(out)
    assert not stop.value.code
    assert [row["phase"] for row in found["results"]] == ["prefill", "decode"] * 2
    assert found["settings"]["backbone"] == "llama"
    assert found["environment"]["threads"] == torch.get_num_threads()
    with pytest.raises(SystemExit):
        cli.main([*words.split(), "--budget", "0.1", "--json", "--phase", "decode"])
    out, _ = capfd.readouterr()
    assert [row["phase"] for row in json.loads(out)["results"]] == ["decode"] * 2
    with pytest.raises(SystemExit):
        cli.main([*words.split(), "--budget", "0.1"])
    out, _ = capfd.readouterr()
    assert "effic" in out
    assert "decode" in out


def test_a_graph_decodes_what_a_side_does() -> None:
    """Over a static cache, and again after the first turn; on a CPU without the capture."""
    subject = small()
    inputs, keep = subject.batch(2), spread_out(4, 0.5, 2, "uniform")
    side = ideal(subject, inputs, keep, 3).parts[0]
    with torch.no_grad():
        side.settle()
        wanted = side.decode()
    assert wanted is not None
    graph = Graph(side.model, inputs, 3)
    graph.settle()
    for _ in range(2):
        assert graph.decode_seconds() > 0
        assert graph.logits is not None
        assert torch.allclose(graph.logits, wanted, atol=1e-5)
