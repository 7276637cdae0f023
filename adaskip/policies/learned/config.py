"""What learned routers decide, and how they are built."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from adaskip.errors import did_you_mean
from adaskip.plan import Target, read_count, read_count_or_none, read_number
from adaskip.sites import Label

FEATURES = ("mean", "directions", "standardised")


@dataclass(frozen=True)
class RouterConfig(Target):
    """Set what the routers decide and how they are built.

    Args:
        scope: ``prompt``: each layer's router looks at the prompt once, at prefill; generated tokens follow. ``token``:
            it looks at every token's own state, and every token decides for itself.
        unit: see `Target`, as for the other fields of the target.
        group: likewise.
        kv: likewise.
        phase: likewise.
        features: what the routers of scope ``prompt`` read. ``mean``: the mean state of each kind of token.
            ``directions``: every token is brought to norm 1 before the mean, the first token, whose state dwarfs the
            others in many models, is left out, and the last prompt token's own direction stands beside the mean.
            ``standardised``: that, each number centred and scaled over calibration inputs. Under scope ``token`` a
            router reads its token's state, and only the last is refused.
        entry: a layer whose entering states decide it and all layers behind; those before it decide by their own. None:
            every layer decides by its own.
        hidden: width of each router's hidden layer; 0: none, the logit is linear in the normalised features.
        keep_bias: every router's logit before training; positive, so that training starts from the dense model.
        threshold: a layer runs where its router's logit exceeds this value.
        held: layers that run whatever their router says; of unit ``sublayers`` also halves, such as ``"4.attention"``.

    Raises:
        ConfigError: a value outside its set or range; all faults at once.
    """

    kind: ClassVar[str] = "learned"

    features: str = "directions"
    entry: int | None = None
    hidden: int = 64
    keep_bias: float = 2.0
    threshold: float = 0.0
    held: tuple[Label, ...] = ()

    def _faults(self) -> list[str]:
        faults = super()._faults()
        faults += self._convert(
            {
                "entry": read_count_or_none,
                "hidden": read_count,
                "keep_bias": read_number,
                "threshold": read_number,
                "held": self.read_labels,
            }
        )
        if self.features not in FEATURES:
            hint = did_you_mean(str(self.features), FEATURES)
            faults.append(f"features: expected {' | '.join(FEATURES)}, got {self.features!r}; {hint}")
        elif self.features == "standardised" and self.scope == "token":
            faults.append("features: expected directions with scope token, got 'standardised'")
        if isinstance(self.entry, int) and self.entry < 0:
            faults.append(f"entry: expected a layer >= 0 or none, got {self.entry!r}")
        if isinstance(self.hidden, int) and self.hidden < 0:
            faults.append(f"hidden: expected an integer >= 0, got {self.hidden!r}")
        return faults
