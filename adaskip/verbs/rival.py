"""Find the static plan that a run's routers have to beat, and say whether they do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from adaskip.errors import ConfigError, DataError
from adaskip.plan import SkipPlan
from adaskip.runfiles import SUMMARY
from adaskip.sites import Label, Unit, label_site, parse_labels, read_sites
from adaskip.theory.intervals import paired_difference
from adaskip.theory.notions import plain

LEVEL = 0.95


@dataclass(frozen=True)
class Rival:
    """Hold a static plan, and where it is from."""

    skip: tuple[Label, ...]  # the layers that it leaves out, or halves of them
    source: str
    unit: Unit = "block"

    @property
    def sites(self) -> tuple[int, ...]:
        """Return the sites that it leaves out."""
        return read_sites(self.unit, self.skip)

    def check(self, layers: int) -> None:
        """Refuse a plan of layers that the backbone does not have.

        Raises:
            ConfigError: names them, and how many there are.
        """
        try:
            SkipPlan(skip=self.skip, unit=self.unit).keep(layers)
        except ConfigError as error:
            raise ConfigError(f"{self.source}: {str(error).removeprefix('SkipPlan: ')}") from None


@dataclass(frozen=True)
class Duel:
    """Hold the routers beside the static plan, input by input, on everything that was evaluated."""

    skip: tuple[Label, ...]
    source: str
    kl_difference: dict[str, Any] | None  # routed minus static, nats: estimate, low, high, n; None: not finite
    sentence: str


def find_rival(
    summary: dict[str, Any], named: str | Sequence[Label] | None, folder: Path, unit: Unit = "block"
) -> Rival | None:
    """Return the plan that is named, else the one that training found; None where there is neither.

    Args:
        summary: what the run's ``summary.json`` holds.
        named: layers to leave out, as ``4,5,6`` or a list.
        folder: of the run.
        unit: what the run's routers leave out, which says what the layers' names may be.

    Raises:
        ConfigError: what is named are no layers.
        DataError: the summary is damaged.
    """
    if named is not None:
        return Rival(_read_named(named, unit), "--static", unit)
    static = summary.get("static")
    if static is None:
        return None
    try:
        return Rival(_read(static["skip"], unit), f"{folder / SUMMARY}, static.skip", unit)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{folder / SUMMARY}: `static`: expected an object with the layers to leave out under `skip`, got "
            f"{static!r} ({error}); mend it, or name a plan: --static 4,5,6"
        ) from None


def missing(folder: Path) -> str:
    """Say that there is no static plan to compare with, and how to get one."""
    return (
        f"{folder / SUMMARY} names no static plan, so the routers are compared with the dense model alone; name one "
        f"that costs as much: adaskip eval {folder} --static 4,5,6 (`adaskip profile` shows the best it finds)"
    )


def duel(rival: Rival, routed: Tensor, static: Tensor, keeps: tuple[float, float]) -> Duel:
    """Compare exact KLs to the dense model of the same inputs, (n) each, in nats per predicted token.

    Args:
        rival: the plan.
        routed: of the routers.
        static: of the plan.
        keeps: executed over dense decoder FLOPs of either.
    """
    work = f"at keep {keeps[0]:.3f} beside {keeps[1]:.3f}"
    if not (routed.isfinite().all() and static.isfinite().all()):
        return Duel(rival.skip, rival.source, None, f"KL routed - static: not finite, {work}; load another dtype")
    interval = paired_difference(routed, static, LEVEL)
    if interval.low == interval.high == 0:
        verdict = "the run decides as the static plan does"
    elif interval.high < 0:
        verdict = "the routers are closer to the dense model than the static plan"
    elif interval.low > 0:
        verdict = "the static plan is closer to the dense model than the routers"
    else:
        verdict = "these inputs do not tell the routers from the static plan"
    sentence = (
        f"KL routed - static: {interval.estimate:.4g} nats per token [{interval.low:.4g}, {interval.high:.4g}] "
        f"({LEVEL:.0%}, paired over {interval.n} inputs), {work}: {verdict}"
    )
    return Duel(rival.skip, rival.source, plain(interval), sentence)


def _read(labels: Any, unit: Unit) -> tuple[Label, ...]:
    return tuple(label_site(unit, site) for site in read_sites(unit, labels))


def _read_named(named: str | Sequence[Label], unit: Unit) -> tuple[Label, ...]:
    try:
        layers = _read(parse_labels(named) if isinstance(named, str) else named, unit)
    except ValueError:
        layers = ()
    if not layers:
        raise ConfigError(f"--static: expected the layers to leave out, such as 4,5,6, got {named!r}")
    return layers
