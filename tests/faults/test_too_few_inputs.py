"""Too few inputs for what follows: said before any model is loaded, with the number that is needed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import adaskip
from adaskip.demo.backbone import load as load_demo
from adaskip.errors import DataError
from adaskip.recipe import load
from adaskip.stages import LineStages
from adaskip.survey.profile import smallest_profile
from adaskip.theory.conformal import conformal_rank, smallest_sample
from adaskip.training.data import Collator, loader
from adaskip.verbs.amounts import enough_to_train
from adaskip.verbs.calibrate import calibrate
from adaskip.verbs.check import check
from adaskip.verbs.evaluate import evaluate
from adaskip.verbs.profile import profile_model
from adaskip.verbs.train import train
from tests.faults.finished import SHORT, copy_of


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading a model fails the test: the fault must be found before."""
    monkeypatch.setattr("adaskip.backbone.load.load_backbone", lambda *_, **__: pytest.fail("a model was loaded"))


def rows(count: int) -> str:
    return "".join(json.dumps({"prompt": f"{i} plus 2 ?", "answer": str(i + 2)}) + "\n" for i in range(count))


@pytest.mark.parametrize("alpha", [0.5, 0.3, 0.1, 0.05, 0.01])
def test_the_smallest_sample_is_the_smallest(alpha: float) -> None:
    """One input fewer and the quantile would be infinite."""
    least = smallest_sample(alpha)
    assert conformal_rank(least, alpha) <= least
    assert least == 0 or conformal_rank(least - 1, alpha) > least - 1


