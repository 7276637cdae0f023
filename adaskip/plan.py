"""Decisions as data: what a policy decides about, a fixed plan of layers, and the routing of one request."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from numbers import Real
from operator import index
from typing import Any, ClassVar, Literal, Self, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from adaskip.errors import ConfigError, did_you_mean
from adaskip.sites import Label, Sites, Unit, label_site, read_sites

Scope = Literal["prompt", "token"]
Group = Literal["all", "vision"]
KV = Literal["absent", "kept"]
Phase = Literal["both", "prefill", "decode"]
Flags = tuple[bool, ...]
"""Decisions that Python knows: one a row."""
KEEP_ALL = -torch.finfo(torch.float32).max
"""The threshold at which every layer runs, whatever the logits; its opposite lies above all that are finite."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """Say what decisions are about: how often they fall, what of a layer they leave out, for which tokens, and when.

    Args:
        scope: ``prompt``: each layer is decided once from the prompt, at prefill; generated tokens follow. ``token``:
            every token decides for itself.
        unit: what is left out of a layer: the whole ``block``, only its ``attention``, only its ``mlp``, or either of
            these by a decision of its own, ``sublayers``. A sublayer that is left out adds nothing to the states.
        group: the positions that leave the unit: ``all`` tokens of a row, or only its ``vision`` tokens.
        kv: ``absent``: what skips an attention has no keys there, so nothing can attend to it. ``kept``: it is not
            updated, but its keys and values are projected from the state that bypasses the layer, stored, and attended
            to by what runs; for group ``vision``, scope ``token`` or phase ``prefill``. A skipped ``mlp`` has keys as
            ever.
        phase: when the group leaves the unit. ``both``: while the prompt is read and in what is generated. ``prefill``:
            only while the prompt is read; generated tokens run every layer. ``decode``: the prompt runs whole and
            generated tokens skip. In training and in uncached passes the answer's tokens stand for the generated ones.

    Raises:
        ConfigError: a value outside its set, or two that do not go together; all faults at once.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    scope: Scope = "prompt"
    unit: Unit = "block"
    group: Group = "all"
    kv: KV = "absent"
    phase: Phase = "both"

    def __post_init__(self) -> None:
        name = type(self).__name__
        if faults := self._faults():
            raise ConfigError(f"{name}: " + "; ".join(faults))
        self._check_sound(name)

    @property
    def partial(self) -> bool:
        """Return whether some tokens of a row may run a layer that others of it leave."""
        return self.scope == "token" or self.group == "vision" or self.phase != "both"

    @property
    def hides(self) -> bool:
        """Return whether tokens that run a layer miss the keys of others of their row that leave it."""
        some_leave = self.group == "vision" or self.phase == "prefill"
        return some_leave and self.kv == "absent" and self.unit != "mlp"

    def sites(self, layers: int) -> Sites:
        """Return where decisions about a model of so many layers fall."""
        return Sites(self.unit, layers)

    def read_labels(self, values: Any) -> tuple[Label, ...]:
        """Return the labels of what a list names, each once, in order.

        Raises:
            ValueError: no such list.
        """
        return tuple(label_site(self.unit, site) for site in read_sites(self.unit, values))

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON-ready values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Make what `to_dict` described; unknown keys are an error."""
        valid, name = [f.name for f in fields(cls)], cls.__name__
        if not isinstance(values, dict):
            raise ConfigError(f"{name}: expected a dictionary of fields, got {values!r}")
        if unknown := [key for key in values if key not in valid]:
            raise ConfigError(f"{name}: " + "; ".join(f"{k}: no such field, {did_you_mean(k, valid)}" for k in unknown))
        return cls(**values)

    def _faults(self) -> list[str]:
        """Return a text for each value that is not in the set of its field."""
        faults = []
        for name, hint in get_type_hints(type(self)).items():
            allowed, value = get_args(hint) if get_origin(hint) is Literal else (), getattr(self, name, None)
            if allowed and value not in allowed:
                hint = did_you_mean(str(value), allowed)
                faults.append(f"{name}: expected {' | '.join(allowed)}, got {value!r}; {hint}")
        return faults

    def _convert(self, kinds: dict[str, Callable[[Any], Any]]) -> list[str]:
        """Give fields their plain Python values; return a text for each that cannot be read."""
        faults = []
        for name, read in kinds.items():
            try:
                object.__setattr__(self, name, read(getattr(self, name)))
            except (TypeError, ValueError) as error:
                faults.append(f"{name}: {error}")
        return faults

    def _check_sound(self, where: str) -> None:
        if self.kv == "kept" and self.unit == "mlp":
            raise ConfigError(
                f"{where}: kv='kept' says nothing for unit 'mlp', whose attention runs and keeps every key and value; "
                "leave kv out"
            )
        if self.kv == "kept" and self.group == "all" and self.scope == "prompt" and self.phase != "prefill":
            raise ConfigError(
                f"{where}: kv='kept' is pure waste for group 'all' under scope 'prompt': all tokens of a row skip "
                "together, so no query would ever read the keys; use kv='absent', group='vision', scope='token' or "
                "phase='prefill'"
            )
        if self.group == "vision" and self.phase == "decode":
            raise ConfigError(
                f"{where}: phase='decode' with group='vision' skips nothing: generated tokens are text; "
                "use group='all', or phase='both'"
            )


def read_number(value: Any) -> float:
    """Read a finite float out of Python's, numpy's or a tensor's single number.

    Raises:
        ValueError: it is none.
    """
    value = value.item() if getattr(value, "shape", None) == () else value
    # numbers.Real knows numpy's floats as well; True is an int to Python, and a slip here
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"expected a finite number, got {value!r}")
    return float(value)


def read_count(value: Any) -> int:
    """Read an int out of Python's, numpy's or a tensor's single whole number.

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


