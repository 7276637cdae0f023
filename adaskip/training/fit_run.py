"""`fit_from_bounds` in a run folder: a line of ``fit.jsonl`` and the routers after every round, to go on from."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from adaskip.batch import Batch
from adaskip.errors import CheckpointError
from adaskip.lines import own_lines
from adaskip.ranks import is_first_process
from adaskip.runfiles import FIT, FIT_ROUTERS, write, write_lines
from adaskip.runtime.attach import RoutedModel
from adaskip.training.data import Collator, Record, RoundSampler, in_order
from adaskip.training.fit import FitState, fit_from_bounds
from adaskip.training.objective import Fit, Objective

SURVEYED = 128  # inputs a pass of the survey


def fit_in_folder(
    model: RoutedModel,
    objective: Objective,
    fit: Fit,
    records: Sequence[Record],
    collate: Collator,
    folder: Path,
    seed: int,
    say: Callable[[str], None] | None = None,
) -> tuple[FitState, list[dict[str, Any]]]:
    """Fit the routers, or go on after the last whole round that the folder holds; ``say`` gets a line a round.

    Returns the final state and the figures of every round, as they stand in ``fit.jsonl``.

    Raises:
        CheckpointError: the folder's routers are damaged or belong to another model.
    """
    state = _load(model, folder / FIT_ROUTERS)
    rounds = _read(folder / FIT)[: state.round]

    def draw(index: int) -> list[Batch]:
        sampler = RoundSampler(len(records), fit.examples, seed)
        sampler.set_epoch(index)
        chosen = [records[i] for i in sampler]
        return [collate([chosen[i] for i in rows]).to(model.spec.device) for rows in in_order(chosen, SURVEYED)]

    def after(done: FitState, figures: dict[str, float]) -> None:
        rounds.append({"round": done.round, **figures})
        if not is_first_process():  # every process fits the same routers; one writes them
            return
        write_lines(folder / FIT, rounds)
        _save(model, done, folder / FIT_ROUTERS)
        if say is not None:
            keep, cost = f"{figures['keep']:.3f} of {figures['target']:.3f}", f"{figures['cost']:.4f} nats"
            say(f"from-bounds: round {done.round} of {fit.rounds}, keep {keep}, expected cost {cost}")

    return fit_from_bounds(model, draw, objective, fit, seed=seed, state=state, after=after), rounds


def _save(model: RoutedModel, state: FitState, path: Path) -> None:
    assert model.routers is not None
    weights = {name: weight.detach().cpu().contiguous() for name, weight in model.routers.state_dict().items()}
    write(path, save(weights, {"round": str(state.round), "multiplier": repr(state.multiplier)}))


def _load(model: RoutedModel, path: Path) -> FitState:
    if not path.is_file():
        return FitState()
    assert model.routers is not None
    try:
        with safe_open(path, "pt") as file:
            stored = file.metadata()
            model.routers.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
            return FitState(int(stored["round"]), float(stored["multiplier"]))
    except (SafetensorError, KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{path}: damaged, or of another model ({error}); delete it and resume again") from error


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in own_lines(path.read_text(encoding="utf-8"))] if path.is_file() else []
