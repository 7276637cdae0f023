"""`adaskip bench` and `profile`: what layers cost, and what they are worth; nothing is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from adaskip.cli.shared import Json, app
from adaskip.terminal import do, say, table, terminal_stages


@app.command()
def bench(
    target: Annotated[str | None, typer.Argument(metavar="[RUN]", help="A run folder, or digits-vlm.")] = None,
    backbone: Annotated[str | None, typer.Option("--backbone", help="A random model of this type: llama ...")] = None,
    layers: Annotated[int, typer.Option("--layers", help="Its layers.")] = 24,
    hidden: Annotated[int, typer.Option("--hidden", help="Its width.")] = 1024,
    heads: Annotated[int | None, typer.Option("--heads", help="Default: one for 64 of the width.")] = None,
    kv_heads: Annotated[int | None, typer.Option("--kv-heads", help="Default: as many as heads.")] = None,
    intermediate: Annotated[int | None, typer.Option("--intermediate", help="Default: 8/3 of the width.")] = None,
    vocabulary: Annotated[int, typer.Option("--vocabulary", help="Tokens it knows.")] = 32_000,
    prompt: Annotated[int | None, typer.Option("--prompt", help="Text tokens a row; default 512.")] = None,
    image_tokens: Annotated[int, typer.Option("--image-tokens", help="A picture before them (llava, qwen2_vl).")] = 0,
    group: Annotated[str | None, typer.Option("--group", help="all, or vision: the default with pictures.")] = None,
    skip: Annotated[str | None, typer.Option("--skip", help="Shares of layers left out; default 0,0.25,0.5.")] = None,
    batch: Annotated[str, typer.Option("--batch", help="Rows.")] = "1,8",
    path: Annotated[
        str, typer.Option("--path", help="uniform: rows skip alike; mixed: each otherwise; many: generate_many.")
    ] = "uniform",
    paths: Annotated[int, typer.Option("--paths", help="Different paths of --path many.")] = 4,
    phase: Annotated[str, typer.Option("--phase", help="prefill, decode or both.")] = "prefill,decode",
    new: Annotated[int, typer.Option("--new", help="Tokens written in a turn.")] = 16,
    budget: Annotated[float, typer.Option("--budget", help="Seconds for all rounds together.")] = 300,
    width: Annotated[float, typer.Option("--width", help="Rounds end when intervals are narrower.")] = 0.04,
    attention: Annotated[str, typer.Option("--attention", help="sdpa or eager.")] = "sdpa",
    dtype: Annotated[str, typer.Option("--dtype", help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str | None, typer.Option("--device", help="Default: the GPU if there is one.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of random weights and prompts.")] = 0,
    as_json: Json = False,
) -> None:
    """Seconds of the dense, the routed and the physically cut model, in turn; prefill and decode apart."""
    options = {name: value for name, value in locals().items() if name != "as_json"}

    def work() -> dict[str, Any]:
        from rich.progress import Progress

        from adaskip.bench.settings import read

        settings = read(**options)
        with Progress(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("warming up", total=1.0)
            return settings.run(lambda text, share: bar.update(task, description=text, completed=share))

    def show(found: dict[str, Any]) -> None:
        from adaskip.bench.settings import columns

        table([columns(row) for row in found["results"]])
        say("seconds: medians; brackets: 95 % intervals over paired rounds; all else: --json")

    do(work, show, as_json)


@app.command()
def profile(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A Hugging Face id or folder, or digits-vlm.")],
    data: Annotated[str | None, typer.Option("--data", help="A folder of JSON lines, or a dataset id.")] = None,
    group: Annotated[
        str | None, typer.Option("--group", help="all or vision; default: both, where it has both.")
    ] = None,
    split: Annotated[str, typer.Option("--split", help="train, validation, calibration or test.")] = "validation",
    examples: Annotated[int, typer.Option("--examples", min=1, help="Inputs to measure.")] = 256,
    tolerance: Annotated[float, typer.Option("--tolerance", help="Nats per token that one skip may cost.")] = 0.05,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Inputs at once.")] = 32,
    output: Annotated[Path | None, typer.Option("--output", help="Folder of the picture and the figures.")] = None,
    as_json: Json = False,
) -> None:
    """Measure how redundant each layer is, and which cheap notion predicts it; trains nothing."""

    def work() -> dict[str, Any]:
        from adaskip.verbs.profile import profile_model

        return profile_model(
            model, data, group, split=split, examples=examples, tolerance=tolerance, batch_size=batch_size,
            output=output, stages=terminal_stages(),
        )  # fmt: skip

    def show(found: dict[str, Any]) -> None:
        from adaskip.verbs.profile import summary

        for rows in summary(found):
            table(rows)
            say("")
        say(f"chain of bounds violated {found['chain_violations']} times\npicture: {found['picture']}")

    do(work, show, as_json)
