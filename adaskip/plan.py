"""Who runs where: the data contract between whoever decides and whoever executes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import FrozenInstanceError, asdict, dataclass, fields
from numbers import Real
from operator import index
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from adaskip.errors import ConfigError, MissingAttributeError, did_you_mean

Scope = Literal["prompt", "token"]
Unit = Literal["block", "attention", "mlp"]
Group = Literal["all", "vision"]
KV = Literal["absent", "kept"]
Flags = tuple[bool, ...]
"""Decisions that Python knows: one a row."""
KEEP_ALL = -1e9
"""A threshold below any logit: every layer runs."""


@dataclass(frozen=True)
class RouterConfig:
    """What the routers decide and how they are built.

    Args:
        scope: ``prompt``: each layer's router looks at the prompt once, at prefill; generated tokens follow. ``token``:
            it looks at every token's own state, and every token decides for itself.
        unit: what is left out of a layer: the whole ``block``, only its ``attention``, or only its ``mlp``. A sublayer
            that is left out adds nothing to the states.
        group: the positions that leave the unit: ``all`` tokens of a row, or only its ``vision`` tokens.
        kv: ``absent``: what skips an attention is not in it at all, so nothing can attend to it there. ``kept``: it is
            not updated, but its keys and values are projected from the state that bypasses the layer, stored, and
            attended to by what runs; for group ``vision`` or scope ``token``. A skipped ``mlp`` has keys as ever.
        hidden: width of each router's hidden layer.
        keep_bias: every router's logit before training; positive, so that training starts from the dense model.
        threshold: a layer runs where its router's logit exceeds this value.
        held: layers that run whatever their router says.

    Raises:
        ConfigError: a value outside its set or range; all faults at once.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    scope: Scope = "prompt"
    unit: Unit = "block"
    group: Group = "all"
    kv: KV = "absent"
    hidden: int = 64
    keep_bias: float = 2.0
    threshold: float = 0.0
    held: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        faults = _unknown(self)
        faults += _convert(self, {"hidden": _count, "keep_bias": _number, "threshold": _number, "held": _layers})
        if isinstance(self.hidden, int) and self.hidden < 1:
            faults.append(f"hidden: expected an integer >= 1, got {self.hidden!r}")
        if faults:
            raise ConfigError("RouterConfig: " + "; ".join(faults))
        _check_kv("RouterConfig", self.scope, self.unit, self.group, self.kv)

    def __getattr__(self, name: str) -> Any:
        """Say where the Hugging Face configuration is, to whoever takes ``model.config`` for it."""
        raise AttributeError(name) if name.startswith("_") else MissingAttributeError("RouterConfig", name)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RouterConfig:
        """The inverse of `to_dict`; unknown keys are an error."""
        valid = [f.name for f in fields(cls)]
        if not isinstance(values, dict):
            raise ConfigError(f"RouterConfig: expected a dictionary of fields, got {values!r}")
        if unknown := [key for key in values if key not in valid]:
            raise ConfigError(
                "RouterConfig: " + "; ".join(f"{k}: no such field, {did_you_mean(k, valid)}" for k in unknown)
            )
        return cls(**values)


def _refuse_setting(config: RouterConfig, name: str, value: Any) -> None:
    """Say the same to whoever sets on ``model.config`` what belongs to the Hugging Face configuration."""
    if name in {f.name for f in fields(config)}:
        raise FrozenInstanceError(f"cannot assign to field {name!r}; write dataclasses.replace(config, {name}=...)")
    raise MissingAttributeError("RouterConfig", name)


RouterConfig.__setattr__ = _refuse_setting  # type: ignore[assignment]  # a frozen dataclass may not define its own


def _unknown(config: RouterConfig | SkipPlan) -> list[str]:
    """Values that are not in the set of their field."""
    faults = []
    for name, hint in get_type_hints(type(config)).items():
        allowed, value = get_args(hint) if get_origin(hint) is Literal else (), getattr(config, name, None)
        if allowed and value not in allowed:
            faults.append(f"{name}: expected {' | '.join(allowed)}, got {value!r}; {did_you_mean(str(value), allowed)}")
    return faults


def _convert(config: RouterConfig | SkipPlan, kinds: dict[str, Callable[[Any], Any]]) -> list[str]:
    """Give fields their plain Python values; the text of those that cannot be read."""
    faults = []
    for name, read in kinds.items():
        try:
            object.__setattr__(config, name, read(getattr(config, name)))
        except (TypeError, ValueError) as error:
            faults.append(f"{name}: {error}")
    return faults


