"""What adapters are made of: the settings of low-rank updates."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

from adaskip.errors import ConfigError
from adaskip.plan import read_count, read_number


@dataclass(frozen=True)
class Lora:
    """Set what adapters are made of.

    Args:
        rank: of the update of each weight.
        alpha: the update counts ``alpha / rank`` times.
        dropout: share of an adapter's inputs that training leaves out.
        targets: names of the modules adapted, as they end (``q_proj``); none: every linear one of a decoder layer.

    Raises:
        ConfigError: a value outside its range; all faults at once.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        faults = []
        readers: dict[str, Any] = {"rank": read_count, "alpha": read_number, "dropout": read_number}
        for name, read in readers.items():
            try:
                object.__setattr__(self, name, read(getattr(self, name)))
            except ValueError as error:
                faults.append(f"{name}: {error}")
        object.__setattr__(self, "targets", tuple(self.targets))
        if not faults:
            faults += ["rank: expected an integer >= 1, got " + repr(self.rank)] * (self.rank < 1)
            faults += ["alpha: expected a number > 0, got " + repr(self.alpha)] * (self.alpha <= 0)
            faults += ["dropout: expected a share in [0, 1), got " + repr(self.dropout)] * (not 0 <= self.dropout < 1)
        if wrong := [name for name in self.targets if not isinstance(name, str) or not name]:
            faults.append(f"targets: expected names of modules, got {wrong[0]!r}")
        if faults:
            raise ConfigError("Lora: " + "; ".join(faults))

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, JSON-ready."""
        return asdict(self) | {"targets": list(self.targets)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Lora:
        """Make settings from what `to_dict` gave.

        Raises:
            ConfigError: an unknown field, or a value outside its range.
        """
        known = {field.name for field in fields(cls)}
        if unknown := sorted(values.keys() - known):
            raise ConfigError(f"Lora: expected {', '.join(sorted(known))}, got {', '.join(unknown)}")
        return cls(**values)
