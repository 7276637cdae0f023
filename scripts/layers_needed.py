"""How few layers each kind of question needs: greedy removal on validation scans of the demo model.

    python scripts/layers_needed.py --out benchmarks/layers-needed.json

For each kind of question layers leave one at a time, always the one whose loss hurts least, until one is left. Counted
is the fewest with which still 95 % as many questions are answered as by all layers. This is what no router can beat by
much, and what it can find at best.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from adaskip.demo.backbone import EMBEDDED, load
from adaskip.demo.digits import KINDS
from adaskip.policies.learned.config import RouterConfig
from adaskip.runtime.attach import attach
from adaskip.survey.search import Search
from adaskip.training.data import Collator, load_records
from adaskip.training.tracking import environment

ENOUGH = 0.95


def main() -> None:
    """Search, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=150, help="of each kind")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    backbone, processor = load()
    model, collate = attach(backbone, RouterConfig()), Collator(processor)
    layers = len(model.spec.layers)
    records = load_records(EMBEDDED, "validation", options.questions * len(KINDS), 0)
    kinds: dict[str, Any] = {}
    for kind in KINDS:
        path = Search(model, [collate([r for r in records if r.get("kind") == kind])]).greedy(layers - 1)
        enough = [step for step in path if step.accuracy >= ENOUGH * path[0].accuracy][-1]
        kinds[kind] = {
            "needs": layers - len(enough.plan.skip),
            "skip": list(enough.plan.skip),
            "accuracy": [step.accuracy for step in path],
        }
        print(f"{kind:12} {kinds[kind]['needs']} of {layers}", flush=True)
    found = {
        "command": shlex.join(["python", "scripts/layers_needed.py", *sys.argv[1:]]),
        "environment": environment(0, "cpu"),
        "questions": options.questions,
        "kinds": kinds,
    }
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