def _number(value: Any) -> float:
    """A finite float out of Python's, numpy's or a tensor's single number.

    Raises:
        ValueError: it is none.
    """
    value = value.item() if getattr(value, "shape", None) == () else value
    # numbers.Real knows numpy's floats as well; True is an int to Python, and a slip here
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"expected a finite number, got {value!r}")
    return float(value)


def _count(value: Any) -> int:
    """An int out of Python's, numpy's or a tensor's single whole number.

    Raises:
        ValueError: it is none.
    """
    value = value.item() if getattr(value, "shape", None) == () else value
    try:
        if not isinstance(value, bool):
            return index(value)
    except TypeError:
        pass
    raise ValueError(f"expected an integer, got {value!r}")


def _count_or_none(value: Any) -> int | None:
    return None if value is None else _count(value)


def _layers(values: Any) -> tuple[int, ...]:
    """Numbers of layers, each once, in order.

    Raises:
        ValueError: no list of whole numbers.
    """
    values = values.tolist() if isinstance(values, Tensor) else values
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
        raise ValueError(f"expected layer numbers such as [1, 3], got {values!r}")
    try:
        return tuple(sorted({_count(value) for value in values}))
    except ValueError as error:
        raise ValueError(f"expected layer numbers such as [1, 3]; one of them: {error}") from None


def _check_kv(where: str, scope: Scope, unit: Unit, group: Group, kv: KV) -> None:
    if kv == "kept" and unit == "mlp":
        raise ConfigError(
            f"{where}: kv='kept' says nothing for unit 'mlp', whose attention runs and keeps every key and value; "
            "leave kv out"
        )
    if kv == "kept" and group == "all" and scope == "prompt":
        raise ConfigError(
            f"{where}: kv='kept' is pure waste for group 'all' under scope 'prompt': all tokens of a row skip "
            "together, so no query would ever read the keys; use kv='absent', group='vision' or scope='token'"
        )


@dataclass(frozen=True)
class SkipPlan:
    """A hand-written, input-independent choice of layers.

    Args:
        skip: layers the group leaves out, counted from 0.
        enter: the group is absent from the first ``enter`` layers (late entry).
        leave: the group is absent after the first ``leave`` layers (early exit); ``None``: it stays to the end.
        group: the positions the plan speaks of.
        unit: what of a layer is left out, and
        kv: what becomes of its keys and values, both as in `RouterConfig`.

    >>> SkipPlan.static([1, 3]).keep(5).tolist()
    [True, False, True, False, True]
    >>> SkipPlan.early_exit(2).keep(4).tolist()
    [True, True, False, False]
    """

    skip: tuple[int, ...] = ()
    enter: int = 0
    leave: int | None = None
    group: Group = "all"
    unit: Unit = "block"
    kv: KV = "absent"

    def __post_init__(self) -> None:
        faults = _unknown(self)
        faults += _convert(self, {"skip": _layers, "enter": _count, "leave": _count_or_none})
        if faults:
            raise ConfigError("SkipPlan: " + "; ".join(faults))
        _check_kv("SkipPlan", "prompt", self.unit, self.group, self.kv)

    @classmethod
    def static(cls, skip: Iterable[int], group: Group = "all", unit: Unit = "block", kv: KV = "absent") -> SkipPlan:
        """Leave out exactly these layers."""
        return cls(skip=skip, group=group, unit=unit, kv=kv)  # type: ignore[arg-type]

    @classmethod
    def late_entry(cls, layers: int, group: Group = "vision", unit: Unit = "block", kv: KV = "absent") -> SkipPlan:
        """Be absent from the first ``layers`` layers."""
        return cls(enter=layers, group=group, unit=unit, kv=kv)

    @classmethod
    def early_exit(cls, layers: int, group: Group = "vision", unit: Unit = "block", kv: KV = "absent") -> SkipPlan:
        """Be absent after the first ``layers`` layers."""
        return cls(leave=layers, group=group, unit=unit, kv=kv)

    def keep(self, n_layers: int) -> Tensor:
        """bool (l): whether the group runs each layer.

        Raises:
            ConfigError: the plan names a layer the model does not have.
        """
        wrong = [layer for layer in self.skip if not 0 <= layer < n_layers]
        bounds = {"enter": self.enter, "leave": n_layers if self.leave is None else self.leave}
        wrong_bounds = [f"{name}={value}" for name, value in bounds.items() if not 0 <= value <= n_layers]
        if wrong or wrong_bounds:
            named = ", ".join([*(f"layer {layer}" for layer in wrong), *wrong_bounds])
            raise ConfigError(f"SkipPlan: {named} is outside the model: it has {n_layers} layers, 0 to {n_layers - 1}")
        runs = torch.arange(n_layers)
        kept = (runs >= self.enter) & (runs < bounds["leave"])
        kept[list(self.skip)] = False
        return kept


