"""The same layers for every input: a plan, written by hand or found by a search."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from adaskip.backbone.inspect import BackboneSpec
from adaskip.plan import SkipPlan
from adaskip.policy import Policy


class Static(Policy):
    """Follow a `SkipPlan`, which needs no training and looks at nothing.

    Args:
        plan: which layers are left out, and of what.
    """

    kind: ClassVar[str] = "static"

    def __init__(self, plan: SkipPlan) -> None:
        super().__init__(plan)
        self.plan = plan

    def build(self, spec: BackboneSpec, seed: int) -> None:
        """Check that the plan speaks of layers that the model has.

        Raises:
            ConfigError: it does not.
        """
        self.plan.keep(len(spec.layers))

    def known(self, layers: int) -> Tensor:
        """Return bool (s): the plan's decisions."""
        return self.plan.keep(layers)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan's fields."""
        return self.plan.to_dict()

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Static:
        """Make the policy of the plan that `to_dict` described.

        Raises:
            ConfigError: no such plan.
        """
        return cls(SkipPlan.from_dict(values))