def read_count_or_none(value: Any) -> int | None:
    return None if value is None else read_count(value)


def read_layers(values: Any) -> tuple[int, ...]:
    """Read numbers of layers, each once, in order.

    Raises:
        ValueError: no list of whole numbers.
    """
    return read_sites("block", values)


@dataclass(frozen=True)
class SkipPlan(Target):
    """Choose layers that are left out, the same for every input.

    Args:
        skip: layers the group leaves out, counted from 0; of unit ``sublayers`` halves of them, such as
            ``"4.attention"`` or ``"7.mlp"``, where a number stands for both.
        enter: the group is absent from the first ``enter`` layers (late entry).
        leave: the group is absent after the first ``leave`` layers (early exit); ``None``: it stays to the end.
        group: the positions that leave, with ``unit``, ``kv`` and ``phase`` as in `Target`; its scope is ``prompt``.

    >>> SkipPlan.static([1, 3]).keep(5).tolist()
    [True, False, True, False, True]
    >>> SkipPlan.early_exit(2).keep(4).tolist()
    [True, True, False, False]
    >>> SkipPlan(unit="sublayers", skip=["2.mlp", 1]).skip
    ('1.attention', '1.mlp', '2.mlp')
    """

    kind: ClassVar[str] = "static"

    skip: tuple[Label, ...] = ()
    enter: int = 0
    leave: int | None = None

    def _faults(self) -> list[str]:
        faults = super()._faults()
        faults += self._convert({"skip": self.read_labels, "enter": read_count, "leave": read_count_or_none})
        if self.scope == "token":
            faults.append("scope: expected prompt, got 'token'; a plan is the same for every token")
        return faults

    @classmethod
    def static(cls, skip: Iterable[Label], group: Group = "all", **target: Any) -> SkipPlan:
        """Leave out exactly these layers, or halves of them."""
        return cls(skip=skip, group=group, **target)  # type: ignore[arg-type]

    @classmethod
    def late_entry(cls, layers: int, group: Group = "all", **target: Any) -> SkipPlan:
        """Leave out the first ``layers`` layers."""
        return cls(enter=layers, group=group, **target)

    @classmethod
    def early_exit(cls, layers: int, group: Group = "all", **target: Any) -> SkipPlan:
        """Leave out all but the first ``layers`` layers."""
        return cls(leave=layers, group=group, **target)

    def keep(self, n_layers: int) -> Tensor:
        """Return bool (s): whether the group runs each site, which is a layer, or a half of one.

        Raises:
            ConfigError: the plan names a layer the model does not have.
        """
        sites, skip = self.sites(n_layers), read_sites(self.unit, self.skip)
        wrong = sites.labels(site for site in skip if not 0 <= site < len(sites))
        bounds = {"enter": self.enter, "leave": n_layers if self.leave is None else self.leave}
        wrong_bounds = [f"{name}={value}" for name, value in bounds.items() if not 0 <= value <= n_layers]
        if wrong or wrong_bounds:
            named = ", ".join([*(f"layer {layer}" for layer in wrong), *wrong_bounds])
            raise ConfigError(f"SkipPlan: {named} is outside the model: it has {n_layers} layers, 0 to {n_layers - 1}")
        layer = torch.tensor([sites.layer(site) for site in range(len(sites))])
        kept = (layer >= self.enter) & (layer < bounds["leave"])
        kept[list(skip)] = False
        return kept