def test_profile_says_how_many_it_needs(no_model: None, tmp_path: Path) -> None:
    """--examples 32 surveyed for twenty minutes and then wanted one more."""
    with pytest.raises(DataError, match=r"expected --examples of at least 33, got 32"):
        profile_model("digits-vlm", examples=32)
    (tmp_path / "validation.jsonl").write_text(rows(40))
    message = r"expected at least 33 inputs, got 20, which is all that split validation of .* holds"
    with pytest.raises(DataError, match=message):
        profile_model("digits-vlm", str(tmp_path), output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_split_that_is_half_a_file_says_so(
    no_model: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Would catch: 20 inputs, or too few of them, found in a file of 40 rows, and no word of the other half."""
    source, half = str(tmp_path), f"{tmp_path}/validation.jsonl, which serves validation and calibration, for want of"
    (tmp_path / "validation.jsonl").write_text(rows(40))
    for split, which in (("validation", "first"), ("calibration", "second")):
        with pytest.raises(DataError, match=rf"split {split} of .* \({split} is the {which} half of {half} cal"):
            profile_model("digits-vlm", source, split=split, output=tmp_path / "out")
    (tmp_path / "validation.jsonl").write_text(rows(80))
    with pytest.raises(pytest.fail.Exception, match="a model was loaded"):
        profile_model("digits-vlm", source, output=tmp_path / "out", stages=LineStages())
    told = f"adaskip: profiling 40 inputs: validation is the first half of {half} calibration.jsonl\n"
    assert told in capsys.readouterr().err
    (tmp_path / "calibration.jsonl").write_text(rows(9))
    with pytest.raises(pytest.fail.Exception, match="a model was loaded"):
        profile_model("digits-vlm", source, output=tmp_path / "out", stages=LineStages())
    assert "half" not in capsys.readouterr().err


def test_train_tells_of_the_half_as_well(tmp_path: Path) -> None:
    """Would catch: advice to lengthen a calibration.jsonl that is not there."""
    (tmp_path / "validation.jsonl").write_text(rows(10))
    with pytest.raises(DataError, match="calibration is the second half of"):
        enough_to_train(load("causal-lm", [f"data.source={tmp_path}"]), validation=5, calibration=5)


def test_the_python_profile_says_so_as_well() -> None:
    """`adaskip.profile` on a list of batches counts them first."""
    base, processor = load_demo()
    records = [{"prompt": f"{i} plus 2 ?", "answer": str(i + 2)} for i in range(8)]
    batches = list(loader(records, Collator(processor), 4))
    with pytest.raises(DataError, match=r"expected at least 33 inputs, of which a quarter calibrates .* got 8"):
        adaskip.profile(base, batches)


def test_the_least_profile_is_enough(tmp_path: Path) -> None:
    """What the message asks for must do: 33 inputs run through to the picture."""
    found = profile_model("digits-vlm", group="all", examples=smallest_profile(), output=tmp_path).to_dict()
    assert found["n"] == 33
    assert Path(found["picture"]).is_file()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["conditions.examples=4", "objective.price=calibrated"],
            "conditions.examples: expected at least 5, got 4: twice as many calibration",
        ),
        (["conditions.examples=6"], "at least 7, got 6: .* at objective.alpha=0.1 and objective.price=functional"),
        (["objective.alpha=0.01"], "conditions.examples: expected at least 52, got 18"),
        (
            ["conditions.examples=3", "objective.alpha=0.3", "objective.price=gates"],
            "at least 4 inputs to judge the routers' skips on, got 3",
        ),
        (
            ["data.examples.calibration=13"],
            "calibration: expected at least 14 inputs at objective.alpha=0.1 and .* got 13",
        ),
        (["data.examples.validation=3"], "validation: expected at least 4 inputs .* got 3; give validation.jsonl more"),
    ],
)
def test_train_says_it_before_pricing(no_model: None, tmp_path: Path, settings: list[str], message: str) -> None:
    """A calibration split too small for alpha was found out after the model was loaded and measured."""
    with pytest.raises(DataError, match=message):
        train(load("digits-vlm", [*SHORT, *settings, f"output={tmp_path / 'run'}"]))


def test_all_faults_at_once() -> None:
    """Two splits too small are two lines, not two attempts."""
    with pytest.raises(DataError) as caught:
        enough_to_train(load("digits-vlm"), validation=2, calibration=3)
    assert len(str(caught.value).splitlines()) == 3


def moved(run: Path, folder: Path, **splits: int) -> Path:
    """A copy of a run whose data are JSON lines of so many rows."""
    data = folder / "data"
    data.mkdir(parents=True)
    for split, count in splits.items():
        (data / f"{split}.jsonl").write_text(rows(count))
    copied = copy_of(run, folder / "run")
    recipe = copied / "recipe.resolved.yaml"
    recipe.write_text(recipe.read_text().replace("source: digits-vlm", f"source: {data}"))
    return copied


def test_check_says_which_split_is_too_small(no_model: None, run: Path, tmp_path: Path) -> None:
    """Three test inputs: the advice was to raise conditions.examples, which changes nothing here."""
    copied = moved(run, tmp_path, train=9, validation=9, calibration=40, test=3)
    with pytest.raises(DataError, match=r"that nothing was fitted on, got 3 of split test; give test.jsonl more lines"):
        check(copied)


def test_check_of_bands_needs_calibration_inputs(no_model: None, run: Path, tmp_path: Path) -> None:
    """Bands calibrate constants of their own; that was found out after every layer had been measured."""
    copied = moved(run, tmp_path, train=9, validation=9, calibration=5, test=30)
    with pytest.raises(DataError, match=r"check --bands: expected at least 9 calibration inputs .* got 5"):
        check(copied, bands=True)


def test_calibrate_says_it_before_loading(no_model: None, run: Path) -> None:
    """Thirty inputs are left, and a risk of 2 % needs 114."""
    with pytest.raises(DataError, match=r"needs at least 114 inputs.* left 30"):
        calibrate(run)


def test_eval_without_a_test_split_says_what_to_do(no_model: None, run: Path, tmp_path: Path) -> None:
    """Only train and validation exist: the text names the file to add and the split to ask for."""
    copied = moved(run, tmp_path, train=9, validation=9)
    with pytest.raises(DataError, match=r"holds no test split; add a test.jsonl .* --split validation"):
        evaluate(copied)
