"""Find what there is to gain by choosing layers input by input: a plan of each input's own beside the best for all.

Both leave out as many layers, both are planned greedily by exact costs, and both are found on the very inputs that they
are judged on: what a router can gain on fresh inputs is less.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from adaskip.batch import Batch
from adaskip.errors import ConfigError, DataError
from adaskip.runtime.attach import RoutedModel
from adaskip.stages import SILENT, Stages
from adaskip.survey.greedy import Path, Price, exact_prices, greedy_paths
from adaskip.survey.plans import plan_costs, run_plan, runs_of
from adaskip.survey.record import record
from adaskip.survey.skips import measure_skips
from adaskip.theory.intervals import Interval, paired_difference
from adaskip.theory.notions import plain


@dataclass(frozen=True)
class Oracle:
    """Hold the best static plan found on some inputs, and what a plan of each input's own would save."""

    group: str
    n: int
    skips: int  # layers that every plan leaves out
    keep: float  # executed over dense decoder FLOPs of the static plan, mean over inputs
    static: Path  # its layers
    static_kl: float  # nats per predicted token, mean over inputs
    oracle_kl: float
    paths: int  # different plans among the inputs' own
    headroom: Interval  # static minus oracle, paired over inputs
    sentence: str

    def to_dict(self) -> dict[str, Any]:
        """Return it JSON-ready."""
        return asdict(self) | {"static": list(self.static), "headroom": plain(self.headroom)}


@torch.no_grad()
def find_oracle(
    model: RoutedModel,
    batches: Callable[[Sequence[int]], Sequence[Batch]],
    inputs: int,
    *,
    skips: int,
    width: int = 6,
    stages: Stages = SILENT,
) -> Oracle:
    """Plan ``skips`` layers greedily for all inputs together, and for each alone; see `greedy_paths`.

    Costs a `measure_skips` of the inputs, and twice ``width`` suffixes of each input for every layer after the first.
    An input's own plan is the static one where greedy planning finds nothing better for it.

    Args:
        model: attached, of scope ``prompt``; whatever decides in it, only its execution is used.
        batches: makes batches, on the model's device, of inputs given by number, in that order.
        inputs: how many there are.
        skips: layers that every plan leaves out.
        width: candidates tried for each further layer.
        stages: hears what is under way.

    Raises:
        ConfigError: more layers are to go than there are.
        DataError: no inputs.
    """
    layers = len(model.sites)
    if not 0 < skips <= layers:
        raise ConfigError(f"oracle: skips: expected 1 to {layers}, got {skips}")
    if inputs < 1:
        raise DataError(f"oracle: expected at least 1 input, got {inputs}")
    everyone = range(inputs)
    with stages(f"oracle: pricing {layers} layers on {inputs} inputs", inputs) as advance:
        single = measure_skips(model, batches(everyone), progress=advance).kl.double()
    with stages(f"oracle: planning {skips} of {layers} layers for all inputs together"):
        static = greedy_paths(exact_prices(model, batches), everyone, single.mean(0), skips, width)[-1][0]
        costs = plan_costs(model, batches(everyone), [runs_of(static, layers)])
    best, own = costs.kl[:, 0], []
    paths: list[Path] = []
    with stages(f"oracle: planning {skips} of {layers} layers for each of {inputs} inputs", inputs) as advance:
        for row in everyone:
            path, cost = greedy_paths(_remembered(model, batches, row), [row], single[row], skips, width)[-1]
            better = cost < float(best[row])
            own.append(cost if better else float(best[row]))
            paths.append(path if better else static)
            advance(row + 1)
    return _conclude(model.target.group, static, paths, best, torch.tensor(own).double(), costs.keep, layers)


def _remembered(model: RoutedModel, batches: Callable[[Sequence[int]], Sequence[Batch]], row: int) -> Price:
    """Return exact prices of one input, whose dense pass is run once, when the first price is asked for."""
    recorded: list[Any] = []

    def price(paths: Sequence[Path], rows: Sequence[int]) -> Tensor:
        if not recorded:
            recorded.append(record(model, batches([row])[0]))
        plans = (runs_of(path, len(model.sites)) for path in paths)
        return torch.stack([run_plan(recorded[0], plan)["kl"] for plan in plans], 1)

    return price


def _conclude(
    group: str, static: Path, paths: Sequence[Path], best: Tensor, own: Tensor, keep: Tensor, layers: int
) -> Oracle:
    headroom, different = paired_difference(best, own), len({*paths})
    fixed, chosen, kept = float(best.mean()), float(own.mean()), float(keep.mean())
    sentence = (
        f"oracle, group {group}: of plans that leave out {len(static)} of {layers} layers (keep {kept:.3f}), the best "
        f"for all inputs, without {', '.join(map(str, static))}, costs {fixed:.4g} nats per token, and one of each "
        f"input's own {chosen:.4g} ({different} different ones), "
        f"{headroom.estimate:.4g} [{headroom.low:.4g}, {headroom.high:.4g}] less. "
        f"All were found on the {len(best)} inputs that they are judged on: on fresh ones a router gains less"
    )
    return Oracle(group, len(best), len(static), kept, static, fixed, chosen, different, headroom, sentence)