def host(keep: Tensor) -> tuple[Flags, ...]:
    """Decisions, bool (l b), as Python's: of each layer, of each row."""
    return tuple(map(tuple, keep.tolist()))


def mean_over(tokens: Tensor, values: Tensor) -> Tensor:
    """float32 (... b): each row's mean of values (... b t) over its ``tokens`` (b t); 1 for a row without one."""
    count = tokens.sum(1)
    total = torch.where(tokens, values.float(), 0.0).sum(-1)
    return torch.where(count > 0, total / count.clamp(min=1), 1.0)


@dataclass(frozen=True)
class Routing:
    """The decisions of one request, and what they cost.

    ``keep`` is a fact of the row alone: it depends neither on padding nor on the other rows of the batch.
    """

    keep: Tensor  # bool (l b): row b's group runs layer l; scope token: bool (l b t), whether token t of it does
    group: Group
    logits: Tensor | None = None  # float32, shaped like keep: the routers' outputs; None for a hand-written plan
    gates: Tensor | None = None  # float32 (l b): gates that carry the gradient, scope token: their means; None else
    tokens: Tensor | None = None  # bool (b t), scope token: the tokens that decide
    executed: Tensor | None = None  # float64 (b): decoder FLOPs really spent on each row
    dense: Tensor | None = None  # float64 (b): decoder FLOPs of the same tokens with every layer run
    kv_bytes: Tensor | None = None  # long (b): bytes of each row's keys and values in the cache; None without one
    flags: tuple[Flags, ...] | None = None  # keep on the host, where it has been read from the device

    @property
    def keep_rate(self) -> Tensor:
        """float64 (b): executed over dense decoder FLOPs of each row; 1 for a row without a token."""
        if self.executed is None or self.dense is None:
            raise ConfigError("Routing.keep_rate: no request has run under this routing yet; call the model first")
        return torch.where(self.dense > 0, self.executed / self.dense, 1.0)

    def per_row(self, decided: Tensor) -> Tensor:
        """float32 (l b) of something shaped like ``keep``: scope token, each row's mean over the tokens that decide.

        1 for a row none of whose tokens decides.
        """
        if self.tokens is None or decided.dim() < 3:
            return decided.float()
        return mean_over(self.tokens, decided)

    @property
    def decided(self) -> Tensor:
        """float32 (n): the logits of all decisions of the request, in no order that matters."""
        if self.logits is None:
            raise ConfigError("Routing.decided: a hand-written plan has no logits; attach with a RouterConfig")
        return self.logits.flatten() if self.tokens is None else self.logits[:, self.tokens].flatten()

    @property
    def share(self) -> Tensor:
        """float32 (l b): the share of each row's deciding tokens that ran each layer; 0 or 1 under scope prompt."""
        return self.per_row(self.keep)

    def select(self, rows: Tensor) -> Routing:
        """The routing of the given rows (long, repeats allowed), in that order."""
        return self._map(lambda name, value: value.index_select(_ROWS.get(name, 0), rows))

    def crop(self, length: int) -> Routing:
        """The routing of the first ``length`` positions; under scope prompt positions do not matter."""
        if self.tokens is None:
            return self
        return self._map(lambda name, value: value[..., :length] if name in _BY_TOKEN else value)

    def join(self, later: Routing) -> Routing:
        """Scope token: the routing of this request so far and of a chunk behind it."""
        return later._map(
            lambda name, value: torch.cat([getattr(self, name), value], -1) if name in _BY_TOKEN else value
        )

    def _map(self, change: Callable[[str, Tensor], Tensor]) -> Routing:
        changed: dict[str, Any] = {name: change(name, value) for name, value in self._tensors().items()}
        return Routing(group=self.group, **changed)

    def _tensors(self) -> dict[str, Tensor]:
        return {f.name: v for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)}

    def __str__(self) -> str:
        """One line a row: ``#`` is a layer that ran, ``.`` one that was skipped, a digit the tenths of its tokens."""
        signs = "." + "123456789" + "#"
        return "\n".join("".join(signs[_tenths(share)] for share in row) for row in self.share.T.tolist())


_ROWS = {"keep": 1, "logits": 1, "gates": 1}
_BY_TOKEN = ("keep", "logits", "tokens")


def _tenths(share: float) -> int:
    """Tenths, but 0 and 10 only for none and all."""
    return int(share * 10) if share in (0.0, 1.0) else min(9, max(1, round(share * 10)))
