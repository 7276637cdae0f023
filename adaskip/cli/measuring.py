"""`adaskip bench`, `profile` and `compare`: what layers and policies cost and are worth."""

from __future__ import annotations

from pathlib import Path
from textwrap import fill
from typing import Annotated, Any

import typer
from rich.console import Console

from adaskip.cli.derived import call
from adaskip.cli.shared import Json, app
from adaskip.terminal import do, say, table, terminal_stages


@app.command(add_help_option=False, context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
def bench(ctx: typer.Context) -> None:
    """Measure seconds of the dense, the routed and the physically cut model, in turn; prefill and decode apart."""
    from adaskip.bench.settings import BenchSettings, read

    def measure(values: dict[str, str], as_json: bool) -> None:
        def work() -> Any:
            from rich.progress import Progress

            settings = read(values)  # before the heavier imports: a fault shows at once
            from adaskip.bench.table import run

            with Progress(console=Console(stderr=True), transient=True) as bar:
                task = bar.add_task("warming up", total=1.0)
                return run(settings, lambda text, share: bar.update(task, description=text, completed=share))

        do(work, show, as_json)

    def show(result: dict[str, Any]) -> None:
        from adaskip.bench.table import columns

        table([columns(row) for row in result["results"]])
        say("seconds: medians; brackets: 95 % intervals over paired rounds; all else: --json")

    call(BenchSettings, measure, ctx, bench.__doc__ or "")


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
    tangents: Annotated[
        int, typer.Option("--tangents", min=0, help="So many inputs get first-order products, the slowest; 0: none.")
    ] = 64,
    oracle: Annotated[
        int, typer.Option("--oracle", min=0, help="So many inputs also get a plan of their own; 0: none.")
    ] = 16,
    keep: Annotated[float, typer.Option("--keep", help="Share of the layers that these plans keep.")] = 0.9,
    output: Annotated[Path | None, typer.Option("--output", help="Folder of the picture and the figures.")] = None,
    as_json: Json = False,
) -> None:
    """Measure how redundant each layer is, and which cheap notion predicts it; trains nothing."""

    def work() -> Any:
        from adaskip.verbs.profile import profile_model

        return profile_model(
            model, data, group, split=split, examples=examples, tolerance=tolerance, batch_size=batch_size,
            tangents=tangents, oracle=oracle, keep=keep, output=output, stages=terminal_stages(),
        )  # fmt: skip

    def show(result: dict[str, Any]) -> None:
        from adaskip.verbs.profile import summary

        for rows in summary(result):
            if rows:
                table(rows)
                say("")
        for name, group in result["groups"].items():
            say(fill(f"group {name}: {group['ranks']}", 98))
            say(fill(f"group {name}: {group['sinks']}", 98))
        if oracle := result["oracle"]:
            say(fill(oracle["sentence"], 98))
        say(f"chain of bounds violated {result['chain_violations']} times\npicture: {result['picture']}")

    do(work, show, as_json)


@app.command()
def compare(
    target: Annotated[
        str, typer.Argument(metavar="MODEL|RUN", help="A Hugging Face id or folder, digits-vlm, or a run's folder.")
    ],
    policies: Annotated[
        str | None, typer.Option("--policies", help="Names, such as greedy,skip_it,learned; default: all methods.")
    ] = None,
    budgets: Annotated[
        str, typer.Option("--budgets", help="Shares of the dense decoder FLOPs that they may keep.")
    ] = "0.9,0.8,0.7,0.6,0.5",
    data: Annotated[str | None, typer.Option("--data", help="A folder of JSON lines, or a dataset id.")] = None,
    group: Annotated[str | None, typer.Option("--group", help="all or vision; default: the run's, or all.")] = None,
    runs: Annotated[
        list[str] | None,
        typer.Option("--run", metavar="[LABEL=]FOLDER", help="A finished run to compare as well; may be repeated."),
    ] = None,
    train: Annotated[
        list[str] | None,
        typer.Option("--train", metavar="[LABEL=]RECIPE", help="A recipe to train at every budget; may be repeated."),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A key of all recipes that are trained; may be repeated."),
    ] = None,
    split: Annotated[str, typer.Option("--split", help="Judged on: validation, calibration or test.")] = "test",
    examples: Annotated[int, typer.Option("--examples", min=1, help="Inputs to judge on.")] = 600,
    fit: Annotated[int, typer.Option("--fit", min=1, help="Inputs of split train that plans are chosen by.")] = 200,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Draws of a method that draws, and trainings.")] = 3,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Inputs at once.")] = 64,
    new_tokens: Annotated[int, typer.Option("--new-tokens", min=1, help="Generated where seconds are taken.")] = 8,
    generate: Annotated[
        int, typer.Option("--generate", min=0, help="So many inputs are also answered freely; 0: none.")
    ] = 0,
    oracle: Annotated[
        int, typer.Option("--oracle", min=0, help="So many inputs also get a plan of their own; 0: none.")
    ] = 0,
    output: Annotated[Path | None, typer.Option("--output", help="Folder of cells, table and picture.")] = None,
    wandb: Annotated[str, typer.Option("--wandb", help="Weights & Biases: disabled, offline or online.")] = "disabled",
    as_json: Json = False,
) -> None:
    """Choose layers by every method at every budget, and compare what is recovered, spent and saved."""

    def work() -> Any:
        from adaskip.verbs.compare import compare, read_budgets

        return compare(
            target, data, policies=None if policies is None else [name.strip() for name in policies.split(",")],
            budgets=read_budgets(budgets), group=group, runs=runs or (), train=train or (),
            overrides=overrides or (), split=split, examples=examples, fit=fit,
            seeds=seeds, batch_size=batch_size, new_tokens=new_tokens, generate=generate, oracle=oracle, output=output,
            wandb=wandb, stages=terminal_stages(),
        )  # fmt: skip

    def show(result: dict[str, Any]) -> None:
        shown = ("budget", "policy", "seeds", "keep", "accuracy", "recovery", "kl", "token_agreement", "prefill_ratio")
        table([_pick(row, *shown, "generate_ratio", "front") for row in result["rows"]])
        written = [{**_pick(row, "budget", "policy"), **row["generated"]} for row in result["rows"] if row["generated"]]
        if written:
            say("\ngeneration: answers written freely, beside the data's own and the dense model's:")
            table(written)
        held = ("policy", "budget", "seed", "unit", "kv", "jaccard", "spearman", "inside", "outside", "p")
        if result["agreement"]:
            say(f"\nskips beside what the theory admits, layers {', '.join(map(str, result['admitted'])) or 'none'}:")
            table(result["agreement"], shown=held)
        for found in result["oracle"]:
            say(fill(found["sentence"], 98))
        for text in result["left_out"]:
            say(f"left out: {text}")
        say(f"picture: {result['picture']}")

    do(work, show, as_json)


def _pick(row: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: row[name] for name in names}
