"""`adaskip VERB`: one verb for each piece of work. Heavy imports happen inside the verbs, so `--help` is instant."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from adaskip import __version__
from adaskip.errors import ConfigError
from adaskip.terminal import do as _do
from adaskip.terminal import emit_error as _emit_error
from adaskip.terminal import existing as _existing
from adaskip.terminal import pairs as _pairs
from adaskip.terminal import say as _say
from adaskip.terminal import table as _table

app = typer.Typer(
    help="Teach a frozen transformer which of its layers an input does not need, and really leave that work out.",
    epilog="Start with: adaskip train digits-vlm. Exit status: 0 success, 1 a check failed, 2 bad input.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Json = Annotated[bool, typer.Option("--json", help="One JSON object on standard output, all else on standard error.")]
RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="A name that `adaskip ls` shows, or a YAML file.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY.PATH=VALUE]...", help="For example objective.keep=0.5.")
]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, for example runs/digits-vlm.")]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"adaskip {__version__}")
        raise typer.Exit


Version = Annotated[
    bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
]


@app.callback()
def _common(version: Version = False) -> None: ...


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

    _do(work, lambda found: _table(found["recipes"]), as_json)


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
        shutil.copyfile(source, target)
        return {"file": str(target)}

    _do(work, lambda done: _say(f"{done['file']}\nnext: adaskip train {done['file']}"), as_json)


@app.command()
def validate(recipe: RecipeName, overrides: Overrides = None, as_json: Json = False) -> None:
    """Check a recipe and show it resolved; every fault is listed at once."""

    def work() -> dict[str, Any]:
        from adaskip.recipe import load

        return {"ok": True, "faults": [], "recipe": load(recipe, overrides or []).model_dump()}

    def show(done: dict[str, Any]) -> None:
        _pairs(done["recipe"])
        _say("no faults")

    _do(work, show, as_json)


@app.command()
def train(
    recipe: RecipeName,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run folder's last checkpoint.")] = False,
    as_json: Json = False,
) -> None:
    """Train the routers of a recipe; leaves a complete run folder."""

    def work() -> dict[str, Any]:
        from adaskip.recipe import load

        read = load(recipe, overrides or [])  # before the heavier imports: a fault shows at once
        from adaskip.train import train

        return train(read, resume=resume)

    def show(done: dict[str, Any]) -> None:
        _pairs(done)
        if not done.get("ok", True):
            return
        _say(f"next: adaskip eval {done['folder']}, adaskip check {done['folder']}")

    _do(work, show, as_json)


@app.command("eval")
def evaluate(
    run: Run,
    examples: Annotated[int, typer.Option("--examples", min=1, help="At most so many of each kind.")] = 200,
    split: Annotated[str, typer.Option("--split", help="validation, calibration or test.")] = "test",
    as_json: Json = False,
) -> None:
    """Accuracy, keep rate and seconds of the routed model beside the dense one, by kind of example."""

    def work() -> dict[str, Any]:
        folder = _existing(run)
        from rich.progress import Progress

        from adaskip.evaluate import evaluate

        with Progress(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("answering", total=None)

            def advance(done: int, total: int) -> None:
                bar.update(task, completed=done, total=total)

            return evaluate(folder, split=split, per_kind=examples, progress=advance)

    def show(found: dict[str, Any]) -> None:
        _table([*found["kinds"], {"kind": "mean", **found["mean"]}])
        _pairs({name: value for name, value in found.items() if name not in ("kinds", "mean")})

    _do(work, show, as_json)


@app.command()
def check(
    run: Run,
    bands: Annotated[bool, typer.Option("--bands", help="Judge every late entry and early exit as well.")] = False,
    as_json: Json = False,
) -> None:
    """Check the theory's conditions of a run on held-out inputs; exits 1 when they do not hold."""

    def work() -> dict[str, Any]:
        folder = _existing(run)
        from adaskip.evaluate import check

        return check(folder, bands)

    def show(found: dict[str, Any]) -> None:
        _table(found["rows"], hidden=("n", "margin"))
        if bands:
            _table(found["bands"], hidden=("n", "margin", "notions"))
        _pairs(found["summary"])
        _say("the conditions hold" if found["ok"] else "the conditions DO NOT hold")

    _do(work, show, as_json)


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

        _table([columns(row) for row in found["results"]])
        _say("seconds: medians; brackets: 95 % intervals over paired rounds; all else: --json")

    _do(work, show, as_json)


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
        from rich.progress import Progress

        from adaskip.profiling import profile_model

        with Progress(console=Console(stderr=True), transient=True) as bar:
            tasks: dict[str, Any] = {}

            def advance(name: str, done: int, total: int) -> None:
                tasks[name] = tasks[name] if name in tasks else bar.add_task(f"group {name}", total=total)
                bar.update(tasks[name], completed=done)

            return profile_model(
                model, data, group, split=split, examples=examples, tolerance=tolerance, batch_size=batch_size,
                output=output, progress=advance,
            )  # fmt: skip

    def show(found: dict[str, Any]) -> None:
        from adaskip.profiling import summary

        for rows in summary(found):
            _table(rows)
            _say("")
        _say(f"chain of bounds violated {found['chain_violations']} times\npicture: {found['picture']}")

    _do(work, show, as_json)