def host(keep: Tensor) -> tuple[Flags, ...]:
    """Return decisions, bool (s b), as Python's own: a tuple a site, with one value a row."""
    return tuple(map(tuple, keep.tolist()))


def mean_over(tokens: Tensor, values: Tensor) -> Tensor:
    """Return float32 (... b): each row's mean of values (... b t) over its ``tokens`` (b t); 1 for a row without."""
    count = tokens.sum(1)
    total = torch.where(tokens, values.float(), 0.0).sum(-1)
    return torch.where(count > 0, total / count.clamp(min=1), 1.0)


@dataclass(frozen=True)
class Routing:
    """Hold the decisions of one request, and what they cost.

    A row's ``keep`` depends on that row alone, neither on padding nor on the other rows of the batch. Its sites s are
    the layers, under unit ``sublayers`` the attention and the MLP of each (`RoutedModel.sites` names them).
    """

    keep: Tensor  # bool (s b): row b's group runs site s; scope token: bool (s b t), whether token t of it does
    group: Group
    logits: Tensor | None = None  # float32, shaped like keep: the routers' outputs; None where nothing gives any
    gates: Tensor | None = None  # float32 (s b): gates that carry the gradient, scope token: their means; None else
    #                              of what was drawn and really skipped, the probabilities to run
    tokens: Tensor | None = None  # bool (b t), scope token: the tokens that decide
    executed: Tensor | None = None  # float64 (b): decoder FLOPs really spent on each row
    dense: Tensor | None = None  # float64 (b): decoder FLOPs of the same tokens with every layer run
    kv_bytes: Tensor | None = None  # long (b): bytes of each row's keys and values in the cache; None without one
    flags: tuple[Flags, ...] | None = None  # keep on the host, where it has been read from the device

    @property
    def keep_rate(self) -> Tensor:
        """Return float64 (b): executed over dense decoder FLOPs of each row; 1 for a row without a token."""
        if self.executed is None or self.dense is None:
            raise ConfigError("Routing.keep_rate: no request has run under this routing yet; call the model first")
        return torch.where(self.dense > 0, self.executed / self.dense, 1.0)

    def per_row(self, decided: Tensor) -> Tensor:
        """Return float32 (s b): one number for each row out of something shaped like ``keep``.

        Under scope token it is the mean over the row's tokens that decide; 1 for a row none of whose tokens decides.
        """
        if self.tokens is None or decided.dim() < 3:
            return decided.float()
        return mean_over(self.tokens, decided)

    @property
    def decided(self) -> Tensor:
        """Return float32 (n): the logits of all decisions of the request, in no order that matters."""
        if self.logits is None:
            raise ConfigError("Routing.decided: this policy decides without logits; attach with a RouterConfig")
        return self.logits.flatten() if self.tokens is None else self.logits[:, self.tokens].flatten()

    @property
    def share(self) -> Tensor:
        """Return float32 (s b): the share of a row's deciding tokens that ran a site; 0 or 1 under scope prompt."""
        return self.per_row(self.keep)

    def select(self, rows: Tensor) -> Routing:
        """Return the routing of these rows (long, repeats allowed), in that order."""
        return self._map(lambda name, value: value.index_select(_ROWS.get(name, 0), rows))

    def crop(self, length: int) -> Routing:
        """Return the routing of the first ``length`` positions; under scope prompt positions do not matter."""
        if self.tokens is None:
            return self
        return self._map(lambda name, value: value[..., :length] if name in _BY_TOKEN else value)

    def join(self, later: Routing) -> Routing:
        """Return, for scope token, the routing of this request so far and of a chunk behind it."""
        return later._map(
            lambda name, value: torch.cat([getattr(self, name), value], -1) if name in _BY_TOKEN else value
        )

    def _map(self, change: Callable[[str, Tensor], Tensor]) -> Routing:
        changed: dict[str, Any] = {name: change(name, value) for name, value in self._tensors().items()}
        return Routing(group=self.group, **changed)

    def _tensors(self) -> dict[str, Tensor]:
        return {f.name: v for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)}

    def __str__(self) -> str:
        """Draw one line a row: ``#`` is a site that ran, ``.`` a skipped one, a digit the tenths that ran."""
        signs = "." + "123456789" + "#"
        return "\n".join("".join(signs[_tenths(share)] for share in row) for row in self.share.T.tolist())


_ROWS = {"keep": 1, "logits": 1, "gates": 1}
_BY_TOKEN = ("keep", "logits", "tokens")


def _tenths(share: float) -> int:
    """Return a share in tenths, but 0 and 10 only for none and all."""
    return int(share * 10) if share in (0.0, 1.0) else min(9, max(1, round(share * 10)))
