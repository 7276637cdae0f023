"""The options of a request and its results, stored by thread and context, so that threads may share a model.

Two threads, or two tasks of one event loop, may use one routed model at once, so nothing of a request lies on it:

    with model.dense(): ...    options, for whatever runs inside: a context variable, which tasks inherit, as does
                               `asyncio.to_thread`; a thread that somebody starts does not
    model(...)                 the options of one call, handed to the backbone's hook by the calling thread
    the request under way      in a slot of the thread that runs it, for a pass never leaves its thread
    model.routing              in the same slot: what this thread ran last

The slot is a plain object inside a `threading.local`, because that is what Dynamo can trace: it loses what is written
to a `threading.local` itself, and cannot read context variables at all. A compiled graph therefore sees the options
that its thread has set last, also where they were set by another task.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from adaskip.generate.drafting import Drafting
    from adaskip.plan import Routing, Target
    from adaskip.runtime.cost import Ledger
    from adaskip.runtime.noise import Noise
    from adaskip.runtime.request import Request

Mode = Literal["dense", "soft", "skip"]
Observer = Callable[[int, Tensor, Tensor], None]


@dataclass(frozen=True, eq=False)
class Options:
    """Say how passes are to run; fixed for each when it begins."""

    mode: Mode = "skip"
    threshold: float | None = None  # instead of the configuration's
    target: Target | None = None  # instead of the policy's, where it says which tokens decisions speak of
    temperature: float = 1.0
    noise: Noise | None = None
    fixed: Tensor | None = None  # bool (s b), scope token also (s b t): decisions made beforehand
    prompt_mask: Tensor | None = None  # bool (b t)
    prompt_length: int | None = None
    prompt_ids: Tensor | None = None  # long (b t)
    tower: list[Tensor] | None = None  # (p n) a call: what the vision tower shows before the first pass of a `generate`
    observer: Observer | None = None
    adapted: bool = True  # whether a routed pass has the adapters that the model may have
    replay: Sequence[Tensor] = ()  # (b t d) before layer 0, then after layers 0, 1, ...


_DEFAULT = Options()


class _Slot:
    """Hold one thread's part of a model's state."""

    def __init__(self) -> None:
        self.ambient = _DEFAULT  # what the context says, where a compiled graph can read it
        self.call: Options | None = None  # of the call that is about to begin
        self.request: Request | None = None  # the one under way
        self.soft: Request | None = None  # the last one, if it was soft and its gradients are still to come
        self.routing: Routing | None = None
        self.ledger: Ledger | None = None
        self.drafting: Drafting | None = None
        self.watching = ExitStack()  # the vision tower, while the layer runs that a policy reads


class _Slots(threading.local):
    """Hold one slot for every thread."""

    def __init__(self) -> None:  # called anew in every thread that looks
        self.slot = _Slot()


class State:
    """Hold what the calling thread and its context know of the requests to one model."""

    def __init__(self) -> None:
        self._ambient: ContextVar[Options] = ContextVar("adaskip_options", default=_DEFAULT)
        self._threads = _Slots()

    def __reduce__(self) -> tuple[type[State], tuple[Any, ...]]:
        """Copy and pickle nothing of a request: a copy begins as a new one."""
        return State, ()

    @property
    def here(self) -> _Slot:
        """Return the calling thread's slot."""
        return self._threads.slot

    @property
    def options(self) -> Options:
        """Return what the context managers around this place have set."""
        return self.here.ambient if torch.compiler.is_dynamo_compiling() else self._ambient.get()

    @contextmanager
    def using(self, **changes: Any) -> Iterator[None]:
        """Change options for this context only: `dense` in one thread or task does not reach another."""
        before = self._ambient.get()
        self._put(replace(before, **changes))
        try:
            yield
        finally:
            self._put(before)  # no token: a fixture or an async generator may be left in another context

    def _put(self, options: Options) -> None:
        """Set the context's options, and the copy that compiled graphs read."""
        self._ambient.set(options)
        self.here.ambient = options

    @contextmanager
    def calling(self, around: Options, **changes: Any) -> Iterator[None]:
        """Hand the options around with these changes to the one pass that begins inside."""
        slot = self.here
        slot.call = replace(around, **changes)
        try:
            yield
        finally:
            slot.call = None

    def take(self) -> Options:
        """Return the options of the pass that begins, its call's or else the context's; a call's hold for one pass."""
        slot = self.here
        options, slot.call = slot.call, None
        return self.options if options is None else options

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Keep ``model.routing`` as it is, whatever runs inside."""
        slot = self.here
        before = slot.routing, slot.ledger, slot.soft
        try:
            yield
        finally:
            slot.routing, slot.ledger, slot.soft = before