@app.command()
def calibrate(
    run: Run,
    risk: Annotated[float, typer.Option("--risk", help="Share of inputs whose answer may differ from dense.")] = 0.02,
    delta: Annotated[float, typer.Option("--delta", help="Chance that the share is larger after all.")] = 0.1,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer.")] = 16,
    as_json: Json = False,
) -> None:
    """Certify the routers' threshold on fresh inputs and store it; exits 1 when none holds (every layer then runs)."""

    def work() -> dict[str, Any]:
        folder = _existing(run)
        from rich.progress import Progress

        from adaskip.calibrate import calibrate

        with Progress(console=Console(stderr=True), transient=True) as bar:
            tasks: dict[str, Any] = {}

            def advance(what: str, done: int, total: int) -> None:
                tasks[what] = tasks[what] if what in tasks else bar.add_task(what, total=total)
                bar.update(tasks[what], completed=done)

            return calibrate(folder, risk, delta, max_new_tokens, progress=advance)

    def show(found: dict[str, Any]) -> None:
        _table(found["steps"])
        _pairs({name: value for name, value in found.items() if name != "steps"})
        if found["threshold"] is None:
            _say("no threshold is certified: the checkpoint now runs every layer")
        else:
            _say(f"answers differ from dense on at most {risk:g} of the inputs, with probability {1 - delta:g}")

    _do(work, show, as_json)


@app.command()
def generate(
    run: Run,
    image: Annotated[Path | None, typer.Option("--image", exists=True, dir_okay=False, help="A picture.")] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", help="The question.")] = None,
    example: Annotated[int | None, typer.Option("--example", min=0, help="A held-out example of the run.")] = None,
    many: Annotated[Path | None, typer.Option("--many", exists=True, help="Prompts, a JSON object a line.")] = None,
    paths: Annotated[int | None, typer.Option("--paths", min=1, help="With --many: at most so many paths.")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer.")] = 16,
    as_json: Json = False,
) -> None:
    """Answer one prompt, dense and routed, or many, those of one path together; show which layers were taken."""

    def work() -> dict[str, Any]:
        if (many, paths) != (None, None) and (many is None or (image, prompt, example) != (None, None, None)):
            raise ConfigError("--many FILE takes no other question, and --paths N goes with it")
        if many is not None:
            from adaskip.evaluate import answer_many

            return answer_many(_existing(run), many, max_new_tokens, paths)
        if (prompt is None) == (example is None) or (image is not None and example is not None):
            raise ConfigError(
                "expected --prompt TEXT (with --image PATH for a picture), --example N or --many FILE, one of them"
            )
        folder = _existing(run)
        from adaskip.evaluate import answer

        return answer(folder, image=image, prompt=prompt, example=example, max_new_tokens=max_new_tokens)

    def show(found: dict[str, Any]) -> None:
        for row in found.get("answers", ()):
            _say(f"{''.join('#' if ran else '.' for ran in row['route'])}  {row['keep']:.2f}  {row['answer']}")
        _pairs({name: value for name, value in found.items() if name not in ("route", "layers", "answers")})
        if many is not None:
            return
        bar = "".join("#" if ran else "." for ran in found["route"])
        _say(f"route   {bar}   {sum(found['route'])} of {found['layers']} layers ran (# ran, . skipped)")

    _do(work, show, as_json)


@app.command()
def export(run: Run, destination: Annotated[Path, typer.Argument(metavar="DEST")], as_json: Json = False) -> None:
    """Copy a run's routers to a folder of their own, ready to ship."""

    def work() -> dict[str, Any]:
        folder = _existing(run)
        from adaskip.export import export

        return export(folder, destination)

    _do(work, _pairs, as_json)


def main(args: Sequence[str] | None = None) -> None:
    """Entry point: exits 0 on success, 1 when a check failed, 2 on bad input."""
    words = list(sys.argv[1:] if args is None else args)
    try:
        sys.exit(app(words, prog_name="adaskip", standalone_mode=False) or 0)
    except typer.Abort:
        sys.exit(130)
    except Exception as error:
        if not hasattr(error, "format_message"):  # not a usage error
            raise
        if "--json" in words:
            _emit_error(error.format_message())
        error.show()  # type: ignore[attr-defined]
        sys.exit(2)


if __name__ == "__main__":
    main()
