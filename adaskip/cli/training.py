"""`adaskip ls`, `cp`, `validate`, `data`, `train` and `heal`: recipes, their data, runs, and what mends a run."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from adaskip.cli.shared import Json, Overrides, RecipeName, Run, app
from adaskip.errors import ConfigError
from adaskip.runfiles import write
from adaskip.terminal import do, existing, pairs, say, sourced, table, terminal_stages


@app.command()
def ls(as_json: Json = False) -> None:
    """List the shipped recipes."""

    def work() -> dict[str, Any]:
        from adaskip.recipe import load, recipes, sentence

        rows = []
        for name, path in recipes().items():
            recipe = load(path)
            about = {"name": name, "backbone": recipe.backbone.path, "group": recipe.router.group}
            rows.append({**about, "sentence": sentence(path)})
        return {"recipes": rows}

    do(work, lambda result: table(result["recipes"]), as_json)


@app.command()
def cp(
    name: RecipeName,
    destination: Annotated[Path, typer.Argument(metavar="[DEST]", help="A file or an existing folder.")] = Path(),
    force: Annotated[bool, typer.Option("--force", help="Overwrite the destination.")] = False,
    as_json: Json = False,
) -> None:
    """Copy a recipe, to edit it."""

    def work() -> dict[str, Any]:
        from adaskip.recipe import find

        source = find(name)
        target = destination / source.name if destination.is_dir() else destination
        if target.exists() and not force:
            raise ConfigError(f"{target} exists; overwrite it with --force, or name another: adaskip cp {name} DEST")
        try:
            write(target, source.read_bytes())
        except OSError as error:
            raise ConfigError(
                f"{target}: cannot be written ({error.strerror}); name another: adaskip cp {name} DEST"
            ) from None
        return {"file": str(target)}

    do(work, lambda done: say(f"{done['file']}\nnext: adaskip train {done['file']}"), as_json)


@app.command()
def validate(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="As for train; may be missing with --schema.")] = "",
    overrides: Overrides = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of recipes instead.")] = False,
    as_json: Json = False,
) -> None:
    """Check a recipe; show every value with where it comes from, and estimate memory and speed."""

    def work() -> dict[str, Any]:
        from adaskip.recipe import Recipe, load, origins

        if schema:
            return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | Recipe.model_json_schema()
        if not recipe:
            raise ConfigError("validate: expected a recipe, or --schema; see the shipped ones with: adaskip ls")
        read = load(recipe, overrides or [])  # before the heavier imports: a fault shows at once
        sources = origins(read, recipe, overrides or [])
        from adaskip.verbs.estimate import try_estimate

        read.check_method()
        return {
            "ok": True, "faults": [], "recipe": read.model_dump(), "sources": sources, "estimate": try_estimate(read),
        }  # fmt: skip

    def show(done: dict[str, Any]) -> None:
        if schema:
            say(json.dumps(done, indent=2))
            return
        sourced(done["recipe"], done["sources"])
        say("estimated, for each device:")
        pairs(done["estimate"], "  ")
        say("no faults")

    do(work, show, as_json)


@app.command()
def data(recipe: RecipeName, overrides: Overrides = None, as_json: Json = False) -> None:
    """Look at a recipe's data: counts, lengths, pictures, bad records, and the first example as the model reads it."""

    def work() -> Any:
        from adaskip.recipe import load

        read = load(recipe, overrides or [])
        from adaskip.verbs.data import data

        return data(read, stages=terminal_stages())

    def show(done: dict[str, Any]) -> None:
        splits = done["splits"]
        table([{name: row[name] for name in ("split", "records", "pictured")} | _lengths(row) for row in splits])
        kinds = sorted({kind for row in splits for kind in row["kinds"]} - {""})
        if kinds:
            table([{"kind": kind, **{row["split"]: row["kinds"].get(kind, 0) for row in splits}} for kind in kinds])
        padding = done["padding"]
        if padding["as_they_come"] is not None:
            say(
                f"padding of training batches of {padding['batch_size']}: {padding['as_they_come']:.1%} of their "
                f"tokens; {padding['by_length']:.1%} with data.group_by_length=true"
            )
        pairs({"pictures": done["pictures"]} if done["pictures"]["count"] else {})
        if done["faults"]:
            say(f"{done['bad']} bad records (data.bad_limit={done['bad_limit']}):")
            for fault in done["faults"]:
                say(f"  {fault}")
        first = done["first"]
        if first:
            say(f"{first['where']}; the model learns what is scored, routers read the prompt:")
            for part in first["parts"]:
                say(f"{part['part']:7} {part['tokens']:5} tokens | {part['text']}")

    do(work, show, as_json)


