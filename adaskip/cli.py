"""`adaskip VERB`: one verb for each piece of work. Heavy imports happen inside the verbs, so `--help` is instant."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Column, Table

from adaskip import __version__
from adaskip.errors import AdaSkipError, CheckpointError, ConfigError, did_you_mean

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
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer.")] = 16,
    as_json: Json = False,
) -> None:
    """Answer one prompt, dense and routed, and show which layers it took."""

    def work() -> dict[str, Any]:
        if (prompt is None) == (example is None) or (image is not None and example is not None):
            raise ConfigError("expected --prompt TEXT (with --image PATH for a picture) or --example N, one of the two")
        folder = _existing(run)
        from adaskip.evaluate import answer

        return answer(folder, image=image, prompt=prompt, example=example, max_new_tokens=max_new_tokens)

    def show(found: dict[str, Any]) -> None:
        _pairs({name: value for name, value in found.items() if name not in ("route", "layers")})
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


def _do(work: Callable[[], dict[str, Any]], show: Callable[[dict[str, Any]], None], as_json: bool) -> None:
    """Do a verb's work, then print its result for people or for programs, and turn it into an exit status."""
    try:
        with _stdout_to_stderr() if as_json else nullcontext():
            found = work()
    except (AdaSkipError, OSError) as error:
        if as_json:
            _emit_error(str(error))
        else:
            print(f"adaskip: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    if as_json:
        _emit(found)
    else:
        show(found)
    if not found.get("ok", True):
        raise typer.Exit(1)


@contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Send what libraries and child processes print to standard error, at the level of the file descriptor as well."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _emit(values: dict[str, Any]) -> None:
    """Print one strict JSON object: NaN and infinity, which JSON does not know, become null."""
    text = json.dumps(values, default=str)
    print(json.dumps(json.loads(text, parse_constant=lambda _: None)))


def _emit_error(text: str) -> None:
    head, *faults = text.splitlines()
    _emit({"ok": False, "error": head, "faults": [fault.strip() for fault in faults] or [head]})


def _existing(run: Path) -> Path:
    """The folder itself.

    Raises CheckpointError when there is none; names a sibling folder of a similar name.
    """
    if run.is_dir():
        return run
    siblings = [path.name for path in run.parent.iterdir() if path.is_dir()] if run.parent.is_dir() else []
    hint = did_you_mean(run.name, siblings)
    near = f"; {hint}" if hint.startswith("did") else "."
    raise CheckpointError(f"{run}: no such run folder{near} Train one with: adaskip train digits-vlm output={run}")


def _say(text: str) -> None:
    Console(markup=False, highlight=False, soft_wrap=True).print(text)


def _table(rows: list[dict[str, Any]], hidden: Sequence[str] = ()) -> None:
    """Rows as a table that fits 80 columns; the first row names the columns."""
    names = [name for name in (rows[0] if rows else ()) if name not in hidden]
    columns = [Column(name.replace("_", "\n"), no_wrap=name != "sentence", vertical="top") for name in names]
    table = Table(*columns, box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    for row in rows:
        table.add_row(*(_cell(row.get(name)) for name in names))
    Console(markup=False, highlight=False).print(table)


def _pairs(values: dict[str, Any], prefix: str = "") -> None:
    """One `name  value` a line; what is nested gets its path as a name."""
    for name, value in values.items():
        if isinstance(value, dict):
            _pairs(value, f"{prefix}{name}.")
        else:
            _say(f"{prefix + name:28} {_cell(value)}")


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
