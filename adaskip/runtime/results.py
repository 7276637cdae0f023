"""What the calling thread's last request decided, and what that cost: the part of the handle that answers questions."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from adaskip.errors import ConfigError
from adaskip.plan import Routing
from adaskip.runtime.cost import Flops, Ledger
from adaskip.runtime.forward import Runtime
from adaskip.runtime.handle import Handle
from adaskip.sites import Sites

if TYPE_CHECKING:
    from adaskip.generate.drafting import Drafting


class Results(Handle):
    """Tell what requests decided and cost; each thread sees its own last one."""

    runtime: Runtime

    @property
    def sites(self) -> Sites:
        """Return where decisions fall: a site a layer, or one for each half of it; it counts and names them."""
        return self.runtime.sites

    @property
    def routing(self) -> Routing:
        """Return the decisions of the calling thread's last request with their cost, read-only.

        Each thread sees its own: read it where `generate` ran, before the next request (or ``await``) there.

        Raises:
            ConfigError: nothing has run yet in this thread.
        """
        routing, ledger = self._last()
        executed, dense = (ledger.spent(self.runtime.cost, along).decoder for along in (routing, None))
        return replace(routing, executed=executed, dense=dense, kv_bytes=ledger.kv_bytes())

    @property
    def lossless(self) -> Drafting:
        """Return what the calling thread's last ``generate(..., lossless=True)`` drafted, and how much of it was kept.

        Raises:
            ConfigError: there was none yet in this thread.
        """
        if (drafting := self.runtime.state.here.drafting) is None:
            raise ConfigError(
                "model.lossless: nothing was drafted yet in this thread; call generate(..., lossless=True)"
            )
        return drafting

    def flops(self) -> tuple[Tensor, Tensor]:
        """Return what running each site, and what leaving it, costs each row of the last request: float64 (s b) each.

        Raises:
            ConfigError: nothing has run yet.
        """
        return self._last()[1].flops(self.runtime.cost)

    def flops_by_part(self, dense: bool = False) -> Flops:
        """Return what the last request spent on projections, attention, MLP and the head.

        Args:
            dense: as if every layer had run.

        Raises:
            ConfigError: nothing has run yet.
        """
        routing, ledger = self._last()
        return ledger.spent(self.runtime.cost, None if dense else routing)

    def _last(self) -> tuple[Routing, Ledger]:
        """Return the decisions of this thread's last request, and the tokens it holds."""
        if self.runtime.routing is None or self.runtime.ledger is None:
            raise ConfigError(
                "model.routing: no routed request has run yet in this thread; call the model or generate first, and "
                "read model.routing in the thread that did"
            )
        return self.runtime.routing, self.runtime.ledger