def _lengths(row: dict[str, Any]) -> dict[str, Any]:
    """Return the columns of a split's lengths in tokens."""
    parts = {"prompt": row["prompt_tokens"], "answer": row["answer_tokens"]}
    return {f"{part}_{name}": value for part, figures in parts.items() for name, value in figures.items()}


@app.command()
def train(
    recipe: RecipeName,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run folder's last checkpoint.")] = False,
    smoke: Annotated[
        bool, typer.Option("--smoke", help="Rehearse it in seconds: a small random backbone, a few steps, no network.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train the routers of a recipe; leaves a complete run folder."""

    def work() -> Any:
        from adaskip.recipe import load

        read = load(recipe, overrides or [])  # before the heavier imports: a fault shows at once
        from adaskip.verbs.train import train

        _quieten()
        return train(read, resume=resume, smoke=smoke, stages=terminal_stages(bars=read.trainer.progress))

    def show(done: dict[str, Any]) -> None:
        beside = done.get("static", {}).get("sentence")
        pairs(done)
        table(_sides(done))
        if not done.get("ok", True):
            if beside:
                say(beside)
            say(done.get("stopped") or done.get("budget_sentence", ""))
            return
        say(f"next: adaskip eval {done['folder']}, adaskip check {done['folder']}")
        if beside:
            say(beside)

    do(work, show, as_json)


def _sides(done: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of a run's last table: what validation says of the routers, and of the best static plan."""
    if "static" not in done:
        return [{"side": "routers", **done["val"]}] if done.get("val") else []
    plan = {name: done["static"].get(name) for name in done["static"]["routers"]}
    return [{"side": "routers", **done["static"]["routers"]}, {"side": "best static plan", **plan}]


@app.command()
def heal(
    run: Run,
    rank: Annotated[int, typer.Option("--rank", min=1, help="Of each adapter.")] = 8,
    alpha: Annotated[float, typer.Option("--alpha", help="An adapter counts alpha / rank times.")] = 16.0,
    dropout: Annotated[float, typer.Option("--dropout", help="Share of an adapter's inputs left out.")] = 0.0,
    targets: Annotated[
        str | None, typer.Option("--targets", help="Names of modules, as q_proj,v_proj; default: all linear ones.")
    ] = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Optimiser steps.")] = 160,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Examples a step.")] = 8,
    learning_rate: Annotated[float, typer.Option("--learning-rate", help="Its peak.")] = 1e-3,
    task_weight: Annotated[float, typer.Option("--task-weight", help="Of the data's answers, beside the KL.")] = 0.0,
    seed: Annotated[int, typer.Option("--seed", help="Of initial weights and order.")] = 0,
    as_json: Json = False,
) -> None:
    """Train adapters that mend what a run's skips break; the dense model stays as it is."""

    def work() -> Any:
        folder = existing(run)
        from adaskip.runtime.lora import Lora
        from adaskip.verbs.heal import heal

        _quieten()
        lora = Lora(rank, alpha, dropout, tuple(targets.split(",")) if targets else ())
        return heal(
            folder, lora=lora, steps=steps, batch_size=batch_size, learning_rate=learning_rate,
            task_weight=task_weight, seed=seed, stages=terminal_stages(),
        )  # fmt: skip

    def show(result: dict[str, Any]) -> None:
        table([{"side": side, **result[side]} for side in ("before", "after")])
        gap = result["saved"]
        say(f"healing saves {gap['estimate']:.3g} nats a token (95 %: {gap['low']:.3g} to {gap['high']:.3g})")
        pairs({name: value for name, value in result.items() if name not in ("before", "after", "saved")})

    do(work, show, as_json)


def _quieten() -> None:
    """Let Lightning say no more than a user of the command line can act on; this process is ours alone."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for noise in (".*many workers.*", ".*LeafSpec.*", ".*eval mode at the start of training.*"):
        warnings.filterwarnings("ignore", noise)
