"""Which answers of several words the demo model can write: greedy, over test scans, exact match and edit distance.

    python scripts/long_answers.py --out benchmarks/long-answers.json

Asks for the four digits of a picture in order, in wordings that the model's vocabulary has words for, and for lists of
one to six numbers to be repeated. Taught were only the kinds of `adaskip.demo.digits`; of these, `repeat` alone has
answers of several words, three numbers each.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from adaskip.demo import digits
from adaskip.demo.backbone import load
from adaskip.plan import SkipPlan
from adaskip.runtime.attach import attach
from adaskip.training.tracking import environment
from adaskip.verbs.sample import Sample

IN_ORDER = (
    "digit top left top right bottom left bottom right ?",
    "repeat top left top right bottom left bottom right ?",
    "repeat top row bottom row ?",
    "digit ?",
)


def main() -> None:
    """Ask, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=300, help="of each sort")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    backbone, processor = load()
    model = attach(backbone, SkipPlan())
    rng = np.random.default_rng(0)
    places, labels = digits.draw("test", options.questions, rng)
    pictures = [Image.fromarray(picture).convert("RGB") for picture in digits.compose(places)]
    four = [" ".join(map(str, row)) for row in labels]
    asked = {question: ([question] * len(four), four) for question in IN_ORDER}
    for count in range(1, 7):
        lists = [" ".join(map(str, rng.integers(10, size=count))) for _ in pictures]
        asked[f"repeat, {count} numbers"] = ([f"repeat {numbers} ?" for numbers in lists], lists)
    found: dict[str, Any] = {}
    for name, (questions, answers) in asked.items():
        records = [
            {"image": picture, "prompt": f"<image> {question}", "answer": answer, "present": answer.split()}
            for picture, question, answer in zip(pictures, questions, answers, strict=True)
        ]
        figures = Sample(records, processor, 100, model.spec.device)(model)
        names = ("exact", "edit_distance", "hallucinated")
        found[name] = {each: statistics.fmean(value or 0.0 for value in figures[each]) for each in names}
        print(f"{name:52}", *(f"{each} {value:.3f}" for each, value in found[name].items()), flush=True)
    if options.out:
        command = shlex.join(["python", "scripts/long_answers.py", *sys.argv[1:]])
        values = {"command": command, "environment": environment(0, "cpu"), "questions": options.questions}
        options.out.write_text(json.dumps(values | {"sorts": found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
