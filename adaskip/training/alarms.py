"""Tell routers that have collapsed from routers that learn: three alarms, each a pure function of a look's tensors.

    saturated   |logit - threshold| beyond 8 for every input: the gate has no slope left, so nothing is learned there
    dear        a layer that most inputs leave out, though that alone costs them more than ten times what it may
    deaf        one path for every input, though several layers are free to differ: that is a static plan

None of them shows in the keep rate, which a collapsed router meets like any other. A layer that is cheap to leave out
may well be left out for every input, and one that is held decides nothing: neither counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from adaskip.sites import Label

SATURATED = 8.0
"""From here on a sigmoid's slope is below a thousandth of its steepest."""
DEAR = 10.0
"""So many tolerances are far too much for one layer."""
MANY = 16
"""Inputs among which routers that look at them find more than one path."""


@dataclass(frozen=True)
class Alarm:
    """Hold one alarm: its name, the layers that it speaks of, and a sentence."""

    name: str
    layers: tuple[Label, ...]
    sentence: str

    def to_dict(self) -> dict[str, Any]:
        """Return it JSON-ready."""
        return {"name": self.name, "layers": list(self.layers), "sentence": self.sentence}


@dataclass(frozen=True)
class Routers:
    """Hold how much the routers' decisions depend on the input."""

    logit_std: float  # standard deviation of a layer's logits over inputs, mean over the layers that are not held
    paths: int  # distinct paths over the inputs


def describe(logits: Tensor, keep: Tensor, held: Sequence[int] = ()) -> Routers:
    """Measure how far logits float (l n) and decisions bool (l n) differ between inputs.

    >>> import torch
    >>> describe(torch.tensor([[1.0, 3.0], [-1.0, -1.0]]), torch.tensor([[True, True], [False, False]]))
    Routers(logit_std=0.5, paths=1)
    """
    free = _free(len(logits), held)
    std = float(logits[free].double().std(1, correction=0).mean()) if free else 0.0
    return Routers(std, len(set(map(tuple, keep.T.tolist()))))


def find_alarms(
    logits: Tensor,
    keep: Tensor,
    costs: Tensor,
    tolerance: float,
    held: Sequence[int] = (),
    threshold: float = 0.0,
    settled: bool = True,
    label: Callable[[int], Label] = int,
) -> tuple[Alarm, ...]:
    """Return the alarms that routers raise at one look.

    Args:
        logits: float (l n), of every layer for every input; under scope ``token`` the mean over its tokens.
        keep: bool (l n), what was decided.
        costs: (l n) exact cost of skipping each layer alone for each input, nats per predicted token.
        tolerance: what one skip may cost.
        held: layers that run whatever their routers say.
        threshold: a layer runs where its logit is above this.
        settled: the budget is asked for in full; before that one path for all is no wonder.
        label: what a layer, or a half of one, is called.
    """
    mean = costs.double().mean(1)
    found = [
        saturated(logits - threshold, mean, tolerance, held, label),
        dear(keep, costs, tolerance, held, label),
        deaf(logits, keep, mean, tolerance, held, label) if settled else None,
    ]
    return tuple(alarm for alarm in found if alarm is not None)


def saturated(
    margins: Tensor, costs: Tensor, tolerance: float, held: Sequence[int] = (), label: Callable[[int], Label] = int
) -> Alarm | None:
    """Alarm where a router is certain for every input, margins (l n) beyond 8, of a layer about which it should not be.

    Rightly certain are those that skip what costs no more than it may, and those that run what costs ten times that.
    """
    certain = (margins.abs() > SATURATED).all(1)
    runs = (margins > 0).all(1)
    right = (costs <= tolerance) | (runs & (costs > DEAR * tolerance))
    layers = [layer for layer in _free(len(costs), held) if certain[layer] and not right[layer]]
    if not layers:
        return None
    sides = {layer: "runs" if runs[layer] else "skips" for layer in layers}
    named = ", ".join(f"{label(layer)} ({side}, {float(costs[layer]):.3g} nats)" for layer, side in sides.items())
    return Alarm(
        "saturated",
        tuple(map(label, layers)),
        f"saturated gates: every logit of {_layers(layers)} {named} lies more than {SATURATED:g} from the threshold, "
        "where a gate has no slope",
    )


def dear(
    keep: Tensor, costs: Tensor, tolerance: float, held: Sequence[int] = (), label: Callable[[int], Label] = int
) -> Alarm | None:
    """Alarm where most inputs leave out a layer, keep bool (l n), at costs (l n) beyond ten tolerances in their mean.

    A few inputs that run it after all do not make the routers of the others learn: it is most of them that count.
    """
    skipped = (~keep).double()
    count = skipped.sum(1)
    charged = (skipped * costs).sum(1) / count.clamp(min=1)
    dearly = (2 * count > keep.shape[1]) & (charged > DEAR * tolerance)
    layers = [layer for layer in _free(len(costs), held) if dearly[layer]]
    if not layers:
        return None
    named = ", ".join(
        f"{label(layer)} (by {int(count[layer])} of {keep.shape[1]} inputs, {float(charged[layer]):.3g} nats)"
        for layer in layers
    )
    return Alarm(
        "dear",
        tuple(map(label, layers)),
        f"most inputs leave out {_layers(layers)} {named}, though skipping one alone costs them more than "
        f"{DEAR:g} tolerances ({DEAR * tolerance:.3g} nats)",
    )


def deaf(
    logits: Tensor,
    keep: Tensor,
    costs: Tensor,
    tolerance: float,
    held: Sequence[int] = (),
    label: Callable[[int], Label] = int,
) -> Alarm | None:
    """Alarm where every one of many inputs takes one path, though several layers might differ and some are left out."""
    undecided = [layer for layer in _free(len(costs), held) if costs[layer] <= DEAR * tolerance]
    decided = keep[undecided]
    # where all of them run or none does, the budget leaves no choice to make, or nothing is asked for yet
    chosen = bool(decided.any()) and not bool(decided.all())
    measured = describe(logits, keep, held)
    if measured.paths > 1 or keep.shape[1] < MANY or len(undecided) < 2 or not chosen:
        return None
    skipped = [layer for layer in range(len(keep)) if not keep[layer, 0]]
    spread = f"{measured.logit_std:.2g} (standard deviation)"
    return Alarm(
        "deaf",
        tuple(map(label, undecided)),
        f"routers ignore their input: all {keep.shape[1]} inputs take one path, without {_layers(skipped)} "
        f"{', '.join(str(label(layer)) for layer in skipped)}; logits differ by {spread} between inputs",
    )


def _free(layers: int, held: Sequence[int]) -> list[int]:
    return [layer for layer in range(layers) if layer not in held]


def _layers(layers: Sequence[int]) -> str:
    return "layer" if len(layers) == 1 else "layers"
