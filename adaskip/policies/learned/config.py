"""What learned routers decide, and how they are built."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from adaskip.plan import Target, read_count, read_layers, read_number


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
        hidden: width of each router's hidden layer.
        keep_bias: every router's logit before training; positive, so that training starts from the dense model.
        threshold: a layer runs where its router's logit exceeds this value.
        held: layers that run whatever their router says.

    Raises:
        ConfigError: a value outside its set or range; all faults at once.
    """

    kind: ClassVar[str] = "learned"

    hidden: int = 64
    keep_bias: float = 2.0
    threshold: float = 0.0
    held: tuple[int, ...] = ()

    def _faults(self) -> list[str]:
        faults = super()._faults()
        faults += self._convert(
            {"hidden": read_count, "keep_bias": read_number, "threshold": read_number, "held": read_layers}
        )
        if isinstance(self.hidden, int) and self.hidden < 1:
            faults.append(f"hidden: expected an integer >= 1, got {self.hidden!r}")
        return faults
