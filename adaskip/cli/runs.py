"""`adaskip eval`, `check`, `calibrate`, `generate` and `export`: what is done with a finished run."""

from __future__ import annotations

from pathlib import Path
from textwrap import fill
from typing import Annotated, Any

import typer

from adaskip.cli.shared import Json, Longest, Run, app
from adaskip.errors import ConfigError
from adaskip.terminal import do, existing, pairs, say, table, terminal_stages


@app.command("eval")
def evaluate(
    run: Run,
    examples: Annotated[int, typer.Option("--examples", min=1, help="At most so many of each kind.")] = 200,
    split: Annotated[str, typer.Option("--split", help="validation, calibration or test.")] = "test",
    max_new_tokens: Longest = None,
    static: Annotated[
        str | None,
        typer.Option("--static", help="Layers that the static plan leaves out, as 4,5,6; default: training's."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure the routed model beside the dense one and the best static plan, by kind of input."""
    sides = ("dense", "routed", "static")
    spent = (*(f"{side}_{name}" for name in ("cut", "s") for side in sides), "prefill_dense_s", "prefill_routed_s")
    worded = tuple(f"{side}_{name}" for name in ("edit_distance", "hallucinated") for side in sides)
    forced = ("kl", "static_kl", "token_agreement", "static_token_agreement")
    likely = tuple(f"{side}_{name}" for name in ("perplexity", "log_likelihood") for side in sides)

    def work() -> Any:
        folder = existing(run)
        from adaskip.verbs.evaluate import evaluate

        return evaluate(
            folder, split=split, per_kind=examples, max_new_tokens=max_new_tokens, static=static,
            stages=terminal_stages(),
        )  # fmt: skip

    def show(result: dict[str, Any]) -> None:
        rows = [*result["kinds"], {"kind": "mean", **result["mean"]}]
        unknown = [name for name in rows[0] if all(row.get(name) is None for row in rows)]  # no static plan
        others = (*worded, *spent, *forced, *likely, "flops_saved")
        tables = {
            "generation: answers as they are written, exact match with the data's own and with the dense model's": [
                name for name in rows[0] if name not in others
            ],
            "generation: edit distance from the data's own answers; share that name what is not there": (
                "kind",
                *worded,
            ),
            "answers that were cut, and seconds": ("kind", *spent, "flops_saved"),
            "log-likelihood: the data's own answers, teacher-forced; KL to the dense model in nats per token": (
                "kind",
                *forced,
            ),
            "log-likelihood: their perplexity, and log-likelihood in nats per token": ("kind", *likely),
        }
        for title, names in tables.items():
            if len(shown := [name for name in names if name in rows[0] and name not in unknown]) > 1:
                say(title)
                table(rows, shown=shown)
                say("")
        if duel := result.get("static"):
            say(fill(duel["sentence"], 98))
            say(f"the static plan leaves out layers {', '.join(map(str, duel['skip']))} ({duel['source']})\n")
        pairs({k: value for k, value in result.items() if k not in ("kinds", "mean", "warnings", "static")})

    do(work, show, as_json)


@app.command()
def check(
    run: Run,
    bands: Annotated[bool, typer.Option("--bands", help="Judge every late entry and early exit as well.")] = False,
    as_json: Json = False,
) -> None:
    """Check the theory's conditions of a run on held-out inputs; exits 0 only if they are shown to hold."""

    def work() -> Any:
        folder = existing(run)
        from adaskip.verbs.check import check

        return check(folder, bands, terminal_stages())

    def show(result: dict[str, Any]) -> None:
        table(result["rows"], hidden=("n", "margin"))
        if bands:
            table(result["bands"], hidden=("n", "margin", "notions"))
        pairs({name: value for name, value in result["summary"].items() if name not in ("verdict", "reasons")})
        say(
            {
                "hold": "the conditions hold",
                "do not hold": "the conditions DO NOT hold",
                "undecided": "undecided: these inputs do not show that the conditions hold",
            }[result["verdict"]]
        )
        for reason in result["reasons"]:
            say(f"  {reason}")

    do(work, show, as_json)


@app.command()
def calibrate(
    run: Run,
    risk: Annotated[float, typer.Option("--risk", help="Share of inputs whose answer may differ from dense.")] = 0.02,
    delta: Annotated[float, typer.Option("--delta", help="Chance that the share is larger after all.")] = 0.1,
    max_new_tokens: Longest = None,
    as_json: Json = False,
) -> None:
    """Certify the routers' threshold on fresh inputs and store it; exits 1 when none holds (every layer then runs)."""

    def work() -> Any:
        folder = existing(run)
        from adaskip.verbs.calibrate import calibrate

        return calibrate(folder, risk, delta, max_new_tokens, terminal_stages())

    def show(result: dict[str, Any]) -> None:
        table(result["steps"])
        pairs({name: value for name, value in result.items() if name != "steps"})
        if result["threshold"] is None:
            say("no threshold is certified: the checkpoint now runs every layer")
        else:
            say(f"answers differ from dense on at most {risk:g} of the inputs, with probability {1 - delta:g}")

    do(work, show, as_json)


@app.command()
def generate(
    run: Run,
    image: Annotated[Path | None, typer.Option("--image", exists=True, dir_okay=False, help="A picture.")] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", help="The question.")] = None,
    example: Annotated[int | None, typer.Option("--example", min=0, help="A held-out example of the run.")] = None,
    many: Annotated[
        Path | None, typer.Option("--many", exists=True, dir_okay=False, help="Prompts, a JSON object a line.")
    ] = None,
    paths: Annotated[int | None, typer.Option("--paths", min=1, help="With --many: at most so many paths.")] = None,
    lossless: Annotated[
        bool, typer.Option("--lossless", help="The routed path drafts, the dense model verifies: its answer, sooner.")
    ] = False,
    max_new_tokens: Longest = None,
    as_json: Json = False,
) -> None:
    """Answer one prompt, dense and routed, or many, those of one path together; show which layers were taken."""

    def work() -> Any:
        if (many, paths) != (None, None) and (many is None or (image, prompt, example) != (None, None, None)):
            raise ConfigError("--many FILE takes no other question, and --paths N goes with it")
        if many is not None and lossless:
            raise ConfigError("--lossless answers one prompt; leave it or --many FILE out")
        if many is not None:
            from adaskip.verbs.generate import answer_many

            return answer_many(existing(run), many, max_new_tokens, paths, terminal_stages())
        if (prompt is None) == (example is None) or (image is not None and example is not None):
            raise ConfigError(
                "expected --prompt TEXT (with --image PATH for a picture), --example N or --many FILE, one of them"
            )
        folder = existing(run)
        from adaskip.verbs.generate import answer

        return answer(
            folder,
            image=image,
            prompt=prompt,
            example=example,
            max_new_tokens=max_new_tokens,
            lossless=lossless,
            stages=terminal_stages(),
        )

    def show(result: dict[str, Any]) -> None:
        for row in result.get("answers", ()):
            say(f"{''.join('#' if ran else '.' for ran in row['route'])}  {row['keep']:.2f}  {row['answer']}")
        result.get("lossless", {}).pop("path", None)  # the route
        pairs({name: value for name, value in result.items() if name not in ("route", "layers", "answers", "warnings")})
        if many is not None:
            return
        bar = "".join("#" if ran else "." for ran in result["route"])
        unit = "layers" if len(bar) == result["layers"] else "halves of layers"
        say(f"route   {bar}   {sum(result['route'])} of {len(bar)} {unit} ran (# ran, . skipped)")

    do(work, show, as_json)


@app.command()
def export(
    run: Run,
    destination: Annotated[Path, typer.Argument(metavar="DEST")],
    cut: Annotated[
        bool, typer.Option("--cut", help="The layers that a plan keeps, as an ordinary Hugging Face model.")
    ] = False,
    push: Annotated[
        str | None, typer.Option("--push", metavar="USER/NAME", help="Upload the folder to the Hugging Face Hub too.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="A repository that --push makes is private.")] = False,
    revision: Annotated[
        str | None, typer.Option("--revision", help="Branch that --push uploads to; default: main.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Copy a run's routers to a folder of their own, ready to ship; or of a plan the model that it leaves."""

    def work() -> Any:
        folder = existing(run)
        from adaskip.verbs.export import export

        return export(
            folder, destination, cut=cut, push=push, private=private or None, revision=revision,
            stages=terminal_stages(),
        )  # fmt: skip

    do(work, pairs, as_json)
