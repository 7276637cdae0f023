"""Test and time adaskip on one GPU, within a few minutes.

    python scripts/gpu_check.py            # an H100 or H200, at most eight minutes: benchmarks/gpu/*.json
    python scripts/gpu_check.py --dry-run  # tiny models on the CPU, to see that every part works: runs/gpu-dry-run

The parts, in this order: the tests marked ``gpu``; how often the host waits for the GPU; prefill, decoding and decoding
as a CUDA graph of a random Llama of 7 B parameters, dense, routed and physically cut in turn; the same of a random
Qwen2.5-VL with a picture of 1,200 tokens; what training routers takes. A part is a file, written anew after every step.
What it holds is not measured again, unless ``--again`` says so; what failed, or was not begun within ``--minutes``, is
tried by the next call.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import lightning
import torch
from torch.utils.data import DataLoader

import adaskip
from adaskip.backbone.inspect import twin
from adaskip.bench.forced import force, spread_out
from adaskip.bench.graph import graph_row
from adaskip.bench.random_model import Size, random_subject
from adaskip.bench.rounds import bounded_ratio
from adaskip.bench.settings import BenchSettings
from adaskip.bench.sides import Side
from adaskip.bench.subject import Subject
from adaskip.bench.table import bench, columns
from adaskip.bench.waits import count_waits
from adaskip.errors import AdaSkipError
from adaskip.runfiles import write_json
from adaskip.runtime.timing import clock, peak_memory, timed
from adaskip.training.fit import fit_from_bounds
from adaskip.training.objective import Fit
from adaskip.training.tracking import environment

ROOT = Path(__file__).parents[1]
OUT, DRY_OUT = ROOT / "benchmarks" / "gpu", ROOT / "runs" / "gpu-dry-run"
MINUTES = 8.0
SKIPS = (0.0, 0.25, 0.5)

Rows = list[dict[str, Any]]
Step = tuple[float, Callable[[float], Rows]]  # seconds it asks for, and the work, which is told how many it gets


@dataclass(frozen=True)
class Scale:
    """How large everything is."""

    llama: Size
    qwen: Size
    short: int  # text tokens
    long: int
    image: int  # tokens of a picture
    after: int  # text tokens after it
    rows: int
    new: int  # tokens of a decoding turn
    trained: tuple[int, int]  # rows and tokens of a training step
    steps: int  # of training, the first two of which warm up
    priced: int  # inputs
    tests: tuple[str, ...]  # where those marked gpu are, or which of them


FULL = Scale(
    llama=Size(32, 4096, 32, 8, 14_336, 32_000),
    qwen=Size(28, 3584, 28, 4, 18_944, 152_064),
    **{"short": 512, "long": 4096, "image": 1200, "after": 64, "rows": 8, "new": 8},
    **{"trained": (2, 1024), "steps": 10, "priced": 16, "tests": ("tests/contracts",)},
)
TINY = Scale(
    llama=Size(4, 64, 2, 1, 96, 96),
    qwen=Size(4, 64, 2, 1, 96, 96),
    **{"short": 6, "long": 12, "image": 6, "after": 5, "rows": 2, "new": 2},
    **{"trained": (2, 8), "steps": 4, "priced": 16, "tests": ("tests/contracts/test_gpu.py", "-k", "two_threads")},
)


@dataclass(frozen=True)
class Lab:
    """Where and on what everything is measured; a model is made when it is first asked for, and kept."""

    scale: Scale
    device: torch.device

    @cache  # noqa: B019 - one laboratory a process
    def model(self, kind: str) -> Subject:
        """Return a random model with prompts: ``llama`` (the long ones) or ``qwen`` (a picture and some text)."""
        size, dtype = self.scale, torch.float32 if self.device.type == "cpu" else torch.bfloat16
        made = partial(random_subject, new=size.new, attention="sdpa", dtype=dtype, device=self.device, seed=0)
        if kind == "llama":
            return made(kind, size.llama, size.long, image_tokens=0, group="all")
        return made("qwen2_5_vl", size.qwen, size.after, image_tokens=size.image, group="vision")

    def subject(self, kind: str) -> Subject:
        """Return one of `model`, or ``short``: the Llama on short prompts, or ``whole``: the Qwen under group all."""
        if kind == "short":
            long, most = self.model("llama"), self.scale.short
            return replace(long, batch=lambda rows: {k: v[:, :most] for k, v in long.batch(rows).items()})
        if kind == "whole":
            vision = self.model("qwen")
            return replace(vision, routed=adaskip.attach(twin(vision.spec), adaskip.RouterConfig()))
        return self.model(kind)

    def parts(self) -> dict[str, dict[str, Step]]:
        """Return the steps of every part by name, in their order."""
        size, (one, many), half = self.scale, (1, self.scale.rows), (0.5,)
        short, long, image = f"{size.short} tokens", f"{size.long} tokens", f"{size.image} image tokens"
        return {
            "tests": {"marked gpu": (60, self.tests)},
            "syncs": {f"batch {rows}": (10, partial(self.syncs, rows)) for rows in (one, many)},
            "prefill": {
                f"{short}, batch {one}": (9, self.bench("short", "prefill", one)),
                f"{short}, batch {many}": (25, self.bench("short", "prefill", many, "uniform mixed")),
                f"{long}, batch {one}": (12, self.bench("llama", "prefill", one)),
                f"{long}, batch {many}": (25, self.bench("llama", "prefill", many)),
            },
            "decode": {
                f"{short}, batch {one}": (18, self.bench("short", "decode", one)),
                f"{short}, batch {many}": (30, self.bench("short", "decode", many, "uniform mixed")),
                f"{short}, batch {many}, by path": (15, self.bench("short", "decode", many, "many", half)),
            },
            "graph": {
                f"{short}, batch {rows}, skip {rate:g}": (6, partial(self.graph, rows, rate))
                for rows in (one, many)
                for rate in SKIPS
            },
            "qwen": {
                f"{image}, group vision, batch {one}": (9, self.bench("qwen", "prefill", one)),
                f"{image}, group all, batch {one}": (9, self.bench("whole", "prefill", one)),
                f"{image}, group vision, batch {many}": (20, self.bench("qwen", "prefill", many)),
                f"{image}, group all, batch {many}": (8, self.bench("whole", "prefill", many, skips=half)),
                f"decode, group all, batch {one}": (6, self.bench("whole", "decode", one, skips=half)),
                f"decode, group all, batch {many}": (6, self.bench("whole", "decode", many, skips=half)),
            },
            "training": {
                "step": (12, partial(self.training, False)),
                "step, gradient checkpointing": (12, partial(self.training, True)),
                "prices": (10, self.prices),
                "from bounds": (10, self.from_bounds),
            },
        }

    # -- steps -------------------------------------------------------------------------------------------------------

    def tests(self, seconds: float) -> Rows:
        """Run the tests marked ``gpu`` in a process of their own, and count what came of them."""
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.xml"
            command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", *self.scale.tests]
            command += [f"--junitxml={report}"]
            if self.device.type == "cuda" and find_spec("xdist"):
                command += ["-n", "4"]
            around = os.environ | {"ADASKIP_TEST_DEVICE": self.device.type}
            done = subprocess.run(command, cwd=ROOT, env=around, capture_output=True, text=True, timeout=3 * 60)
            if not report.is_file():
                raise AdaSkipError(f"pytest ended with {done.returncode}: {done.stdout}{done.stderr}"[-1500:])
            cases = [*ElementTree.parse(report).iter("testcase")]
        wrong = {
            f"{case.get('classname')}::{case.get('name')}": (found.text or found.get("message") or "")[-1500:]
            for case in cases
            for found in case
            if found.tag in ("failure", "error")
        }
        return [{"tests": len(cases), "failed": len(wrong), "pytest": done.returncode, "failures": wrong}]

    @torch.no_grad()
    def syncs(self, rows: int, seconds: float) -> Rows:
        """Count how often the host waits for the GPU in a prefill and in a decoding step."""
        subject = self.subject("short")
        layers, inputs = len(subject.spec.layers), subject.batch(rows)
        plan = adaskip.SkipPlan.static((~spread_out(layers, 0.5, 1, "uniform")[:, 0]).nonzero().flatten().tolist())
        sides = [("dense", subject.spec.model), ("plan", adaskip.attach(twin(subject.spec), plan))]
        for path in ("uniform", "mixed")[:rows]:
            sides.append((f"routers, {path}", force(subject, spread_out(layers, 0.5, rows, path))))
        found: Rows = []
        for name, model in sides:
            side = Side(model, inputs, 1)
            side.settle()
            for phase, call in (("prefill", side.prefill), ("decode", side.decode_seconds)):
                found.append({"model": name, "in": phase, "batch": rows, **count_waits(call, self.device)})
        return found

    def bench(
        self, kind: str, phase: Any, rows: int, paths: Any = "uniform", skips: tuple[float, ...] = SKIPS
    ) -> Callable[[float], Rows]:
        """Return the work of timing one phase, as `adaskip bench` does."""
        new, different = self.scale.new, min(4, rows)
        size = {"batch": (rows,), "path": paths.split(), "paths": different, "phase": (phase,), "new": new}
        return lambda seconds: bench(self.subject(kind), BenchSettings(target=kind, skip=skips, budget=seconds, **size))

    def graph(self, rows: int, rate: float, seconds: float) -> Rows:
        """Time decoding a token, eagerly and by replaying a graph."""
        return [graph_row(self.subject("short"), rows, rate, self.scale.new, seconds)]

    def training(self, checkpointing: bool, seconds: float) -> Rows:
        """Time steps of `RouterTuner`, each beside a dense pass over the same batch; and the most memory held."""
        size, model = self.scale, self.fresh()
        tuner = Staying(model, adaskip.Objective(keep=0.5, bound_weight=0.0, warmup=0.0))
        watch, gpu = Watch(checkpointing), self.device.type == "cuda"
        held = torch.cuda.memory_allocated(self.device) if gpu else None
        silent = dict.fromkeys(["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False)
        trainer = lightning.Trainer(
            max_steps=size.steps, accelerator="gpu" if gpu else "cpu", devices=1, callbacks=[watch], **silent
        )
        data: DataLoader[Any] = DataLoader([self.answered(*size.trained)] * size.steps, batch_size=None)  # type: ignore[arg-type]
        peak, what = peak_memory(lambda: trainer.fit(tuner, data), self.device)
        steps, dense = watch.steps[2:], watch.dense[2:]
        row: dict[str, Any] = {"rows": size.trained[0], "tokens": size.trained[1], "checkpointing": checkpointing}
        row |= {"step_s": statistics.median(steps), "dense_s": statistics.median(dense)}
        row |= {"step / dense": bounded_ratio(steps, dense), "peak_bytes": peak, "peak_is": what, "held_before": held}
        return [row | {"rounds_s": {"step": steps, "dense": dense}}]

    def prices(self, seconds: float) -> Rows:
        """Time one calibration of the bound's prices, beside dense passes over the same inputs."""
        model, inputs = self.fresh(), self.inputs()
        tuner = adaskip.RouterTuner(model, adaskip.Objective(keep=0.5))
        with torch.no_grad(), model.dense():
            dense = min(timed(lambda: [model(**batch.inputs, use_cache=False) for batch in inputs])[1] for _ in "ab")
        took = timed(lambda: tuner.calibrate(inputs))[1]
        return [{"inputs": self.scale.priced, "prices_s": took, "dense_s": dense, "dense_passes": took / dense}]

    def from_bounds(self, seconds: float) -> Rows:
        """Time one round of fitting routers to what flipped decisions cost."""
        found: Rows = []
        fit, goal = Fit(rounds=1, examples=self.scale.priced, steps=20, batch_size=8), adaskip.Objective(keep=0.5)
        fit_from_bounds(self.fresh(), lambda _: self.inputs(), goal, fit, after=lambda _, told: found.append(told))
        return found

    # -- what they share ---------------------------------------------------------------------------------------------

    def fresh(self) -> adaskip.RoutedModel:
        """Return the Llama under untrained routers, which keep everything."""
        return adaskip.attach(twin(self.model("llama").spec), adaskip.RouterConfig())

    def inputs(self) -> list[adaskip.Batch]:
        """Return batches of four, of a quarter of a training row's length."""
        count = self.scale.priced // 4
        return [self.answered(4, self.scale.trained[1] // 4, seed).to(self.device) for seed in range(count)]

    def answered(self, rows: int, tokens: int, seed: int = 0) -> adaskip.Batch:
        """Return random prompts whose last quarter is the answer."""
        draw = torch.Generator().manual_seed(seed)
        ids = torch.randint(16, self.scale.llama.vocabulary, (rows, tokens), generator=draw)
        prompt = (torch.arange(tokens) < tokens - max(1, tokens // 4)).expand(rows, -1)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return adaskip.Batch(inputs, ids.masked_fill(prompt, -100), prompt, kind=[""] * rows)


class Staying(adaskip.RouterTuner):
    """Stays on the GPU: after a fit Lightning would move it, and all that share its weights, to the CPU."""

    def cpu(self) -> Staying:
        """Return it as it is."""
        return self


class Watch(lightning.Callback):
    """Seconds of every training step and of a dense pass after it; with gradient checkpointing, if asked for."""

    def __init__(self, checkpointing: bool) -> None:
        self.checkpointing, self.begun = checkpointing, 0.0
        self.steps, self.dense = list[float](), list[float]()

    def on_train_start(self, trainer: Any, tuner: Any) -> None:
        """Turn checkpointing on; transformers heeds it in training mode only, which a frozen backbone is not in."""
        if self.checkpointing:
            tuner.model.backbone.gradient_checkpointing_enable({"use_reentrant": False})
            tuner.model.backbone.train()

    def on_train_batch_start(self, *_: Any) -> None:
        """Look at the clock."""
        self.begun = clock()

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Any, tuner: Any, outputs: Any, batch: Any, index: int) -> None:
        """Look again."""
        self.steps.append(clock() - self.begun)
        with tuner.model.dense():
            self.dense.append(timed(lambda: tuner.model(**batch.inputs, use_cache=False))[1])


def describe(device: torch.device, scale: Scale) -> dict[str, Any]:
    """Return what figures depend on; those of another such description are not gone on with."""
    cpu = device.type == "cpu"
    found = environment(0, "cpu" if cpu else torch.cuda.get_device_name(device)) | {"dry_run": cpu}
    if not cpu:
        query = "nvidia-smi --query-gpu=driver_version,memory.total --format=csv,noheader || true"
        told = subprocess.run(query, shell=True, capture_output=True, text=True, timeout=60)
        found |= {"cuda": torch.version.cuda, "threads": torch.get_num_threads(), "driver": told.stdout.strip()}
    return found | {"scale": json.loads(json.dumps(asdict(scale)))}


def read(path: Path, around: dict[str, Any]) -> dict[str, Any]:
    """Return what a part's file holds; nothing if it is of another machine or damaged."""
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return record if record["environment"] == around else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def run_part(path: Path, steps: Mapping[str, Step], record: dict[str, Any], share: float, end: float) -> None:
    """Do the steps that the record lacks, for as long as there is time, and write the file after each."""
    for number, (name, (asked, work)) in enumerate(steps.items()):
        if name not in record["found"] and time.monotonic() + asked * share <= end:
            print(f"{path.stem}: {name} ({end - time.monotonic():.0f} s left)", file=sys.stderr, flush=True)
            record["failed"].pop(name, None)
            begun = time.monotonic()
            try:
                record["found"][name] = work(asked * share)
            except Exception as error:  # noqa: BLE001 - one that fails must not take the others along
                record["failed"][name] = traceback.format_exc()[-3000:]
                print(f"{path.stem}: {name} failed: {type(error).__name__}: {error}"[:600], file=sys.stderr, flush=True)
            record["seconds"][name] = round(time.monotonic() - begun, 2)
            gc.collect()
            torch.cuda.empty_cache()
        done = record["found"].keys() | record["failed"].keys()
        record["not_run"] = [other for other in steps if other not in done]
        if number == len(steps) - 1 or name in done:
            write_json(path, record, indent=1)


def show(name: str, record: dict[str, Any]) -> None:
    """Print a part's figures a line each, and what is missing."""
    print(f"\n{name}: {len(record['found'])} of {len(record['steps'])} steps, {sum(record['seconds'].values()):.0f} s")
    for step, rows in record["found"].items():
        for row in rows:
            cells = columns(row) if "efficiency" in row else row
            told = {
                k: f"{v:.3g}" if isinstance(v, float) else v
                for k, v in cells.items()
                if isinstance(v, str | float | int)
            }
            print(f"  {step}: " + ", ".join(f"{k} {v}" for k, v in told.items()).replace("\n", " "))
    for step, text in record["failed"].items():
        print(f"  {step}: failed: {text.strip().splitlines()[-1][:200]}")
    for step in record["not_run"]:
        print(f"  {step}: not run")


def main() -> int:
    """Measure, write, print; return the exit status."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of the JSON files")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="after which nothing more is begun")
    parser.add_argument("--again", action="store_true", help="measure what the files hold already, too")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU; figures that mean nothing")
    options = parser.parse_args()
    out = options.out or (DRY_OUT if options.dry_run else OUT)
    if options.dry_run and out.resolve() == OUT.resolve():
        parser.error(f"--out {out}: figures of GPUs lie there; expected another folder for a --dry-run")
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("no GPU was found here; --dry-run tries all parts on the CPU")
    end = time.monotonic() + 60 * options.minutes
    lab = Lab(TINY, torch.device("cpu")) if options.dry_run else Lab(FULL, torch.device("cuda", 0))
    share = 0.01 if options.dry_run else min(1.0, options.minutes / MINUTES)
    around, command = describe(lab.device, lab.scale), shlex.join(["python", "scripts/gpu_check.py", *sys.argv[1:]])
    out.mkdir(parents=True, exist_ok=True)
    records = {}
    for name, steps in lab.parts().items():
        path = out / f"{name}.json"
        new = {"part": name, "command": command, "environment": around, "steps": [*steps], "found": {}, "failed": {}}
        records[name] = (not options.again and read(path, around)) or {**new, "seconds": {}, "not_run": [*steps]}
        run_part(path, steps, records[name], share, end)
    for name, record in records.items():
        show(name, record)
    print(f"\n{out}: {around['device']}, {time.monotonic() - end + 60 * options.minutes:.0f} s")
    wrong = [row["failed"] for rows in records["tests"]["found"].values() for row in rows]
    return int(any([*wrong, *(record["failed"] for record in records.values())]))


if __name__ == "__main__":
    sys.exit(main())
